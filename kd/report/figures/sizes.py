"""Accuracy against the size of the students, with the Pareto front on validation accuracy."""

import math
from collections.abc import Mapping, Sequence
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
    NO_VALIDATION,
    FigureNotApplicable,
    candidates,
    done_runs,
    method_looks,
    panels,
)
from kd.report.figures.stability import (
    for_range,
    intervals,
    unstable,
    unstable_note,
    with_medians,
)
from kd.report.figures.style import canvas, handle, labels, legend, sentences
from kd.report.tables import Tables

COSTS = {"params": "parameters", "macs": "multiply-accumulates per image"}


def size(tables: Tables) -> tuple[Any, str]:
    """Draw accuracy of students and teachers against parameters and MACs, with the Pareto front.

    Returns:
        (figure, caption).

    Raises:
        FigureNotApplicable: No run has finished, or all students have the same size.
    """
    done = done_runs(tables)
    table = with_medians(candidates(tables.summary), done)
    if table["params"].nunique() < 2:
        raise FigureNotApplicable("all students have the same size")
    shown = panels(table)
    teachers = table.dropna(subset=["teacher_params", "teacher_test_accuracy"]).round(
        {"teacher_test_accuracy": 6}
    )
    teachers = teachers.drop_duplicates(["teacher", "teacher_test_accuracy"])
    ends = {column: intervals(table, done, column) for column, _ in shown}
    sound = for_range(table)
    means: list[float] = []
    known: list[Ends] = []
    for column, _ in shown:
        means.extend(100 * sound[column].astype(float))
        known.extend(ends[column][setting] for setting in sound["setting"])
    span = limits(means, known, 100 * teachers["teacher_test_accuracy"].astype(float))
    figure, axes = canvas(
        3.3 * len(shown) * len(COSTS) + 0.6, 3.6, len(shown) * len(COSTS), sharey=True
    )
    methods = list(dict.fromkeys(table["method"]))
    looks = method_looks(tables)
    front_column = shown[0][0]  # validation accuracy, if there is any
    for number, axis in enumerate(axes[0]):
        column, title = shown[number // len(COSTS)]
        cost = list(COSTS)[number % len(COSTS)]
        for method in methods:
            rows = table[(table["method"] == method) & (table[cost] > 0)]
            _draw_points(axis, rows, cost, column, ends[column], looks[method], span)
        if column == "test_accuracy":
            _draw_teachers(axis, teachers, cost, span)
        for rows in _by_data(tables, table):
            best = front(rows[~unstable(rows)], cost, front_column)
            axis.plot(best[cost], 100 * best[column], color="0.5", lw=1, ls="--", zorder=1)
        axis.set(xscale="log", xlabel=COSTS[cost], ylabel=title, ylim=span)
        axis.yaxis.set_tick_params(labelleft=True)
    names, full_names = labels(methods)
    entries = {names[method]: handle(**(looks[method] | {"ls": ""})) for method in methods}
    if len(teachers):
        entries["teacher"] = handle(color="0.15", marker="*", ms=10, ls="")
    entries["Pareto front"] = handle(color="0.5", ls="--", lw=1)
    legend(figure, entries)
    subject = "Chosen settings" if table["chosen"].all() else "Settings"
    if len(shown) > 1:
        front_note = (
            "Dashed: students that no other of the same or smaller size beats on validation; "
            "the test panels connect the same students."
        )
    else:
        front_note = (
            f"{NO_VALIDATION} Dashed: students that no other of the same or smaller size beats."
        )
    return figure, sentences(
        f"{subject} with 95 % intervals.",
        front_note,
        unstable_note(table, "hollow, not on the front"),
        beyond(_outside(table, teachers, shown, span)),
        full_names,
    )


def _by_data(tables: Tables, table: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the rows of each data set: accuracies on different images share no Pareto front."""
    keys = [
        key
        for key in (*tables.swept, "data")
        if (key == "data" or key.startswith("data.")) and key in table
    ]
    return [rows for _, rows in table.groupby(keys, dropna=False)] if keys else [table]


def _draw_points(
    axis: Any,
    rows: pd.DataFrame,
    cost: str,
    column: str,
    ends: Mapping[str, Ends],
    look: dict[str, Any],
    span: Limits,
) -> None:
    rows = rows[rows[column].notna()]
    means = 100 * rows[column].astype(float)
    inside = means.map(span.contains).astype(bool)
    costs = rows[cost]
    edges = means.map(span.nearest)
    hollow = unstable(rows)
    point = {"marker": look["marker"], "color": look["color"], "ms": 7}
    full = inside & ~hollow
    draw_points(axis, costs[full], means[full], **point)
    draw_points(axis, costs[inside & hollow], means[inside & hollow], mfc="white", **point)
    for marker, beyond_edge in ((CARET_DOWN, means < span.low), (CARET_UP, means > span.high)):
        caret = {"marker": marker, "color": look["color"], "ms": 9}
        draw_points(axis, costs[beyond_edge], edges[beyond_edge], **caret)
    known = [ends[setting] for setting in rows["setting"][inside]]
    draw_bars(axis, costs[inside], means[inside], known, look["color"])


def _draw_teachers(axis: Any, teachers: pd.DataFrame, cost: str, span: Limits) -> None:
    for _, row in teachers.iterrows():
        value = 100 * row["teacher_test_accuracy"]
        marker = "*" if span.contains(value) else CARET_DOWN if value < span.low else CARET_UP
        x = row[f"teacher_{cost}"]
        axis.plot(
            x,
            span.nearest(value),
            marker=marker,
            color="0.15",
            ms=10,
            ls="",
            zorder=3,
            clip_on=False,
        )


def _outside(
    table: pd.DataFrame, teachers: pd.DataFrame, shown: Sequence[tuple[str, str]], span: Limits
) -> Outside:
    outside: Outside = {}
    for column, _ in shown:
        for setting, mean in zip(table["setting"], 100 * table[column].astype(float), strict=True):
            if math.isfinite(mean) and not span.contains(mean):
                note(outside, setting, column, mean)
    for name, value in zip(
        teachers["teacher"], 100 * teachers["teacher_test_accuracy"], strict=True
    ):
        if not span.contains(value):
            note(outside, f"teacher {name}", "test_accuracy", value)
    return outside


def front(table: pd.DataFrame, cost: str, column: str) -> pd.DataFrame:
    """Return the rows on the Pareto front of cost (less is better) and a column, by rising cost."""
    known = table[table[column].notna() & (table[cost] > 0)]
    points = list(zip(known[cost], known[column], strict=True))
    on_front = pd.Series(points, index=known.index, dtype=object).isin(pareto(points))
    return known[on_front].drop_duplicates([cost, column]).sort_values(cost)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the (cost, value) points on the Pareto front, by rising cost.

    Lower costs and higher values are better.
    """
    best: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or value > best[-1][1]:
            best.append((cost, value))
    return best
