"""Accuracy over one swept numeric key: validation accuracy to the left of test accuracy."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from kd.report.figures.limits import (
    CARET_DOWN,
    CARET_UP,
    Ends,
    Limits,
    Outside,
    beyond,
    draw_bars,
    draw_points,
    limits,
    note,
)
from kd.report.figures.selection import (
    best_methods,
    contexts,
    done_runs,
    fix_other_settings,
    fixed_settings_note,
    how_to_read,
    method_looks,
    panels,
)
from kd.report.figures.stability import (
    for_range,
    intervals,
    unstable,
    unstable_note,
    unstable_seeds,
    with_medians,
)
from kd.report.figures.style import canvas, handle, labels, legend, listed, sentences, short
from kd.report.tables import Tables

MAX_SETTINGS = 8  # methods whose lines a reader can distinguish
MAX_TICKS = 24  # values of a key up to which each may have a tick
MAX_NAMED = 6  # values of a line outside the axis that are written at its edge


def response(tables: Tables, key: str) -> tuple[Any, str]:
    """Draw accuracy over the values of one swept numeric key, with a line for each method.

    If no method has two values of the key at fixed values of the others, every setting is a dot.

    Returns:
        (figure, caption).

    Raises:
        FigureNotApplicable: No run has finished.
    """
    done = done_runs(tables)
    table, fixed = fix_other_settings(tables.summary, tables.swept, [key])
    table = table[table[key].notna()]
    varied = [
        str(name) for name, rows in table.groupby("method", sort=False) if rows[key].nunique() > 1
    ]
    if not varied:
        return _scatter(tables, key, done)
    methods, left_out = best_methods(table, varied, MAX_SETTINGS)
    single = _single_value_note(table, varied, key)
    table = table[table["method"].isin(methods)]
    summary = with_medians(tables.summary, done)
    baseline = _standard(summary, table) if "standard" not in methods else None
    shown = panels(table)
    table = with_medians(table, done)
    ends = {column: intervals(table, done, column) for column, _ in shown}
    sound = for_range(table)
    means: list[float] = []
    known: list[Ends] = []
    for column, _ in shown:
        means.extend(100 * sound[column].astype(float))
        known.extend(ends[column][setting] for setting in sound["setting"])
    baselines = []
    if baseline is not None and not unstable_seeds(baseline):
        baselines = [100 * baseline[column] for column, _ in shown]
    span = limits(means, known, baselines)
    figure, axes = canvas(4.4 * len(shown) + 1.0, 3.8, len(shown), sharey=True)
    looks = method_looks(tables)
    outside: Outside = {}
    for axis, (column, title) in zip(axes[0], shown, strict=True):
        for method in methods:
            rows = table[table["method"] == method].sort_values(key)
            _draw_line(axis, rows, key, column, ends[column], looks[method], span, outside)
        if baseline is not None:
            axis.axhline(span.nearest(100 * baseline[column]), color="0.2", ls=":", lw=1.4)
        _set_values(axis, key, table[key])
        axis.set(ylabel=title, ylim=span)
        axis.yaxis.set_tick_params(labelleft=True)
    names, full_names = labels(methods)
    entries = {names[method]: handle(**looks[method]) for method in methods}
    if baseline is not None:
        label = "standard (unstable)" if unstable_seeds(baseline) else "standard"
        entries[label] = handle(color="0.2", ls=":", lw=1.4)
    legend(figure, entries)
    return figure, sentences(
        f"Mean over seeds with its 95 % interval ({_seeds(table['n'])}).",
        how_to_read(shown),
        unstable_note(table, "hollow"),
        left_out,
        fixed_settings_note(fixed, methods),
        single,
        beyond(outside),
        full_names,
    )


def _single_value_note(table: pd.DataFrame, varied: Sequence[str], key: str) -> str:
    """Return the caption's sentence about methods with only one value of the key, or ""."""
    single = [name for name in dict.fromkeys(table["method"]) if name not in varied]
    if not single:
        return ""
    reason = f"only one value of {short(key)} at the fixed values of the other keys"
    return f"Not drawn: {listed(single)} ({reason})."


def _draw_line(
    axis: Any,
    rows: pd.DataFrame,
    key: str,
    column: str,
    ends: Mapping[str, Ends],
    look: Mapping[str, Any],
    span: Limits,
    outside: Outside,
) -> None:
    """Draw the line of a method, and an arrow at the edge for each mean outside the axis.

    The means outside the axis are added to `outside`.
    """
    rows = rows[rows[column].notna()]
    xs = list(rows[key].astype(float))
    means = list(100 * rows[column].astype(float))
    axis.plot(xs, means, **look, ms=6, lw=1.5, zorder=3)
    draw_bars(axis, xs, means, [ends[setting] for setting in rows["setting"]], look["color"])
    shaky = zip(xs, means, unstable(rows), strict=True)
    hollow = [(x, mean) for x, mean, bad in shaky if bad and span.contains(mean)]
    point = {"marker": look["marker"], "color": look["color"], "mfc": "white", "ms": 6, "zorder": 4}
    draw_points(axis, [x for x, _ in hollow], [mean for _, mean in hollow], **point)
    points = zip(xs, means, strict=True)
    outside_points = [(x, mean) for x, mean in points if not span.contains(mean)]
    for number, (x, mean) in enumerate(outside_points):
        below = mean < span.low
        edge = span.nearest(mean)
        caret = {"marker": CARET_DOWN if below else CARET_UP, "color": look["color"], "ms": 9}
        draw_points(axis, [x], [edge], **caret, zorder=4)
        if number < MAX_NAMED:
            axis.annotate(
                f"{mean:.1f}",
                (x, edge),
                (0, 10 if below else -10),
                textcoords="offset points",
                ha="center",
                va="bottom" if below else "top",
                fontsize=8,
            )
        note(outside, f"{rows['method'].iloc[0]} at {short(key)} = {x:.4g}", column, mean)


def _standard(summary: pd.DataFrame, table: pd.DataFrame) -> "pd.Series[Any] | None":
    """Return the chosen `standard` for the student and data of these rows, if there is only one."""
    chosen = summary[(summary["method"] == "standard") & summary["chosen"]]
    if contexts(table).nunique() == 1:
        chosen = chosen[contexts(chosen) == contexts(table).iloc[0]]
    return chosen.iloc[0] if len(chosen) == 1 else None


def _scatter(tables: Tables, key: str, done: pd.DataFrame) -> tuple[Any, str]:
    """Draw every setting as a dot.

    This is for random and Bayesian searches, in which no two runs differ in only one key.
    """
    table = tables.summary[tables.summary[key].notna()]
    methods, left_out = best_methods(table, list(dict.fromkeys(table["method"])), MAX_SETTINGS)
    table = table[table["method"].isin(methods)]
    shown = panels(table)
    table = with_medians(table, done)
    sound = for_range(table)
    means: list[float] = []
    for column, _ in shown:
        means.extend(100 * sound[column].astype(float))
    span = limits(means)
    figure, axes = canvas(4.4 * len(shown) + 1.0, 3.8, len(shown), sharey=True)
    looks = method_looks(tables)
    outside: Outside = {}
    for axis, (column, title) in zip(axes[0], shown, strict=True):
        for method in methods:
            rows = table[table["method"] == method]
            _draw_dots(axis, rows, key, column, looks[method], span, outside)
        _set_values(axis, key, table[key])
        axis.set(ylabel=title, ylim=span)
        axis.yaxis.set_tick_params(labelleft=True)
    names, full_names = labels(methods)
    entries = {names[method]: handle(**(looks[method] | {"ls": ""})) for method in methods}
    if table["chosen"].any():
        entries["chosen on validation"] = handle(color="0.1", marker="o", mfc="none", ms=11, ls="")
    legend(figure, entries)
    return figure, sentences(
        "Each dot is one setting that was tried; the dots also differ in other swept keys.",
        how_to_read(shown),
        unstable_note(table, "hollow"),
        left_out,
        beyond(outside),
        full_names,
    )


def _draw_dots(
    axis: Any,
    rows: pd.DataFrame,
    key: str,
    column: str,
    look: Mapping[str, Any],
    span: Limits,
    outside: Outside,
) -> None:
    rows = rows[rows[column].notna()].sort_values("chosen", kind="stable")
    xs = rows[key].astype(float)
    means = 100 * rows[column].astype(float)
    edges = means.map(span.nearest)
    inside = edges == means
    hollow = unstable(rows)
    point = {"color": look["color"], "ms": 5}
    full = inside & ~hollow
    draw_points(axis, xs[full], means[full], marker=look["marker"], **point)
    hollow &= inside
    draw_points(axis, xs[hollow], means[hollow], marker=look["marker"], mfc="white", **point)
    for marker, out in ((CARET_DOWN, means < span.low), (CARET_UP, means > span.high)):
        draw_points(axis, xs[out], edges[out], marker=marker, **point)
    chosen = rows["chosen"]
    draw_points(
        axis, xs[chosen], edges[chosen], marker="o", mfc="none", color="0.1", ms=11, zorder=4
    )
    for x, mean in zip(xs[~inside], means[~inside], strict=True):
        note(outside, f"{rows['method'].iloc[0]} at {short(key)} = {x:.4g}", column, mean)


def _set_values(axis: Any, key: str, values: "pd.Series[Any]") -> None:
    """Set the scale of the x axis, and ticks at those values whose labels do not overlap."""
    distinct = sorted(set(values.astype(float)))
    axis.set_xscale(spread(distinct))
    if len(distinct) <= MAX_TICKS:
        ticks = _tick_values(distinct)
        axis.set_xticks(ticks, [f"{value:.4g}" for value in ticks])
        axis.minorticks_off()
    axis.set_xlabel(short(key))


def spread(values: Sequence[float]) -> str:
    """Return the scale on which these numbers are spread most evenly: `log` or `linear`."""
    ordered = sorted(set(map(float, values)))
    if len(ordered) < 3 or ordered[0] <= 0:
        far_pair = len(ordered) == 2 and ordered[0] > 0 and ordered[1] / ordered[0] >= 8
        return "log" if far_pair else "linear"

    def unevenness(xs: list[float]) -> float:
        steps = [b - a for a, b in itertools.pairwise(xs)]
        return max(steps) / max(min(steps), 1e-300)

    return "log" if unevenness([math.log(x) for x in ordered]) < unevenness(ordered) else "linear"


def _tick_values(values: Sequence[float]) -> list[float]:
    """Select from sorted values those whose labels do not overlap on the scale of `spread`."""
    scale: Callable[[float], float] = math.log if spread(values) == "log" else float
    width = (scale(values[-1]) - scale(values[0])) or 1.0
    ticks: list[float] = []
    for value in values:
        if not ticks or (scale(value) - scale(ticks[-1])) / width > 0.11:
            ticks.append(value)
    return ticks


def _seeds(counts: "pd.Series[int]") -> str:
    least, most = counts.min(), counts.max()
    return f"n = {least}" if least == most else f"n = {least} to {most}"
