"""Learning curves: loss and accuracy by epoch."""

import math
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from statistics import median
from typing import Any, NamedTuple

import pandas as pd

from kd.report.figures.limits import CARET_DOWN, CARET_UP, beyond, lowest_sound, padded, percent
from kd.report.figures.selection import (
    FigureNotApplicable,
    candidates,
    done_runs,
    select,
    setting_looks,
)
from kd.report.figures.stability import for_range, unstable, unstable_note
from kd.report.figures.style import canvas, handle, labels, legend, listed, sentences
from kd.report.tables import Tables

MAX_CURVES = 6  # settings whose curves a reader can distinguish
MAX_MARKED_EPOCHS = 10  # approximate number of markers on a curve
LARGE_LOSS = 10.0  # nats; the loss of guessing among 22,000 classes


class Panel(NamedTuple):
    """An axis of the figure, with the history columns that it shows and their scale factor."""

    title: str
    train: str
    val: str
    scale: int


LOSS = Panel("cross-entropy, nats", "hard", "val_nll", 1)
ACCURACY = Panel("accuracy, %", "accuracy", "val_accuracy", 100)


class Curve(NamedTuple):
    """A mean over seeds by epoch, and the ends of its 95 % interval (nan for one seed).

    Of an unstable setting, it is the median, without an interval.
    """

    setting: str
    dash: str
    mean: "pd.Series[float]"
    low: "pd.Series[float]"
    high: "pd.Series[float]"


def curves(tables: Tables) -> tuple[Any, str]:
    """Draw loss and accuracy by epoch, for each method's chosen setting.

    Training curves are dashed, validation curves are solid.

    Returns:
        (figure, caption).

    Raises:
        FigureNotApplicable: The runs have no history, or only one epoch.
    """
    done = done_runs(tables)
    selection = select(candidates(tables.summary), MAX_CURVES)
    rows = selection.rows
    settings = list(rows["setting"])
    shaky = set(rows["setting"][unstable(rows)])
    for_limits = set(for_range(rows)["setting"])
    all_history = tables.history[tables.history["setting"].isin(settings)]
    history = _history_of(all_history, done)
    panels = [
        panel
        for panel in (LOSS, ACCURACY)
        if _measured(history, panel.train) or _measured(history, panel.val)
    ]
    if not panels:
        raise FigureNotApplicable("the runs have no history")
    if history["epoch"].max() < 2:
        raise FigureNotApplicable("the runs have only one epoch")
    figure, axes = canvas(4.6 * len(panels), 3.8, len(panels))
    looks = setting_looks(tables)
    without_history = [name for name in settings if name not in set(history["setting"])]
    notes = [f"No history for: {listed(without_history)}."] if without_history else []
    for axis, panel in zip(axes[0], panels, strict=True):
        panel_curves = list(_curves(history, settings, panel, shaky))
        for curve in panel_curves:
            _draw(axis, curve, looks[curve.setting], curve.setting in shaky)
        sound = [curve for curve in panel_curves if curve.setting in for_limits] or panel_curves
        if panel is LOSS:
            notes.append(_limit_loss(axis, panel_curves, sound))
        else:
            notes.append(_limit_accuracy(axis, panel_curves, sound, looks))
        axis.set(xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
    names, full_names = labels(settings)
    entries = {
        names[name]: handle(**(looks[name] | {"ls": "-"} | _face(name in shaky)))
        for name in settings
        if name not in without_history
    }
    entries |= {
        "validation": handle(color="0.3", ls="-"),
        "training views": handle(color="0.3", ls="--"),
    }
    legend(figure, entries)
    unfinished = len(_history_of(tables.runs, all_history)) - len(_history_of(done, all_history))
    return figure, sentences(
        "Means over seeds with 95 % bands. Training accuracy and loss are of augmented views, "
        "in train mode; cross-entropy is with the labels, whatever else a method's loss holds.",
        unstable_note(rows, "hollow"),
        selection.note,
        _unfinished_note(unfinished),
        *notes,
        full_names,
    )


def _unfinished_note(unfinished: int) -> str:
    if not unfinished:
        return ""
    if unfinished == 1:
        return "1 unfinished run of these settings is left out."
    return f"{unfinished} unfinished runs of these settings are left out."


def _history_of(rows: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that belong to one of these runs."""
    keys = ["id"] if "id" in rows and "id" in runs else ["setting", "seed"]
    return rows.merge(runs[keys].drop_duplicates(), on=keys)


def _measured(history: pd.DataFrame, column: str) -> bool:
    return column in history and bool(history[column].notna().any())


def _curves(
    history: pd.DataFrame, settings: Sequence[str], panel: Panel, shaky: AbstractSet[str]
) -> Iterator[Curve]:
    """Yield the curves of a panel, for each setting training before validation.

    Args:
        history: The epochs of finished runs.
        settings: The settings to draw.
        panel: The axis.
        shaky: The unstable settings.
    """
    from scipy import stats

    for setting in settings:
        rows = history[history["setting"] == setting]
        for column, dash in ((panel.train, "--"), (panel.val, "-")):
            if not _measured(rows, column):
                continue
            by_epoch = (panel.scale * rows[column].astype(float)).groupby(rows["epoch"].astype(int))
            table = by_epoch.agg(["mean", "std", "count", "median"])
            table = table[table["count"] > 0]
            half = stats.t.ppf(0.975, table["count"] - 1) * table["std"] / table["count"] ** 0.5
            if setting in shaky:
                half *= math.nan
            mean = table["median" if setting in shaky else "mean"]
            low = (mean - half).clip(lower=0)
            high = (mean + half).clip(upper=100.0 if panel is ACCURACY else math.inf)
            yield Curve(setting, dash, mean, low, high)


def _face(hollow: bool) -> dict[str, str]:
    return {"mfc": "white"} if hollow else {}


def _draw(axis: Any, curve: Curve, look: dict[str, Any], hollow: bool) -> None:
    validation = curve.dash == "-"
    mean = curve.mean
    axis.plot(
        mean.index,
        mean,
        color=look["color"],
        ls=curve.dash,
        lw=1.5,
        marker=look["marker"] if validation or len(mean) == 1 else None,
        ms=5,
        markevery=max(1, len(mean) // MAX_MARKED_EPOCHS),
        **_face(hollow),
    )
    axis.fill_between(mean.index, curve.low, curve.high, color=look["color"], alpha=0.18, lw=0)


def _limit_accuracy(
    axis: Any,
    panel_curves: Sequence[Curve],
    for_limits: Sequence[Curve],
    looks: Mapping[str, dict[str, Any]],
) -> str:
    """Set the limits of the accuracy axis from the settings whose last value is sound.

    Args:
        axis: The axis.
        panel_curves: All curves of the axis.
        for_limits: The curves that may set its limits.
        looks: {setting: its look}.

    Returns:
        The caption's sentence about values outside the axis, or "".
    """
    axis.set_ylabel(ACCURACY.title)
    # the validation curve, where there is one, follows the training curve and replaces its value
    last_values = {curve.setting: float(curve.mean.iloc[-1]) for curve in panel_curves}
    lowest = lowest_sound([last_values[curve.setting] for curve in for_limits])
    sound: list[float] = []
    for curve in for_limits:
        if last_values[curve.setting] >= lowest:
            sound.extend(curve.mean)
    span = padded(min(sound), max(sound))
    axis.set_ylim(span)
    outside = [name for name, value in last_values.items() if not span.contains(value)]
    for name in outside:
        last_epoch = max(curve.mean.index[-1] for curve in panel_curves if curve.setting == name)
        axis.plot(
            last_epoch,
            span.nearest(last_values[name]),
            marker=CARET_DOWN if last_values[name] < span.low else CARET_UP,
            ms=8,
            ls="",
            color=looks[name]["color"],
            clip_on=False,
        )
    return beyond({name: [percent(last_values[name])] for name in outside})


def _limit_loss(axis: Any, panel_curves: Sequence[Curve], for_limits: Sequence[Curve]) -> str:
    """Set the limits of the loss axis, and a log scale where the losses span a factor of two.

    A diverged run or a loss of zero does not affect the limits.

    Args:
        axis: The axis.
        panel_curves: All curves of the axis.
        for_limits: The curves that may set its limits.

    Returns:
        The caption's sentence about values outside the axis, or "".
    """
    positive = [curve.mean[curve.mean > 0] for curve in for_limits]
    positive = [mean for mean in positive if len(mean)]
    axis.set_ylabel(LOSS.title)
    if not positive:
        axis.set_ylim(-0.02, 1)
        return "All losses are 0."
    typical = median(float(mean.median()) for mean in positive)
    high = min(max(float(mean.max()) for mean in positive), max(LARGE_LOSS, 30 * typical))
    low = max(min(float(mean.min()) for mean in positive), typical / 1000)
    if high < 2 * low:
        room = max(0.05 * (high - low), 0.01 * high)
        axis.set_ylim(max(0.0, low - room), high + room)
    else:
        _set_log(axis, low / 1.1, high * 1.1)
    outside: dict[str, list[str]] = {}
    for curve in panel_curves:
        last_value = float(curve.mean.iloc[-1])
        if not low <= last_value <= high:
            kind = "validation" if curve.dash == "-" else "training"
            outside.setdefault(curve.setting, []).append(f"{kind} loss {last_value:.3g}")
    return beyond(outside)


def _set_log(axis: Any, low: float, high: float) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    decades = math.log10(high / low)
    steps = (1.0, 2.0, 3.0, 5.0, 7.0) if decades < 1.3 else (1.0, 3.0) if decades < 3 else (1.0,)
    axis.set(yscale="log", ylim=(low, high), ylabel=f"{LOSS.title} (log)")
    axis.yaxis.set_major_locator(LogLocator(subs=steps))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())
