"""Test accuracy of the settings, with confidence intervals, seeds and teachers."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from kd.report.figures.limits import (
    CARET_LEFT,
    CARET_RIGHT,
    Ends,
    Limits,
    Outside,
    beyond,
    draw_far,
    draw_interval,
    draw_seeds,
    finite,
    limits,
    percent,
)
from kd.report.figures.selection import done_runs, method_looks, select, validated
from kd.report.figures.stability import (
    count_label,
    for_range,
    intervals,
    unstable,
    unstable_seeds,
    with_medians,
)
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

    Unstable settings have their median instead, and do not affect the range of the axis.

    Returns:
        (figure, caption).

    Raises:
        FigureNotApplicable: No run has finished.
    """
    done = done_runs(tables)
    selection = select(tables.summary, MAX_SETTINGS)
    rows = with_medians(selection.rows.reset_index(drop=True), done)
    ends = intervals(rows, done, "test_accuracy")
    seeds = {name: list(100 * group["test_accuracy"]) for name, group in done.groupby("setting")}
    teachers = _teachers(rows)
    sound = for_range(rows)
    near = [value for name in sound["setting"] for value in seeds[name]]
    near.extend(value for _, value in teachers)
    span = limits(100 * sound["test_accuracy"], map(ends.__getitem__, sound["setting"]), near)
    names, full_names = labels(rows["setting"])
    ticks = [f"{names[row['setting']]}  ({count_label(row)})" for _, row in rows.iterrows()]
    figure, axes = canvas(4.4 + CHARACTER * max(map(columns_of, ticks)), 1.3 + 0.34 * len(rows))
    axis = axes[0][0]
    looks = method_looks(tables)
    for position, (_, row) in enumerate(rows.iterrows()):
        draw_seeds(axis, position, seeds[row["setting"]], span)
        _draw_mean(axis, position, row, ends[row["setting"]], looks[row["method"]], span)
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
        _unstable_note(rows),
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


def _unstable_note(rows: pd.DataFrame) -> str:
    if not unstable(rows).any():
        return ""
    return (
        "Unstable settings: median over seeds, no interval; "
        "they do not set the range of the axis. Their markers are hollow."
    )


def _draw_mean(
    axis: Any,
    position: int,
    row: "pd.Series[Any]",
    ends: Ends,
    look: dict[str, Any],
    span: Limits,
) -> None:
    """Draw a mean with its interval, and an arrow where the interval leaves the axis.

    For a mean outside the axis, draw an arrow at the edge and write the value next to it.
    """
    mean = 100 * row["test_accuracy"]
    low, high = ends
    colour = look["color"]
    if not span.contains(mean):
        text = f"{percent(mean)} ({low:.2f} to {high:.2f})" if finite(ends) else percent(mean)
        draw_far(axis, mean, position, text, colour, span)
        return
    draw_interval(axis, mean, position, ends, colour, span)
    face = colour if row["chosen"] and not unstable_seeds(row) else "white"
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
