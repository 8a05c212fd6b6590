"""The states of a run."""

from enum import StrEnum
from typing import NamedTuple


class RunState(StrEnum):
    """The state of a run; its value is the word that files and tables contain."""

    PLANNED = "planned"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    DIVERGED = "diverged"  # a loss or a weight was not finite
    PRUNED = "pruned"  # stopped by a hyperparameter search
    KILLED = "killed"  # its process was interrupted or no longer exists


class RunStatus(NamedTuple):
    """The state of a run, and the reason for it."""

    state: RunState
    reason: str = ""
