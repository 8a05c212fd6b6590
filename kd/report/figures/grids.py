"""Heat maps over two swept keys: validation accuracy to the left of test accuracy."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from kd.report.figures.limits import Limits, lowest_sound, padded
from kd.report.figures.selection import (
    FigureNotApplicable,
    best_methods,
    done_runs,
    fix_other_settings,
    fixed_settings_note,
    how_to_read,
    panels,
    validated,
)
from kd.report.figures.stability import for_range, unstable, unstable_note, with_medians
from kd.report.figures.style import canvas, joined, labels, sentences, short
from kd.report.tables import Tables

MAX_MAPS = 3  # methods with heat maps of their own
MAX_NUMBERED_CELLS = 12  # values of a key up to which numbers are written into the cells
MAX_COLUMNS = 40  # values of a key that fit into a heat map


def heat(tables: Tables, row_key: str, column_key: str) -> tuple[Any, str]:
    """Draw mean accuracy over two swept keys, a row of maps for each method that has a grid.

    Args:
        tables: The tables of the sweep.
        row_key: The key whose values are the rows of a map.
        column_key: The key whose values are the columns of a map.

    Returns:
        (figure, caption).

    Raises:
        FigureNotApplicable: No method was run on a grid of both keys that fits into a map.
    """
    done = done_runs(tables)
    table, fixed = fix_other_settings(tables.summary, tables.swept, [row_key, column_key])
    table = table.dropna(subset=[row_key, column_key])
    grid_methods, without_map = _grids(table, row_key, column_key)
    methods, left_out = best_methods(table, grid_methods, MAX_MAPS)
    table = table[table["method"].isin(methods)]
    shown = panels(table)
    column_count = max(rows[column_key].nunique() for _, rows in table.groupby("method"))
    row_counts = [table[table["method"] == method][row_key].nunique() for method in methods]
    numbered = max([column_count, *row_counts]) <= MAX_NUMBERED_CELLS
    width = len(shown) * (2.2 + (0.62 * column_count if numbered else 3.2))
    height = sum(1.3 + (0.42 * count if numbered else 2.6) for count in row_counts)
    figure, axes = canvas(
        max(width, 5.0), height, len(shown), len(methods), gridspec_kw={"height_ratios": row_counts}
    )
    below_scale: list[str] = []
    above_scale: list[str] = []
    for method_axes, method in zip(axes, methods, strict=True):
        rows = table[table["method"] == method]
        drawn = with_medians(rows, done)
        means = _values(drawn, shown)
        sound = _values(for_range(drawn), shown)
        lowest = lowest_sound(sound)
        span = padded(lowest, max(sound))
        if below := sum(mean < span.low for mean in means):
            below_scale.append(f"{below} cells of {method}")
        if above := sum(mean > span.high for mean in means):
            above_scale.append(f"{above} cells of {method}")
        titled = len(methods) > 1 or len(shown) == 1
        for axis, (column, title) in zip(method_axes, shown, strict=True):
            cells = _draw_map(axis, drawn, (row_key, column_key), column, title, span, numbered)
            _mark(axis, cells, rows, (row_key, column_key))
            axis.set_title(labels([method])[0][method] if titled else "")
    names, full_names = labels(methods)
    if len(methods) == 1 and len(shown) > 1:
        figure.suptitle(names[methods[0]], fontsize=11)
    return figure, sentences(
        "Mean over seeds; empty cells were not run.",
        how_to_read(shown),
        "Framed: best on validation." if validated(table) else "",
        left_out,
        without_map,
        unstable_note(table, "dashed", "colour scale"),
        fixed_settings_note(fixed, methods),
        f"Below the colour scale: {joined(below_scale)}." if below_scale else "",
        f"Above the colour scale: {joined(above_scale)}." if above_scale else "",
        full_names,
    )


def _grids(table: pd.DataFrame, row_key: str, column_key: str) -> tuple[list[str], str]:
    """Find the methods that were run on a grid of both keys.

    Returns:
        (methods, the caption's sentence about methods whose grid does not fit into a map or "").

    Raises:
        FigureNotApplicable: No method has such a grid.
    """
    methods = []
    without_map = []
    largest = 0
    for method, rows in table.groupby("method", sort=False):
        row_count = rows[row_key].nunique()
        column_count = rows[column_key].nunique()
        cells = row_count * column_count
        if min(row_count, column_count) < 2:
            continue
        if 2 * len(rows) < cells:
            without_map.append(f"{method} (only {len(rows)} of {cells} cells were run)")
        elif max(row_count, column_count) > MAX_COLUMNS:
            without_map.append(f"{method} ({cells} cells are too many)")
            largest = max(largest, row_count, column_count)
        else:
            methods.append(str(method))
    if not methods and largest:
        raise FigureNotApplicable(f"a grid with {largest} values of a key is too large to draw")
    if not methods:
        raise FigureNotApplicable("no method was run on a grid of both keys")
    return methods, f"No heat map for: {joined(without_map)}." if without_map else ""


def _draw_map(
    axis: Any,
    rows: pd.DataFrame,
    keys: tuple[str, str],
    column: str,
    title: str,
    span: Limits,
    numbered: bool,
) -> pd.DataFrame:
    """Draw a map of accuracies, and return them, in percent."""
    row_key, column_key = keys
    cells = 100 * rows.pivot_table(
        index=row_key, columns=column_key, values=column, aggfunc="mean"
    ).astype(float)
    cells = cells.sort_index()
    edge = {"edgecolors": "white", "linewidth": 1} if numbered else {}
    mesh = axis.pcolormesh(cells.to_numpy(), cmap="cividis", vmin=span.low, vmax=span.high, **edge)
    below = bool(cells.min().min() < span.low)
    above = bool(cells.max().max() > span.high)
    extend = "both" if below and above else "min" if below else "max" if above else "neither"
    axis.figure.colorbar(mesh, ax=axis, label=title, extend=extend)
    axis.grid(visible=False)
    axis.set_xticks(*_ticks(cells.columns))
    axis.set_yticks(*_ticks(cells.index))
    axis.set(xlabel=short(column_key), ylabel=short(row_key))
    if numbered:
        _write_numbers(axis, cells, span)
    return cells


def _mark(axis: Any, cells: pd.DataFrame, rows: pd.DataFrame, keys: tuple[str, str]) -> None:
    """Frame the best cell on validation, and outline the cells of unstable settings."""
    row_key, column_key = keys

    def position(row: "pd.Series[Any]") -> tuple[int, int]:
        x = list(cells.columns).index(row[column_key])
        return x, list(cells.index).index(row[row_key])

    if validated(rows):
        best = rows.sort_values("val_accuracy", ascending=False, kind="stable").iloc[0]
        _frame(axis, *position(best))
    for _, row in rows[unstable(rows)].iterrows():
        if row[column_key] in cells.columns and row[row_key] in cells.index:
            _outline(axis, *position(row))


def _values(rows: pd.DataFrame, shown: Sequence[tuple[str, str]]) -> list[float]:
    """Return the accuracies of all panels, in percent."""
    return [100 * value for column, _ in shown for value in rows[column].astype(float).dropna()]


def _ticks(values: "pd.Index[Any]") -> tuple[list[float], list[str]]:
    """Return (positions, labels) of as many values as there is room for labels."""
    step = -(-len(values) // MAX_NUMBERED_CELLS)
    positions = [i + 0.5 for i in range(0, len(values), step)]
    return positions, [f"{value:.4g}" for value in values[::step]]


def _write_numbers(axis: Any, cells: pd.DataFrame, span: Limits) -> None:
    middle = (span.low + span.high) / 2
    for y, (_, row) in enumerate(cells.iterrows()):
        for x, value in enumerate(row):
            colour = "0.1" if value > middle else "white"
            if not pd.isna(value):
                axis.text(
                    x + 0.5,
                    y + 0.5,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=colour,
                )


def _frame(axis: Any, x: int, y: int) -> None:
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((x, y), 1, 1, fill=False, ec="#d55e00", lw=2.5, clip_on=False))


def _outline(axis: Any, x: int, y: int) -> None:
    """Mark the cell of an unstable setting, inside the place of the frame."""
    from matplotlib.patches import Rectangle

    corner = (x + 0.08, y + 0.08)
    axis.add_patch(Rectangle(corner, 0.84, 0.84, fill=False, ec="#cc79a7", ls="--", lw=1.8))
