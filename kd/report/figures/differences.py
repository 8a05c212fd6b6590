"""Differences in test accuracy from the baseline, with the intervals that the verdicts rest on."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from kd.report.figures.limits import (
    NO_INTERVAL,
    Ends,
    Limits,
    Outside,
    beyond,
    draw_far,
    draw_interval,
    draw_seeds,
    finite,
    lowest_sound,
    with_intervals,
    with_near,
)
from kd.report.figures.selection import FigureNotApplicable, done_runs, method_looks, select
from kd.report.figures.stability import count_label, unstable_seeds
from kd.report.figures.style import (
    CHARACTER,
    canvas,
    clean,
    columns_of,
    handle,
    labels,
    legend,
    listed,
    literal,
    sentences,
    shorten,
)
from kd.report.summary import with_seed_names
from kd.report.tables import Tables

MAX_SETTINGS = 14  # rows that fit into the figure
DECISION_COLUMNS = 10  # width of the longest decision, in columns of text
BAND = "#d9e4ef"  # colour of the margin


def differences(tables: Tables) -> tuple[Any, str]:
    """Draw the difference of each chosen setting from its baseline, with its decision.

    Returns:
        (figure, caption).

    Raises:
        FigureNotApplicable: No run has finished, or no chosen setting has a baseline.
    """
    done = done_runs(tables)
    selection = select(_compared(tables.summary), MAX_SETTINGS)
    rows = selection.rows.reset_index(drop=True)
    seeds = _seed_differences(rows, done)
    margin = 100 * tables.margin
    span = _limits(rows, seeds, margin)
    names, full_names = labels(rows["setting"])
    ticks = [f"{names[row['setting']]}  ({_count(row)})" for _, row in rows.iterrows()]
    columns = max(map(columns_of, ticks)) + DECISION_COLUMNS
    figure, axes = canvas(4.4 + CHARACTER * columns, 1.3 + 0.34 * len(rows))
    axis = axes[0][0]
    axis.axvspan(-margin, margin, color=BAND, lw=0, zorder=0)
    axis.axvline(0, color="0.2", lw=1.2, zorder=1)
    looks = method_looks(tables)
    outside: Outside = {}
    for position, (_, row) in enumerate(rows.iterrows()):
        draw_seeds(axis, position, seeds[row["setting"]], span)
        if _has_mean(row):
            _draw_mean(axis, position, row, looks[row["method"]], span, outside)
        _write_decision(axis, position, row)
    axis.set_yticks(range(len(rows)), ticks)
    axis.set(xlim=span, ylim=(len(rows) - 0.5, -0.5))
    axis.set_xlabel("test accuracy, difference from the baseline, points")
    legend(figure, _entries(rows, margin))
    return figure, sentences(
        _interval_note(rows),
        "Grey dots are seeds.",
        _unstable_note(rows),
        _fewer_seeds_note(rows, seeds),
        selection.note,
        beyond(outside),
        full_names,
    )


def _compared(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the chosen settings that have a baseline.

    Raises:
        FigureNotApplicable: There are none.
    """
    if "baseline" not in summary or not summary["baseline"].notna().any():
        raise FigureNotApplicable("no setting has a baseline to be compared with")
    rows = summary[summary["baseline"].notna() & summary["chosen"]]
    if rows.empty:
        raise FigureNotApplicable("no setting that has a baseline was chosen on validation")
    return rows


def _seed_differences(rows: pd.DataFrame, done: pd.DataFrame) -> dict[str, list[float]]:
    """Return {setting: differences from its baseline, in points, of the seeds that both have}."""
    accuracy = done.assign(seed_name=with_seed_names(done)).pivot_table(
        index="seed_name", columns="setting", values="test_accuracy"
    )
    return {
        setting: list(100 * (accuracy[setting] - accuracy[baseline]).dropna())
        for setting, baseline in zip(rows["setting"], rows["baseline"], strict=True)
    }


# ---- rows


def _is_unstable(row: "pd.Series[Any]") -> bool:
    """Return whether the setting or its baseline is unstable."""
    return row["decision"] == "unstable" or unstable_seeds(row) > 0


def _count(row: "pd.Series[Any]") -> str:
    """Return the number of seeds for the row's label, or what is unstable."""
    if _is_unstable(row) and not unstable_seeds(row):
        return "baseline unstable"
    return count_label(row, "seeds")


def _has_mean(row: "pd.Series[Any]") -> bool:
    return not _is_unstable(row) and math.isfinite(row["difference"])


def _interval(row: "pd.Series[Any]") -> Ends:
    """Return the ends of the interval that the verdict is read off, in points.

    With too few seeds for a verdict, there is none.
    """
    half = row["difference_ci95"]
    if row["decision"] == "too few" or not _has_mean(row) or not math.isfinite(half):
        return NO_INTERVAL
    return 100 * (row["difference"] - half), 100 * (row["difference"] + half)


# ---- axis


def _limits(rows: pd.DataFrame, seeds: Mapping[str, Sequence[float]], margin: float) -> Limits:
    """Return the limits of the axis: they cover 0, the margin and the intervals of stable rows.

    Means far below all others do not count, nor do intervals much wider than most. Seeds of stable
    rows count if they leave at least a third of the axis to the intervals.
    """
    stable = rows[[_has_mean(row) for _, row in rows.iterrows()]]
    means = 100 * stable["difference"]
    # `lowest_sound` is made for accuracies: the baselines become 100
    is_sound = 100 + means >= lowest_sound([100.0, *(100 + means)])
    sound = stable[is_sound]
    values = [-margin, margin, *means[is_sound]]
    ends = [_interval(row) for _, row in sound.iterrows()]
    low, high = with_intervals(min(values), max(values), ends)
    near = [value for name in sound["setting"] for value in seeds[name]]
    low, high = with_near(low, high, near, 1.0)
    room = max(0.06 * (high - low), 0.1)
    return Limits(low - room, high + room)


def _draw_mean(
    axis: Any,
    position: int,
    row: "pd.Series[Any]",
    look: Mapping[str, Any],
    span: Limits,
    outside: Outside,
) -> None:
    """Draw a mean with its interval, or an arrow and its value if it is outside the axis."""
    mean = 100 * row["difference"]
    low, high = _interval(row)
    colour = look["color"]
    if not span.contains(mean):
        text = f"{mean:+.2f}"
        outside.setdefault(row["setting"], []).append(f"{text} points")
        if finite([low, high]):
            text += f" ({low:+.2f} to {high:+.2f})"
        draw_far(axis, mean, position, text.replace("-", "−"), colour, span)
        return
    narrow = 100 * row.get("difference_ci90", math.nan)
    if math.isfinite(low) and math.isfinite(narrow):  # equality is read off this one
        ends = mean - narrow, mean + narrow
        axis.hlines(position, *ends, colors=colour, lw=8, alpha=0.35, zorder=2)
    draw_interval(axis, mean, position, (low, high), colour, span)
    axis.plot(mean, position, marker=look["marker"], color=colour, ms=8, ls="", zorder=4)


def _write_decision(axis: Any, position: int, row: "pd.Series[Any]") -> None:
    """Write the decision to the right of the row."""
    decision = "unstable" if _is_unstable(row) else row["decision"]
    if isinstance(decision, str):
        axis.annotate(
            decision,
            (1.0, position),
            (12, 0),
            xycoords=axis.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            annotation_clip=False,
        )


def _entries(rows: pd.DataFrame, margin: float) -> dict[str, Any]:
    """Return {legend label: handle}."""
    from matplotlib.patches import Patch

    baselines = list(dict.fromkeys(rows["baseline"]))
    name = f": {shorten(clean(baselines[0]), 30)}" if len(baselines) == 1 else " of the row"
    return {
        literal(f"baseline{name}"): handle(color="0.2", lw=1.2),
        f"equal within ± {margin:g} points": Patch(color=BAND, lw=0),
    }


# ---- caption


def _interval_note(rows: pd.DataFrame) -> str:
    """Return the sentences about what the intervals are, and how a verdict is read off them."""
    over_teachers = rows["setting"][rows["unit"] == "teachers"] if "unit" in rows else ()
    several = rows["teacher"].nunique() > 1 or ("teachers" in rows and rows["teachers"].max() > 1)
    teacher = "these teachers" if several else "this teacher"
    exceptions = f" (over teachers: {listed(over_teachers)})" if len(over_teachers) else ""
    decisions = set(rows["decision"])
    return sentences(
        f"Mean with simultaneous 95 % intervals over seeds, with {teacher}{exceptions} and on "
        "these test images: an interval that excludes 0 is a verdict of better or worse; "
        "the band is the margin.",
        "The thick part is the row's own 90 % interval: equal means that it lies within the band.",
        "Too few: no interval for fewer than three seeds." if "too few" in decisions else "",
    )


def _unstable_note(rows: pd.DataFrame) -> str:
    if not any(_is_unstable(row) for _, row in rows.iterrows()):
        return ""
    return "Unstable settings: seeds only; they do not set the range of the axis."


def _fewer_seeds_note(rows: pd.DataFrame, seeds: Mapping[str, Sequence[float]]) -> str:
    """Return the sentence about means over fewer seeds than are drawn, as for fresh seeds."""
    fewer = [
        f"{shorten(clean(row['setting']))} ({row['seeds']} of {len(seeds[row['setting']])})"
        for _, row in rows.iterrows()
        if _has_mean(row)
        and row.get("unit") != "teachers"
        and row["decision"] != "too few"
        and row["seeds"] < len(seeds[row["setting"]])
    ]
    return f"Verdict on fewer seeds than are drawn: {', '.join(fewer)}." if fewer else ""
