"""Accuracy over swept numbers: validation, on which they are chosen, and test beside it."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from kd.figures.limits import CARET_DOWN, Limits, arms, beyond, limits, lowest_sound, padded, percent
from kd.figures.selection import (
    NO_VALIDATION,
    Unfit,
    best_methods,
    contexts,
    done_runs,
    half_widths,
    method_looks,
    panels,
    ranked,
    validated,
)
from kd.figures.style import brief, canvas, handle, labels, legend, sentences, short
from kd.table import Tables

MOST = 8  # methods whose lines can be told apart
MAPS = 3  # methods with heat maps of their own
NUMBERED = 12  # values of a key up to which a heat map has numbers
WIDEST = 40  # values of a key that a heat map can hold
NAMED = 6  # values outside the axis that are written at its edge


# ---- one number


def response(tables: Tables, key: str) -> tuple[Any, str]:
    """Draw accuracy over the values of one swept number, a line for each method."""
    done = done_runs(tables)
    held, fixed = hold(tables.summary, tables.swept, [key])
    held = held[held[key].notna()]
    varied = [str(name) for name, rows in held.groupby("method", sort=False) if rows[key].nunique() > 1]
    if not varied:
        return _scatter(tables, key)
    methods, note = best_methods(held, varied, MOST)
    held = held[held["method"].isin(methods)]
    plain = _standard(tables.summary, held) if "standard" not in methods else None
    shown = panels(held)
    halves = {column: half_widths(done, column) for column, _ in shown}
    means, widths = [], []
    for column, _ in shown:
        means += list(100 * held[column].astype(float))
        widths += [halves[column].get(setting, math.nan) for setting in held["setting"]]
    reference = [] if plain is None else [100 * plain[column] for column, _ in shown]
    span = limits(means, widths, reference)
    figure, axes = canvas(4.4 * len(shown) + 1.0, 3.8, len(shown), sharey=True)
    looks = method_looks(tables)
    outside = []
    for axis, (column, title) in zip(axes[0], shown, strict=True):
        for method in methods:
            rows = held[held["method"] == method].sort_values(key)
            outside += _draw_line(axis, rows, key, column, halves[column], looks[method], span)
        if plain is not None:
            axis.axhline(span.nearest(100 * plain[column]), color="0.2", ls=":", lw=1.4)
        _set_values(axis, key, held[key])
        axis.set(ylabel=title, ylim=span)
        axis.yaxis.set_tick_params(labelleft=True)
    names, in_full = labels(methods)
    entries = {names[method]: handle(**looks[method]) for method in methods}
    if plain is not None:
        entries["standard"] = handle(color="0.2", ls=":", lw=1.4)
    legend(figure, entries)
    return figure, sentences(
        f"Mean over seeds with its 95 % interval ({_seeds(held['n'])}).",
        _how(shown),
        note,
        _held_in_words(fixed, methods),
        beyond(outside),
        in_full,
    )


def _draw_line(
    axis: Any,
    rows: pd.DataFrame,
    key: str,
    column: str,
    halves: Mapping[str, float],
    look: Mapping[str, Any],
    span: Limits,
) -> list[str]:
    """Draw a method's line; at the edge an arrow for each mean that lies outside. **Returns:** those in words."""
    rows = rows[rows[column].notna()]
    xs = list(rows[key].astype(float))
    means = list(100 * rows[column].astype(float))
    axis.plot(xs, means, **look, ms=6, lw=1.5, zorder=3)
    measured = [halves.get(setting, math.nan) for setting in rows["setting"]]
    bars = [(x, mean, half) for x, mean, half in zip(xs, means, measured, strict=True) if math.isfinite(half)]
    if bars:
        at, middles, widths = zip(*bars, strict=True)
        bar = {"fmt": "none", "ecolor": look["color"], "elinewidth": 1.2, "capsize": 3}
        axis.errorbar(at, middles, yerr=arms(middles, widths), **bar)
    words: list[str] = []
    for x, mean in zip(xs, means, strict=True):
        if span.holds(mean):
            continue
        axis.plot(x, span.low, marker=CARET_DOWN, color=look["color"], ms=9, ls="", zorder=4, clip_on=False)
        if len(words) < NAMED:
            axis.annotate(f"{mean:.1f}", (x, span.low), (0, 10), textcoords="offset points", ha="center", fontsize=8)
        words.append(f"{rows['method'].iloc[0]} at {short(key)} = {x:g} ({column.split('_')[0]} {percent(mean)})")
    return words


def _standard(summary: pd.DataFrame, held: pd.DataFrame) -> "pd.Series[Any] | None":
    """The chosen `standard` of the student and data that all these rows share, if there is one."""
    plain = summary[(summary["method"] == "standard") & summary["chosen"]]
    if contexts(held).nunique() == 1:
        plain = plain[contexts(plain) == contexts(held).iloc[0]]
    return plain.iloc[0] if len(plain) == 1 else None


def _scatter(tables: Tables, key: str) -> tuple[Any, str]:
    """Draw every setting as a dot: a search leaves no two runs that differ in one number alone."""
    table = tables.summary[tables.summary[key].notna()]
    methods, note = best_methods(table, list(dict.fromkeys(table["method"])), MOST)
    table = table[table["method"].isin(methods)]
    shown = panels(table)
    span = limits([value for column, _ in shown for value in 100 * table[column].astype(float)])
    figure, axes = canvas(4.4 * len(shown) + 1.0, 3.8, len(shown), sharey=True)
    looks = method_looks(tables)
    outside: list[str] = []
    for axis, (column, title) in zip(axes[0], shown, strict=True):
        for method in methods:
            rows = table[table["method"] == method]
            outside += _draw_dots(axis, rows, key, column, looks[method], span)
        _set_values(axis, key, table[key])
        axis.set(ylabel=title, ylim=span)
        axis.yaxis.set_tick_params(labelleft=True)
    names, in_full = labels(methods)
    entries = {names[method]: handle(**(looks[method] | {"ls": ""})) for method in methods}
    if table["chosen"].any():
        entries["chosen on validation"] = handle(color="0.1", marker="o", mfc="none", ms=11, ls="")
    legend(figure, entries)
    return figure, sentences(
        "Every setting that was tried; the other numbers differ from dot to dot.",
        _how(shown),
        note,
        beyond(outside),
        in_full,
    )


def _draw_dots(
    axis: Any, rows: pd.DataFrame, key: str, column: str, look: Mapping[str, Any], span: Limits
) -> list[str]:
    rows = rows[rows[column].notna()]
    words = []
    for chosen, x, mean in zip(rows["chosen"], rows[key].astype(float), 100 * rows[column].astype(float), strict=True):
        inside = span.holds(mean)
        marker = look["marker"] if inside else CARET_DOWN
        axis.plot(x, span.nearest(mean), marker=marker, color=look["color"], ms=5, ls="", clip_on=False, zorder=3)
        if chosen:
            axis.plot(x, span.nearest(mean), marker="o", mfc="none", mec="0.1", ms=11, ls="", clip_on=False, zorder=4)
        if not inside:
            words.append(f"{rows['method'].iloc[0]} at {short(key)} = {x:g} ({column.split('_')[0]} {percent(mean)})")
    return words


def _set_values(axis: Any, key: str, values: "pd.Series[Any]") -> None:
    """Set the scale of the x axis, and ticks at the values themselves where their labels do not touch."""
    distinct = sorted(set(values.astype(float)))
    ticks = _apart(distinct)
    axis.set_xscale(spread(distinct))
    axis.set_xticks(ticks, [f"{value:.4g}" for value in ticks])
    axis.minorticks_off()
    axis.set_xlabel(short(key))


def spread(values: Sequence[float]) -> str:
    """The axis on which these numbers are spread most evenly: log or linear."""
    ordered = sorted(set(map(float, values)))
    if len(ordered) < 3 or ordered[0] <= 0:
        return "log" if len(ordered) == 2 and ordered[0] > 0 and ordered[1] / ordered[0] >= 8 else "linear"

    def unevenness(xs: list[float]) -> float:
        steps = [b - a for a, b in itertools.pairwise(xs)]
        return max(steps) / min(steps)

    return "log" if unevenness([math.log(x) for x in ordered]) < unevenness(ordered) else "linear"


def _apart(values: Sequence[float]) -> list[float]:
    """Those of some sorted values whose labels do not touch on the axis that `spread` gives them."""
    scale: Callable[[float], float] = math.log if spread(values) == "log" else float
    width = (scale(values[-1]) - scale(values[0])) or 1.0
    ticks: list[float] = []
    for value in values:
        if not ticks or (scale(value) - scale(ticks[-1])) / width > 0.11:
            ticks.append(value)
    return ticks


# ---- two numbers


def heat(tables: Tables, a: str, b: str) -> tuple[Any, str]:
    """Draw mean accuracy over the values of two swept numbers, a row of maps for each method that has a grid."""
    done_runs(tables)
    held, fixed = hold(tables.summary, tables.swept, [a, b])
    both = held.dropna(subset=[a, b])
    methods, note = best_methods(both, _grids(both, a, b), MAPS)
    both = both[both["method"].isin(methods)]
    shown = panels(both)
    columns = max(rows[b].nunique() for _, rows in both.groupby("method"))
    lines = [both[both["method"] == method][a].nunique() for method in methods]
    numbered = max([columns, *lines]) <= NUMBERED
    width = len(shown) * (2.2 + (0.62 * columns if numbered else 3.2))
    height = sum(1.3 + (0.42 * count if numbered else 2.6) for count in lines)
    figure, axes = canvas(max(width, 5.0), height, len(shown), len(methods), gridspec_kw={"height_ratios": lines})
    outside = []
    for row, method in zip(axes, methods, strict=True):
        rows = both[both["method"] == method]
        means = [value for column, _ in shown for value in 100 * rows[column].astype(float).dropna()]
        least = lowest_sound(means)
        span = padded(least, max(means))
        outside += [f"{method}, {sum(mean < least for mean in means)} cells"] if min(means) < least else []
        for axis, (column, title) in zip(row, shown, strict=True):
            _draw_map(axis, rows, (a, b), column, title, span, numbered)
            axis.set_title(labels([method])[0][method] if len(methods) > 1 or len(shown) == 1 else "")
    names, in_full = labels(methods)
    if len(methods) == 1 and len(shown) > 1:
        figure.suptitle(names[methods[0]], fontsize=11)
    return figure, sentences(
        "Mean over seeds; empty cells were not run.",
        _how(shown),
        "Framed: best on validation." if validated(both) else "",
        note,
        _held_in_words(fixed, methods),
        f"Darker than the scale: {'; '.join(outside)}." if outside else "",
        in_full,
    )


def _grids(table: pd.DataFrame, a: str, b: str) -> list[str]:
    """The methods that were run over a grid of both keys. **Raises:** Unfit without any."""
    methods, large = [], 0
    for method, rows in table.groupby("method", sort=False):
        x, y = rows[a].nunique(), rows[b].nunique()
        if min(x, y) < 2 or 2 * len(rows) < x * y:
            continue
        if max(x, y) > WIDEST:
            large = max(large, x, y)
        else:
            methods.append(str(method))
    if not methods and large:
        raise Unfit(f"a grid of {large} values is too large for a heat map")
    if not methods:
        raise Unfit("no method was run over a grid of both")
    return methods


def _draw_map(
    axis: Any, rows: pd.DataFrame, keys: tuple[str, str], column: str, title: str, span: Limits, numbered: bool
) -> None:
    import seaborn as sns
    from matplotlib.patches import Rectangle

    a, b = keys
    cells = 100 * rows.pivot_table(index=a, columns=b, values=column, aggfunc="mean").astype(float)
    cells = cells.sort_index(ascending=False)
    below = "min" if cells.min().min() < span.low else "neither"
    sns.heatmap(
        cells,
        annot=numbered,
        fmt=".2f",
        cmap="cividis",
        vmin=span.low,
        vmax=span.high,
        ax=axis,
        linewidths=1 if numbered else 0,
        annot_kws={"fontsize": 8},
        cbar_kws={"label": title, "extend": below},
        xticklabels=[f"{value:.4g}" for value in cells.columns] if numbered else "auto",
        yticklabels=[f"{value:.4g}" for value in cells.index] if numbered else "auto",
    )
    axis.set(xlabel=short(b), ylabel=short(a))
    axis.tick_params(axis="y", rotation=0)
    if validated(rows):
        best = rows.sort_values("val_accuracy", ascending=False, kind="stable").iloc[0]
        corner = (list(cells.columns).index(best[b]), list(cells.index).index(best[a]))
        axis.add_patch(Rectangle(corner, 1, 1, fill=False, ec="#d55e00", lw=2.5, clip_on=False))


# ---- what is held, in words


def hold(summary: pd.DataFrame, swept: Sequence[str], free: Sequence[str]) -> tuple[pd.DataFrame, dict[str, str]]:
    """Keep the rows in which every swept key but the free ones has the value that it has in its method's best setting
    by validation, or without validation images in its first.

    **Returns:** (rows, {method: the values that hold in words}).
    """
    others = [key for key in swept if key not in free and key in summary]
    parts, words = [], {}
    for method, rows in summary.groupby("method", sort=False):
        best = ranked(rows.assign(chosen=True)).iloc[0]
        fits = pd.Series(True, index=rows.index)
        for key in others:
            fits &= rows[key].isna() if pd.isna(best[key]) else rows[key] == best[key]
        parts.append(rows[fits])
        varied = [key for key in others if not pd.isna(best[key]) and rows[key].nunique() > 1]
        if varied:
            where = "best on validation" if validated(rows) else "first of the sweep"
            values = ", ".join(f"{short(key).removesuffix('.name')} = {brief(best[key])}" for key in varied)
            words[str(method)] = f"{values} ({where})"
    return pd.concat(parts), words


def _held_in_words(fixed: Mapping[str, str], methods: Sequence[str]) -> str:
    words = [f"{method}: {fixed[method]}" for method in methods if method in fixed]
    return f"Held at {'; '.join(words)}." if words else ""


def _how(shown: Sequence[tuple[str, str]]) -> str:
    if len(shown) == 1:
        return NO_VALIDATION
    return "Left: validation accuracy, by which to choose. Right: test accuracy of the same runs."


def _seeds(counts: "pd.Series[int]") -> str:
    least, most = counts.min(), counts.max()
    return f"n = {least}" if least == most else f"n = {least} to {most}"
