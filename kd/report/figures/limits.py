"""Axes of accuracies, in percent: intervals within 0 to 100, and limits that the sound values choose."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from kd.report.figures.style import clean, joined, shorten

CARET_LEFT, CARET_RIGHT, CARET_UP, CARET_DOWN = range(
    4, 8
)  # matplotlib's markers whose tip is at the point
MIN_RANGE = 1.0  # points that an axis covers at least
FAR_FACTOR = 20.0  # points below the others at which a few values do not count for an axis

Outside = dict[str, list[str]]  # what lies outside an axis: its values


class Limits(NamedTuple):
    """The limits of an axis, in percent."""

    low: float
    high: float

    def contains(self, value: float) -> bool:
        return self.low <= value <= self.high

    def nearest(self, value: float) -> float:
        """The value, or the end of the axis beyond which it lies."""
        return min(max(value, self.low), self.high)


def finite(values: Iterable[Any]) -> list[float]:
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def interval(mean: float, half: float) -> tuple[float, float]:
    """The interval of an accuracy, bounded to what an accuracy can be. Without a half width: the mean alone."""
    if not math.isfinite(half):
        return mean, mean
    return max(0.0, mean - half), min(100.0, mean + half)


def arms(means: Sequence[float], halves: Sequence[float]) -> list[list[float]]:
    """Lengths of error bars below and above, as `errorbar` takes them."""
    pairs = [(mean, *interval(mean, half)) for mean, half in zip(means, halves, strict=True)]
    return [[mean - low for mean, low, _ in pairs], [high - mean for mean, _, high in pairs]]


def draw_points(axis: Any, xs: Iterable[float], ys: Iterable[float], **look: Any) -> None:
    """Draw markers, none of them cut in half at the limits of the axis."""
    xs, ys = list(xs), list(ys)
    if xs:  # constrained layout fails on an empty line that is not clipped
        axis.plot(xs, ys, **{"ls": "", "clip_on": False, "zorder": 3} | look)


def draw_bars(
    axis: Any, xs: Iterable[float], means: Iterable[float], halves: Iterable[float], colour: Any
) -> None:
    """Draw the intervals that are known as error bars."""
    known = [
        (x, mean, half)
        for x, mean, half in zip(xs, means, halves, strict=True)
        if math.isfinite(half)
    ]
    if known:
        at, middles, widths = zip(*known, strict=True)
        lengths = arms(middles, widths)
        axis.errorbar(
            at, middles, yerr=lengths, fmt="none", ecolor=colour, elinewidth=1.2, capsize=3
        )


def lowest_sound(values: Sequence[float]) -> float:
    """The lowest value that may choose the limits of an axis.

    Lower ones lie below a gap of at least twice the range of those above it, so that they would squeeze them into a
    corner, and either are close to each other at less than a third of the others (at chance, say), or are few (at
    most half as many as the others) and 20 points lower.
    """
    ordered = sorted(values)
    for cut in range(len(ordered) - 1, 0, -1):
        lower, upper = ordered[:cut], ordered[cut:]
        gap = upper[0] - lower[-1]
        if gap < max(2.0, 2 * (upper[-1] - upper[0])):
            continue
        collapsed = lower[-1] < upper[0] / 3 and lower[-1] - lower[0] <= gap / 2
        few = 2 * len(lower) <= len(upper) and gap >= FAR_FACTOR
        if collapsed or few:
            return upper[0]
    return ordered[0]


def limits(means: Iterable[Any], halves: Iterable[Any] = (), near: Iterable[Any] = ()) -> Limits:
    """The limits of an axis of accuracies in percent.

    They cover the sound means; intervals, but none much wider than most are; and what of `near` (teachers, baselines,
    seeds) leaves at least a quarter of the axis to those.
    """
    known = finite(means)
    if not known:
        return Limits(0.0, 100.0)
    least = lowest_sound(known)
    low, high = min(value for value in known if value >= least), max(known)
    widths = finite(halves)
    usual = max(5.0, 2 * (high - low), 3 * median(widths)) if widths else 0.0
    for mean, half in zip(means, halves, strict=False):
        if finite([mean, half]) and mean >= least and half <= usual:
            ends = interval(mean, half)
            low, high = min(low, ends[0]), max(high, ends[1])
    reach = 3 * max(high - low, MIN_RANGE)
    covered = [value for value in finite(near) if low - reach <= value <= high + reach]
    return padded(min([low, *covered]), max([high, *covered]))


def padded(low: float, high: float) -> Limits:
    """Limits with room around these values, within 0 to 100."""
    room = max(0.06 * (high - low), (MIN_RANGE - (high - low)) / 2, 0.1)
    low, high = max(0.0, low - room), min(100.0, high + room)
    if high - low < MIN_RANGE:  # at an end of the scale
        low, high = max(0.0, high - MIN_RANGE), min(100.0, low + MIN_RANGE)
    return Limits(low, high)


def note(outside: Outside, name: str, column: str, value: float) -> None:
    """Add a value that lies outside an axis."""
    outside.setdefault(name, []).append(f"{column.removesuffix('_accuracy')} {percent(value)}")


def beyond(values: Mapping[str, Sequence[str]]) -> str:
    """The caption's sentence about values outside an axis, which are drawn at its edge: {what: its values}."""
    if not values:
        return ""
    words = [f"{shorten(clean(name))} ({', '.join(numbers)})" for name, numbers in values.items()]
    return f"Outside the axis, drawn at its edge: {joined(words)}."


def percent(value: float) -> str:
    return f"{value:.2f} %"
