"""The exceptions that kd distinguishes, and how error messages are formatted."""

import difflib
from collections.abc import Iterable

# Long forms of keys that are named by a symbol or an abbreviation
SYNONYMS = {
    "temperature": "T",
    "learning_rate": "lr",
    "epoch": "epochs",
    "checkpoints": "checkpoint",
}


# Keys of earlier versions, and their present names
RENAMED = {
    "student.labels": "student.label_fraction",
    "teacher.members": "teacher.ensemble.size",
    "teacher.mean": "teacher.ensemble.average",
    "teacher.store": "teacher.cache",
    "teacher.store.gigabytes": "teacher.cache.max_gb",
    "teacher.store.maps": "teacher.cache.feature_maps",
    "teacher.store.fill": "teacher.cache.fill",
    "kernels": "cpu_kernels",
    "checkpoint.epochs": "checkpoint.every_n_epochs",
    "checkpoint.minutes": "checkpoint.every_n_minutes",
    "hydra.launcher.pack": "hydra.launcher.jobs_per_worker",
    "hydra.launcher.max_failures": "hydra.launcher.max_retries",
    "data.augment.crop": "data.augment.crop_padding",
    "data.augment.padding": "data.augment.padding_mode",
    "schedule.warmup": "schedule.warmup_fraction",
    "schedule.final": "schedule.final_lr_factor",
    "teacher.schedule.warmup": "teacher.schedule.warmup_fraction",
    "teacher.schedule.final": "teacher.schedule.final_lr_factor",
    "method.warmup": "method.warmup_fraction",
    "method.other": "method.non_target",
    "method.low": "method.t_min",
    "method.span": "method.t_range",
    "method.width": "method.embed_dim",
    "method.negatives": "method.n_negatives",
}


class UserError(Exception):
    """A mistake that the user can correct; exit code 2.

    The message is one line that names the key and its allowed values.
    """


class DivergedError(Exception):
    """A loss term or a weight became NaN or infinite; the message names it and when."""


class PrunedError(Exception):
    """The hyperparameter search stopped the run because other trials perform better."""


class SweepFailedError(Exception):
    """Some jobs of a sweep failed; the report lists them."""


class JobFailedError(Exception):
    """A launcher returned the error of a job."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def unknown_key(path: str, allowed: Iterable[str]) -> str:
    """Describe an unknown key on one line.

    Args:
        path: The unknown key, dotted.
        allowed: The keys that its parent node has.

    Returns:
        The key, its new name or the closest valid one, if there is one, and all valid ones.
    """
    if path in RENAMED:
        return f"{path}: this key is now {RENAMED[path]}"
    node, _, name = path.rpartition(".")
    allowed = list(allowed)
    candidates = {key.lower(): key for key in allowed}
    candidates |= {
        long: short
        for long, short in SYNONYMS.items()
        if short in allowed and long not in candidates
    }
    closest = difflib.get_close_matches(name.lower(), candidates, 1)
    hint = "valid"
    if closest:
        prefix = f"{node}." if node else ""
        hint = f"did you mean {prefix}{candidates[closest[0]]}? Valid"
    return f"{path}: unknown key; {hint}: {', '.join(allowed)}"
