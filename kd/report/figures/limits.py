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
Ends = tuple[float, float]  # the low and the high end of an interval
NO_INTERVAL: Ends = (math.nan, math.nan)


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


def interval(mean: float, half: float) -> Ends:
    """Return the ends of an accuracy's interval, clipped to 0 and 100 percent.

    Without a half width (nan), there is no interval.
    """
    if not math.isfinite(half):
        return NO_INTERVAL
    return max(0.0, mean - half), min(100.0, mean + half)


def arms(means: Sequence[float], ends: Sequence[Ends]) -> list[list[float]]:
    """Return the lengths of error bars below and above the means, as for `errorbar`."""
    pairs = list(zip(means, ends, strict=True))
    below = [max(0.0, mean - low) for mean, (low, _) in pairs]
    return [below, [max(0.0, high - mean) for mean, (_, high) in pairs]]


def draw_points(axis: Any, xs: Iterable[float], ys: Iterable[float], **look: Any) -> None:
    """Draw markers without clipping them at the limits of the axis."""
    xs = list(xs)
    ys = list(ys)
    if xs:  # constrained layout fails on an empty line that is not clipped
        axis.plot(xs, ys, **{"ls": "", "clip_on": False, "zorder": 3} | look)


def draw_bars(
    axis: Any, xs: Iterable[float], means: Iterable[float], ends: Iterable[Ends], colour: Any
) -> None:
    """Draw error bars where there is an interval."""
    known = [
        (x, mean, pair)
        for x, mean, pair in zip(xs, means, ends, strict=True)
        if len(finite([mean, *pair])) == 3
    ]
    if known:
        positions, middles, pairs = zip(*known, strict=True)
        lengths = arms(middles, pairs)
        axis.errorbar(
            positions, middles, yerr=lengths, fmt="none", ecolor=colour, elinewidth=1.2, capsize=3
        )


def draw_seeds(axis: Any, position: int, values: Sequence[float], span: Limits) -> None:
    """Draw a dot for each seed, or an arrow at the edge for a seed outside the axis."""
    look = {"color": "0.55", "linewidths": 0, "zorder": 3, "clip_on": False}
    inside = [value for value in values if span.contains(value)]
    axis.scatter(inside, [position] * len(inside), s=16, **look)
    for value in values:
        if not span.contains(value):
            marker = CARET_LEFT if value < span.low else CARET_RIGHT
            axis.scatter([span.nearest(value)], [position], s=20, marker=marker, **look)


def draw_interval(
    axis: Any, mean: float, position: float, ends: Ends, colour: Any, span: Limits
) -> None:
    """Draw an interval along the x axis, if there is one, with arrows where it leaves the axis."""
    if len(finite(ends)) < 2:
        return
    lengths = arms([mean], [ends])
    look = {"fmt": "none", "ecolor": colour, "elinewidth": 2, "capsize": 4}
    axis.errorbar(mean, position, xerr=lengths, **look)
    for end in ends:
        if not span.contains(end):
            draw_caret(axis, end, position, colour, 7, span)


def draw_caret(
    axis: Any, value: float, position: float, colour: Any, size: float, span: Limits
) -> None:
    """Draw an arrow head at the edge of the axis, for a value beyond it."""
    marker = CARET_LEFT if value < span.low else CARET_RIGHT
    look = {"color": colour, "ms": size, "ls": "", "zorder": 3, "clip_on": False}
    axis.plot(span.nearest(value), position, marker=marker, **look)


def draw_far(
    axis: Any, value: float, position: float, text: str, colour: Any, span: Limits
) -> None:
    """Draw a mean outside the axis as an arrow at the edge, with its value as text beside it."""
    draw_caret(axis, value, position, colour, 9, span)
    left = value < span.low
    axis.annotate(
        text,
        (span.nearest(value), position),
        (11 if left else -11, 0),
        textcoords="offset points",
        ha="left" if left else "right",
        va="center",
        bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none"},
        zorder=4,
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


def limits(means: Iterable[float], ends: Iterable[Ends] = (), near: Iterable[float] = ()) -> Limits:
    """Return the limits of an axis of accuracies, in percent.

    Args:
        means: Covered, except for those below the lowest sound value.
        ends: The means' intervals. An interval is covered unless it is much wider than most.
        near: Further values (teachers, baselines, seeds). A value is covered if it leaves at least
            a quarter of the axis to the means and intervals.
    """
    means = list(means)
    known = finite(means)
    if not known:
        return Limits(0.0, 100.0)
    lowest = lowest_sound(known)
    sound = [value for value in known if value >= lowest]
    intervals = [
        pair for mean, pair in zip(means, ends, strict=False) if finite([mean]) and mean >= lowest
    ]
    return padded(*with_near(*with_intervals(min(sound), max(sound), intervals), near, 3.0))


def with_intervals(low: float, high: float, ends: Sequence[Ends]) -> Ends:
    """Return the range from low to high, extended to intervals unless much wider than most."""
    known = [pair for pair in ends if len(finite(pair)) == 2]
    if not known:
        return low, high
    halves = [(end - start) / 2 for start, end in known]
    largest_half = max(5.0, 2 * (high - low), 3 * median(halves))
    covered = [pair for pair, half in zip(known, halves, strict=True) if half <= largest_half]
    lows, highs = zip(*covered, strict=True)
    return min(low, *lows), max(high, *highs)


def with_near(low: float, high: float, near: Iterable[float], most: float) -> Ends:
    """Return the range from low to high, extended to values at most `most` ranges away."""
    reach = most * max(high - low, MIN_RANGE)
    covered = [value for value in finite(near) if low - reach <= value <= high + reach]
    return min([low, *covered]), max([high, *covered])


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
