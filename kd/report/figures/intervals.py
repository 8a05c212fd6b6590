"""Test accuracy of the settings, with confidence intervals, seeds and teachers."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from kd.report.figures.limits import (
    CARET_LEFT,
    CARET_RIGHT,
    Limits,
    Outside,
    arms,
    beyond,
    interval,
    limits,
    percent,
)
from kd.report.figures.selection import done_runs, method_looks, select, validated
from kd.report.figures.style import (
    CHARACTER,
    DASHES,
    canvas,
    columns_of,
    handle,
    labels,
    legend,
    literal,
    sentences,
    shorten,
)
from kd.report.tables import Tables

MAX_SETTINGS = 14  # rows that fit into the figure
MAX_TEACHER_LINES = 3  # teachers up to which each is a line across all rows


def accuracy(tables: Tables) -> tuple[Any, str]:
    """Draw the mean of each setting with its 95 % interval, each seed as a dot, and the teachers.

    Returns:
        (figure, caption).

    Raises:
        FigureNotApplicable: No run has finished.
    """
    done = done_runs(tables)
    selection = select(tables.summary, MAX_SETTINGS)
    rows = selection.rows.reset_index(drop=True)
    seeds = {name: list(100 * group["test_accuracy"]) for name, group in done.groupby("setting")}
    teachers = _teachers(rows)
    near: list[float] = []
    for name in rows["setting"]:
        near.extend(seeds[name])
    near.extend(value for _, value in teachers)
    span = limits(100 * rows["test_accuracy"], 100 * rows["test_accuracy_ci95"], near)
    names, full_names = labels(rows["setting"])
    ticks = [f"{names[row['setting']]}  (n = {row['n']})" for _, row in rows.iterrows()]
    figure, axes = canvas(4.4 + CHARACTER * max(map(columns_of, ticks)), 1.3 + 0.34 * len(rows))
    axis = axes[0][0]
    looks = method_looks(tables)
    for position, (_, row) in enumerate(rows.iterrows()):
        _draw_seeds(axis, position, seeds[row["setting"]], span)
        _draw_mean(axis, position, row, looks[row["method"]], span)
    axis.set_yticks(range(len(rows)), ticks)
    axis.set(xlim=span, ylim=(len(rows) - 0.5, -0.5), xlabel="test accuracy, %")
    if len(teachers) <= MAX_TEACHER_LINES:
        entries = _draw_teachers(axis, teachers, span)
    else:
        entries = _draw_own_teachers(axis, rows, span)
    legend(figure, entries)
    outside: Outside = {}
    settings = zip(rows["setting"], 100 * rows["test_accuracy"], strict=True)
    named_teachers = [(f"teacher {name}", value) for name, value in teachers]
    for name, value in [*settings, *named_teachers]:
        if not span.contains(value):
            outside.setdefault(name, []).append(percent(value))
    return figure, sentences(
        "Mean over seeds with its 95 % confidence interval (none for one seed); "
        "grey dots are seeds.",
        _hollow_note(rows),
        selection.note,
        beyond(outside),
        full_names,
    )


def _hollow_note(rows: pd.DataFrame) -> str:
    if rows["chosen"].all():
        return ""
    if validated(rows):
        return "Hollow markers: settings that were not chosen on validation."
    return (
        "Hollow markers: the method has several settings; without validation images, none of them "
        "was chosen."
    )


def _draw_seeds(axis: Any, position: int, values: Sequence[float], span: Limits) -> None:
    """Draw a dot for each seed, or an arrow at the edge for a seed outside the axis."""
    look = {"color": "0.55", "linewidths": 0, "zorder": 3, "clip_on": False}
    inside = [value for value in values if span.contains(value)]
    axis.scatter(inside, [position] * len(inside), s=16, **look)
    for value in values:
        if not span.contains(value):
            marker = CARET_LEFT if value < span.low else CARET_RIGHT
            axis.scatter([span.nearest(value)], [position], s=20, marker=marker, **look)


def _draw_caret(
    axis: Any, x: float, position: float, marker: Any, colour: str, size: float
) -> None:
    """Draw an arrow head at the edge of the axis, for a value beyond it."""
    axis.plot(x, position, marker=marker, color=colour, ms=size, ls="", zorder=3, clip_on=False)


def _draw_mean(
    axis: Any, position: int, row: "pd.Series[Any]", look: dict[str, Any], span: Limits
) -> None:
    """Draw a mean with its interval, and an arrow where the interval leaves the axis.

    For a mean outside the axis, draw an arrow at the edge and write the value next to it.
    """
    mean = 100 * row["test_accuracy"]
    half = 100 * row["test_accuracy_ci95"]
    low, high = interval(mean, half)
    colour = look["color"]
    if not span.contains(mean):
        _draw_caret(axis, span.low, position, CARET_LEFT, colour, 9)
        text = percent(mean) if pd.isna(half) else f"{percent(mean)} ({low:.2f} to {high:.2f})"
        box = {"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none"}
        axis.annotate(
            text,
            (span.low, position),
            (11, 0),
            textcoords="offset points",
            va="center",
            bbox=box,
            zorder=4,
        )
        return
    if not pd.isna(half):
        axis.errorbar(
            mean,
            position,
            xerr=arms([mean], [half]),
            fmt="none",
            ecolor=colour,
            capsize=4,
            elinewidth=2,
        )
    for end, marker in ((low, CARET_LEFT), (high, CARET_RIGHT)):
        if not span.contains(end):
            _draw_caret(axis, span.nearest(end), position, marker, colour, 7)
    face = colour if row["chosen"] else "white"
    axis.plot(
        mean,
        position,
        marker=look["marker"],
        color=colour,
        mfc=face,
        ms=8,
        ls="",
        zorder=4,
        clip_on=False,
    )


def _teachers(rows: pd.DataFrame) -> list[tuple[str, float]]:
    """Return (name, test accuracy in percent) of each teacher of these rows."""
    known = rows.dropna(subset=["teacher_test_accuracy"])[["teacher", "teacher_test_accuracy"]]
    return [
        (str(name), 100 * value)
        for name, value in known.round(6).drop_duplicates().itertuples(index=False)
    ]


def _draw_teachers(
    axis: Any, teachers: Sequence[tuple[str, float]], span: Limits
) -> dict[str, Any]:
    """Draw a line for each teacher, or an arrow at the edge for a teacher outside the axis.

    Returns:
        {legend label: handle}.
    """
    entries = {}
    for dash, (name, value) in zip(DASHES[1:], teachers, strict=False):
        label = literal(f"teacher {shorten(name, 30)}: {percent(value)}")
        if span.contains(value):
            axis.axvline(value, color="0.2", ls=dash, lw=1.4)
            entries[label] = handle(color="0.2", ls=dash, lw=1.4)
        else:
            marker = CARET_LEFT if value < span.low else CARET_RIGHT
            axis.plot(
                span.nearest(value), -0.5, marker=marker, color="0.2", ms=9, ls="", clip_on=False
            )
            entries[label] = handle(color="0.2", marker=marker, ls="", ms=9)
    return entries


def _draw_own_teachers(axis: Any, rows: pd.DataFrame, span: Limits) -> dict[str, Any]:
    """Draw each row's own teacher as a tick, or as an arrow at the edge if it is outside the axis.

    Returns:
        {legend label: handle}.
    """
    values = 100 * rows["teacher_test_accuracy"]
    for position, value in enumerate(values):
        if pd.isna(value):
            continue
        marker = "|" if span.contains(value) else CARET_LEFT if value < span.low else CARET_RIGHT
        axis.plot(
            span.nearest(value),
            position,
            marker=marker,
            color="0.1",
            ms=13,
            mew=2,
            ls="",
            clip_on=False,
        )
    tick = handle(color="0.1", marker="|", ls="", ms=13, mew=2)
    return {"teacher of the row (an arrow if outside the axis)": tick}
