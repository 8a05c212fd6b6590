"""Axes of accuracies, in percent: intervals within 0 to 100, and limits set by the sound values."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from kd.report.figures.style import clean, joined, shorten

# matplotlib's markers whose tip is at the point
CARET_LEFT, CARET_RIGHT, CARET_UP, CARET_DOWN = range(4, 8)
MIN_RANGE = 1.0  # smallest range of an axis, in points
FAR_FACTOR = 20.0  # points below the others at which a few values no longer affect an axis

Outside = dict[str, list[str]]  # {name: its values outside the axis, as text}


class Limits(NamedTuple):
    """The limits of an axis, in percent."""

    low: float
    high: float

    def contains(self, value: float) -> bool:
        """Return whether the value lies on the axis."""
        return self.low <= value <= self.high

    def nearest(self, value: float) -> float:
        """Return the value, or the end of the axis that is nearest to it."""
        return min(max(value, self.low), self.high)


def finite(values: Iterable[Any]) -> list[float]:
    """Return the values that are finite numbers."""
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def interval(mean: float, half: float) -> tuple[float, float]:
    """Return the ends of an accuracy's interval, clipped to 0 and 100 percent.

    Without a half width (nan), both ends are the mean.
    """
    if not math.isfinite(half):
        return mean, mean
    return max(0.0, mean - half), min(100.0, mean + half)


def arms(means: Sequence[float], halves: Sequence[float]) -> list[list[float]]:
    """Return the lengths of error bars below and above the means, as for `errorbar`."""
    ends = [(mean, *interval(mean, half)) for mean, half in zip(means, halves, strict=True)]
    return [[mean - low for mean, low, _ in ends], [high - mean for mean, _, high in ends]]


def draw_points(axis: Any, xs: Iterable[float], ys: Iterable[float], **look: Any) -> None:
    """Draw markers without clipping them at the limits of the axis."""
    xs = list(xs)
    ys = list(ys)
    if xs:  # constrained layout fails on an empty line that is not clipped
        axis.plot(xs, ys, **{"ls": "", "clip_on": False, "zorder": 3} | look)


def draw_bars(
    axis: Any, xs: Iterable[float], means: Iterable[float], halves: Iterable[float], colour: Any
) -> None:
    """Draw error bars where the half width is known."""
    known = [
        (x, mean, half)
        for x, mean, half in zip(xs, means, halves, strict=True)
        if math.isfinite(half)
    ]
    if known:
        positions, middles, widths = zip(*known, strict=True)
        lengths = arms(middles, widths)
        axis.errorbar(
            positions, middles, yerr=lengths, fmt="none", ecolor=colour, elinewidth=1.2, capsize=3
        )


def lowest_sound(values: Sequence[float]) -> float:
    """Return the lowest value that may set the limits of an axis.

    Lower values are separated from the others by a gap of at least twice the range of the others,
    so that an axis with all values would compress the others. In addition, the lower values are
    either close to each other and below a third of the others (at chance level, for example), or
    few (at most half as many as the others) and 20 points lower.
    """
    ordered = sorted(values)
    for cut in range(len(ordered) - 1, 0, -1):
        lower = ordered[:cut]
        upper = ordered[cut:]
        gap = upper[0] - lower[-1]
        if gap < max(2.0, 2 * (upper[-1] - upper[0])):
            continue
        collapsed = lower[-1] < upper[0] / 3 and lower[-1] - lower[0] <= gap / 2
        few = 2 * len(lower) <= len(upper) and gap >= FAR_FACTOR
        if collapsed or few:
            return upper[0]
    return ordered[0]


def limits(means: Iterable[Any], halves: Iterable[Any] = (), near: Iterable[Any] = ()) -> Limits:
    """Return the limits of an axis of accuracies, in percent.

    Args:
        means: Covered, except for those below the lowest sound value.
        halves: Half widths of the means' intervals. An interval is covered unless it is much wider
            than most.
        near: Further values (teachers, baselines, seeds). A value is covered if it leaves at least
            a quarter of the axis to the means and intervals.
    """
    known = finite(means)
    if not known:
        return Limits(0.0, 100.0)
    lowest = lowest_sound(known)
    low = min(value for value in known if value >= lowest)
    high = max(known)
    widths = finite(halves)
    largest_half = max(5.0, 2 * (high - low), 3 * median(widths)) if widths else 0.0
    for mean, half in zip(means, halves, strict=False):
        if finite([mean, half]) and mean >= lowest and half <= largest_half:
            interval_low, interval_high = interval(mean, half)
            low = min(low, interval_low)
            high = max(high, interval_high)
    reach = 3 * max(high - low, MIN_RANGE)
    covered = [value for value in finite(near) if low - reach <= value <= high + reach]
    return padded(min([low, *covered]), max([high, *covered]))


def padded(low: float, high: float) -> Limits:
    """Return limits with room around these values, within 0 to 100."""
    room = max(0.06 * (high - low), (MIN_RANGE - (high - low)) / 2, 0.1)
    low = max(0.0, low - room)
    high = min(100.0, high + room)
    if high - low < MIN_RANGE:  # at an end of the scale
        low, high = max(0.0, high - MIN_RANGE), min(100.0, low + MIN_RANGE)
    return Limits(low, high)


def note(outside: Outside, name: str, column: str, value: float) -> None:
    """Add a value that lies outside an axis to `outside`."""
    outside.setdefault(name, []).append(f"{column.removesuffix('_accuracy')} {percent(value)}")


def beyond(values: Mapping[str, Sequence[str]]) -> str:
    """Return the caption's sentence about values outside an axis, given as {name: values}."""
    if not values:
        return ""
    items = [f"{shorten(clean(name))} ({', '.join(numbers)})" for name, numbers in values.items()]
    return f"Outside the axis, drawn at its edge: {joined(items)}."


def percent(value: float) -> str:
    """Return the text of an accuracy in percent, with two decimals."""
    return f"{value:.2f} %"
