"""Optuna's own plots of a hyperparameter search."""

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


def search(study: Mapping[str, str], plot: str) -> tuple[Any, str]:
    """Draw one of Optuna's own plots of a study.

    Args:
        study: The name of the study (`study`) and where it is stored (`storage`).
        plot: `history` for the objective of each trial, or `importance` for the share of the
            objective's variance that each key explains.

    Returns:
        (figure, caption).

    Raises:
        FigureNotApplicable: Optuna is not installed, the study cannot be read, or it has too few
            complete trials.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna warns that its plots are experimental
            axis, note = _plot(study, plot)
    except ImportError as error:
        raise FigureNotApplicable("Optuna is not installed") from error
    except FigureNotApplicable:
        raise
    except Exception as error:  # from Optuna, SQLAlchemy or a database driver
        raise FigureNotApplicable(f"the study cannot be read: {first_line(error)}") from error
    figure = axis.figure
    figure.set_size_inches(6.4, 3.8)
    axis.set_title("")
    if plot == "history":
        caption = (
            "The objective of each complete trial and the best value so far, "
            "measured on validation images."
        )
    else:
        caption = (
            "The share of the objective's variance that each searched key explains "
            "(Optuna's fANOVA)."
        )
    return figure, sentences(caption, note)


def _plot(study: Mapping[str, str], plot: str) -> tuple[Any, str]:
    """Return (axes, the caption's sentence about values outside them or "")."""
    import optuna
    from optuna.visualization import matplotlib as plots

    from kd.runs.optuna_storage import open_storage

    file = study["storage"].removeprefix("sqlite:///")
    if "://" not in file and not Path(file).is_file():  # Optuna would create it
        raise FigureNotApplicable(f"the study cannot be read: {file} does not exist")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    loaded = optuna.load_study(study_name=study["study"], storage=open_storage(study["storage"]))
    complete = loaded.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    if len(complete) < 4:
        raise FigureNotApplicable("fewer than four trials are complete")
    if plot != "history":
        return plots.plot_param_importances(loaded), ""
    axis = plots.plot_optimization_history(loaded)
    more_is_better = loaded.direction == optuna.study.StudyDirection.MAXIMIZE
    values = [(trial.number, float(trial.value)) for trial in complete if trial.value is not None]
    return axis, limit_objective(axis, values, more_is_better)


def limit_objective(axis: Any, trials: Sequence[tuple[int, float]], more_is_better: bool) -> str:
    """Set the limits of the objective's axis so that outliers on the bad side do not affect them.

    A trial is an outlier if it is worse than the upper quartile of the losses by more than three
    interquartile ranges. Outliers are drawn at the edge of the axis.

    Args:
        axis: The axis of the optimization history.
        trials: (number, objective) of each complete trial.
        more_is_better: Whether the objective is maximized.

    Returns:
        The caption's sentence about the outliers, or "".
    """
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
