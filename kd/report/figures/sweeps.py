"""Accuracy over one swept number: validation, on which it is chosen, and test beside it."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from kd.report.figures.limits import (
    CARET_DOWN,
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
    half_widths,
    how_to_read,
    method_looks,
    panels,
)
from kd.report.figures.style import canvas, handle, labels, legend, listed, sentences, short
from kd.report.tables import Tables

MAX_SETTINGS = 8  # methods whose lines can be told apart
MAX_TICKS = 24  # values of a key up to which they are the axis's ticks
MAX_NAMED = 6  # values outside the axis that are written at its edge


def response(tables: Tables, key: str) -> tuple[Any, str]:
    """Draw accuracy over the values of one swept number, a line for each method."""
    done = done_runs(tables)
    held, fixed = fix_other_settings(tables.summary, tables.swept, [key])
    held = held[held[key].notna()]
    varied = [
        str(name) for name, rows in held.groupby("method", sort=False) if rows[key].nunique() > 1
    ]
    if not varied:
        return _scatter(tables, key)
    methods, left_out = best_methods(held, varied, MAX_SETTINGS)
    single = _with_one_value(held, varied, key)
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
    outside: Outside = {}
    for axis, (column, title) in zip(axes[0], shown, strict=True):
        for method in methods:
            rows = held[held["method"] == method].sort_values(key)
            _draw_line(axis, rows, key, column, halves[column], looks[method], span, outside)
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
        how_to_read(shown),
        left_out,
        fixed_settings_note(fixed, methods),
        single,
        beyond(outside),
        in_full,
    )


def _with_one_value(held: pd.DataFrame, varied: Sequence[str], key: str) -> str:
    """The caption's sentence about the methods that have the key and no two values of it at what is held."""
    single = [name for name in dict.fromkeys(held["method"]) if name not in varied]
    return f"Without {listed(single)}: one value of {short(key)} at what is held." if single else ""


def _draw_line(
    axis: Any,
    rows: pd.DataFrame,
    key: str,
    column: str,
    halves: Mapping[str, float],
    look: Mapping[str, Any],
    span: Limits,
    outside: Outside,
) -> None:
    """Draw a method's line; at the edge an arrow for each mean that lies outside, which `outside` is told of."""
    rows = rows[rows[column].notna()]
    xs = list(rows[key].astype(float))
    means = list(100 * rows[column].astype(float))
    axis.plot(xs, means, **look, ms=6, lw=1.5, zorder=3)
    draw_bars(
        axis,
        xs,
        means,
        [halves.get(setting, math.nan) for setting in rows["setting"]],
        look["color"],
    )
    away = [(x, mean) for x, mean in zip(xs, means, strict=True) if not span.contains(mean)]
    for number, (x, mean) in enumerate(away):
        axis.plot(
            x,
            span.low,
            marker=CARET_DOWN,
            color=look["color"],
            ms=9,
            ls="",
            zorder=4,
            clip_on=False,
        )
        if number < MAX_NAMED:
            axis.annotate(
                f"{mean:.1f}",
                (x, span.low),
                (0, 10),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        note(outside, f"{rows['method'].iloc[0]} at {short(key)} = {x:.4g}", column, mean)


def _standard(summary: pd.DataFrame, held: pd.DataFrame) -> "pd.Series[Any] | None":
    """The chosen `standard` of the student and data that all these rows share, if there is one."""
    plain = summary[(summary["method"] == "standard") & summary["chosen"]]
    if contexts(held).nunique() == 1:
        plain = plain[contexts(plain) == contexts(held).iloc[0]]
    return plain.iloc[0] if len(plain) == 1 else None


def _scatter(tables: Tables, key: str) -> tuple[Any, str]:
    """Draw every setting as a dot: a search leaves no two runs that differ in one number alone."""
    table = tables.summary[tables.summary[key].notna()]
    methods, left_out = best_methods(table, list(dict.fromkeys(table["method"])), MAX_SETTINGS)
    table = table[table["method"].isin(methods)]
    shown = panels(table)
    span = limits([value for column, _ in shown for value in 100 * table[column].astype(float)])
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
    names, in_full = labels(methods)
    entries = {names[method]: handle(**(looks[method] | {"ls": ""})) for method in methods}
    if table["chosen"].any():
        entries["chosen on validation"] = handle(color="0.1", marker="o", mfc="none", ms=11, ls="")
    legend(figure, entries)
    return figure, sentences(
        "Every setting that was tried; the other numbers differ from dot to dot.",
        how_to_read(shown),
        left_out,
        beyond(outside),
        in_full,
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
    xs, means = rows[key].astype(float), 100 * rows[column].astype(float)
    edges = means.map(span.nearest)
    inside = edges == means
    draw_points(axis, xs[inside], means[inside], marker=look["marker"], color=look["color"], ms=5)
    draw_points(axis, xs[~inside], edges[~inside], marker=CARET_DOWN, color=look["color"], ms=5)
    chosen = rows["chosen"]
    draw_points(
        axis, xs[chosen], edges[chosen], marker="o", mfc="none", color="0.1", ms=11, zorder=4
    )
    for x, mean in zip(xs[~inside], means[~inside], strict=True):
        note(outside, f"{rows['method'].iloc[0]} at {short(key)} = {x:.4g}", column, mean)


def _set_values(axis: Any, key: str, values: "pd.Series[Any]") -> None:
    """Set the scale of the x axis, and ticks at the values themselves where their labels do not touch."""
    distinct = sorted(set(values.astype(float)))
    axis.set_xscale(spread(distinct))
    if len(distinct) <= MAX_TICKS:
        ticks = _apart(distinct)
        axis.set_xticks(ticks, [f"{value:.4g}" for value in ticks])
        axis.minorticks_off()
    axis.set_xlabel(short(key))


def spread(values: Sequence[float]) -> str:
    """The axis on which these numbers are spread most evenly: log or linear."""
    ordered = sorted(set(map(float, values)))
    if len(ordered) < 3 or ordered[0] <= 0:
        return (
            "log"
            if len(ordered) == 2 and ordered[0] > 0 and ordered[1] / ordered[0] >= 8
            else "linear"
        )

    def unevenness(xs: list[float]) -> float:
        steps = [b - a for a, b in itertools.pairwise(xs)]
        return max(steps) / max(min(steps), 1e-300)

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


def _seeds(counts: "pd.Series[int]") -> str:
    least, most = counts.min(), counts.max()
    return f"n = {least}" if least == most else f"n = {least} to {most}"
