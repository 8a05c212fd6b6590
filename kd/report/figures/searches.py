"""Optuna's own plots of a search."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

from kd.core.errors import first_line
from kd.report.figures.limits import CARET_DOWN, CARET_UP
from kd.report.figures.selection import FigureNotApplicable
from kd.report.figures.style import sentences


def search(study: Mapping[str, str], what: str) -> tuple[Any, str]:
    """Draw Optuna's own plot of a study: the best objective so far, or how much each key matters to it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its plots call themselves experimental
            axis, note = _plot(study, what)
    except ImportError as error:
        raise FigureNotApplicable("Optuna is not installed") from error
    except FigureNotApplicable:
        raise
    except Exception as error:  # of Optuna, of SQLAlchemy, of any database's driver
        raise FigureNotApplicable(f"the study cannot be read: {first_line(error)}") from error
    figure = axis.figure
    figure.set_size_inches(6.4, 3.8)
    axis.set_title("")
    if what == "history":
        caption = "The objective of each complete trial, and the best so far; measured on validation images."
    else:
        caption = "The share of the objective's variance that each searched key explains (Optuna's fANOVA)."
    return figure, sentences(caption, note)


def _plot(study: Mapping[str, str], what: str) -> tuple[Any, str]:
    """(axes, the caption's sentence about values outside them)."""
    import optuna
    from optuna.visualization import matplotlib as plots

    from kd.runs.optuna_storage import open_storage

    file = study["storage"].removeprefix("sqlite:///")
    if "://" not in file and not Path(file).is_file():  # Optuna would make it
        raise FigureNotApplicable(f"the study cannot be read: there is no {file}")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    loaded = optuna.load_study(study_name=study["study"], storage=open_storage(study["storage"]))
    complete = loaded.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    if len(complete) < 4:
        raise FigureNotApplicable("fewer than four trials are complete")
    if what != "history":
        return plots.plot_param_importances(loaded), ""
    axis = plots.plot_optimization_history(loaded)
    more_is_better = loaded.direction == optuna.study.StudyDirection.MAXIMIZE
    values = [(trial.number, float(trial.value)) for trial in complete if trial.value is not None]
    return axis, limit_objective(axis, values, more_is_better)


def limit_objective(axis: Any, trials: Sequence[tuple[int, float]], more_is_better: bool) -> str:
    """Let no failed trial choose the limits of the objective's axis: those far beyond the usual on the bad side are
    drawn at its edge. **Returns:** the caption's sentence about them."""
    sign = 1.0 if more_is_better else -1.0
    losses = [-sign * value for _, value in trials if math.isfinite(value)]
    lower, middle, upper = quantiles(losses, n=4)
    fence = upper + 3 * (upper - lower)
    sound = [loss for loss in losses if loss <= fence]
    if len(sound) == len(losses) or max(losses) - min(losses) < 3 * (max(sound) - min(sound)):
        return ""
    room = 0.06 * (max(sound) - min(sound)) or 0.01 * abs(middle) or 1.0
    low, high = sorted((-sign * (min(sound) - room), -sign * (max(sound) + room)))
    axis.set_ylim(low, high)
    outside = [number for number, value in trials if -sign * value > fence]
    edge, marker = (low, CARET_DOWN) if more_is_better else (high, CARET_UP)
    axis.plot(outside, [edge] * len(outside), marker=marker, color="0.3", ls="", clip_on=False)
    return f"Outside the axis, drawn at its edge: {len(outside)} of {len(trials)} trials."
