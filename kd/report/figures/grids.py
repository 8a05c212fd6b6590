"""Heat maps over two swept numbers: validation accuracy, on which they are chosen, and test beside it."""

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
from kd.report.figures.style import canvas, joined, labels, sentences, short
from kd.report.tables import Tables

MAX_MAPS = 3  # methods with heat maps of their own
MAX_NUMBERED_CELLS = 12  # values of a key up to which a heat map has numbers
MAX_COLUMNS = 40  # values of a key that a heat map can hold


def heat(tables: Tables, a: str, b: str) -> tuple[Any, str]:
    """Draw mean accuracy over the values of two swept numbers, a row of maps for each method that has a grid."""
    done_runs(tables)
    held, fixed = fix_other_settings(tables.summary, tables.swept, [a, b])
    both = held.dropna(subset=[a, b])
    grids, unfit = _grids(both, a, b)
    methods, left_out = best_methods(both, grids, MAX_MAPS)
    both = both[both["method"].isin(methods)]
    shown = panels(both)
    columns = max(rows[b].nunique() for _, rows in both.groupby("method"))
    lines = [both[both["method"] == method][a].nunique() for method in methods]
    numbered = max([columns, *lines]) <= MAX_NUMBERED_CELLS
    width = len(shown) * (2.2 + (0.62 * columns if numbered else 3.2))
    height = sum(1.3 + (0.42 * count if numbered else 2.6) for count in lines)
    figure, axes = canvas(
        max(width, 5.0), height, len(shown), len(methods), gridspec_kw={"height_ratios": lines}
    )
    dark = []
    for row, method in zip(axes, methods, strict=True):
        rows = both[both["method"] == method]
        means = [
            value for column, _ in shown for value in 100 * rows[column].astype(float).dropna()
        ]
        least = lowest_sound(means)
        span = padded(least, max(means))
        dark += (
            [f"{sum(mean < least for mean in means)} cells of {method}"]
            if min(means) < least
            else []
        )
        for axis, (column, title) in zip(row, shown, strict=True):
            _draw_map(axis, rows, (a, b), column, title, span, numbered)
            axis.set_title(
                labels([method])[0][method] if len(methods) > 1 or len(shown) == 1 else ""
            )
    names, in_full = labels(methods)
    if len(methods) == 1 and len(shown) > 1:
        figure.suptitle(names[methods[0]], fontsize=11)
    return figure, sentences(
        "Mean over seeds; empty cells were not run.",
        how_to_read(shown),
        "Framed: best on validation." if validated(both) else "",
        left_out,
        unfit,
        fixed_settings_note(fixed, methods),
        f"Below the scale of colours: {joined(dark)}." if dark else "",
        in_full,
    )


def _grids(table: pd.DataFrame, a: str, b: str) -> tuple[list[str], str]:
    """The methods that were run over a grid of both keys, and the caption's sentence about those whose grid does not
    fit a map. **Raises:** Unfit without any."""
    methods, unfit, large = [], [], 0
    for method, rows in table.groupby("method", sort=False):
        x, y = rows[a].nunique(), rows[b].nunique()
        if min(x, y) < 2:
            continue
        if 2 * len(rows) < x * y:
            unfit.append(f"{method} ({len(rows)} of {x * y} cells)")
        elif max(x, y) > MAX_COLUMNS:
            unfit.append(f"{method} ({x * y} cells)")
            large = max(large, x, y)
        else:
            methods.append(str(method))
    if not methods and large:
        raise FigureNotApplicable(f"a grid of {large} values is too large for a heat map")
    if not methods:
        raise FigureNotApplicable("no method was run over a grid of both")
    return methods, f"Without {joined(unfit)}." if unfit else ""


def _draw_map(
    axis: Any,
    rows: pd.DataFrame,
    keys: tuple[str, str],
    column: str,
    title: str,
    span: Limits,
    numbered: bool,
) -> None:
    a, b = keys
    cells = 100 * rows.pivot_table(index=a, columns=b, values=column, aggfunc="mean").astype(float)
    cells = cells.sort_index()
    edge = {"edgecolors": "white", "linewidth": 1} if numbered else {}
    mesh = axis.pcolormesh(cells.to_numpy(), cmap="cividis", vmin=span.low, vmax=span.high, **edge)
    below = "min" if cells.min().min() < span.low else "neither"
    axis.figure.colorbar(mesh, ax=axis, label=title, extend=below)
    axis.grid(visible=False)
    axis.set_xticks(*_ticks(cells.columns))
    axis.set_yticks(*_ticks(cells.index))
    axis.set(xlabel=short(b), ylabel=short(a))
    if numbered:
        _write_numbers(axis, cells, span)
    if validated(rows):
        best = rows.sort_values("val_accuracy", ascending=False, kind="stable").iloc[0]
        _frame(axis, list(cells.columns).index(best[b]), list(cells.index).index(best[a]))


def _ticks(values: "pd.Index[Any]") -> tuple[list[float], list[str]]:
    """(positions, labels) of the values whose labels have room."""
    step = -(-len(values) // MAX_NUMBERED_CELLS)
    return [i + 0.5 for i in range(0, len(values), step)], [
        f"{value:.4g}" for value in values[::step]
    ]


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
