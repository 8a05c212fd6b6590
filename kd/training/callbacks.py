"""What happens between two steps of a run: a progress line, history, checkpoints, W&B, pruning.

A callback is called with None after each step and with the epoch's metrics after each epoch.
`TrainingRun.steps` calls them in the order of its list.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kd.core import console
from kd.core.errors import PrunedError
from kd.core.signals import SignalHandler
from kd.runs.directory import RunDirectory
from kd.training.checkpoint import Checkpoints
from kd.training.device import Device
from kd.training.environment import numerics
from kd.training.loop import EpochMetrics, TrainingState

log = logging.getLogger(__name__)

# Entries of an epoch's metrics that are not loss terms
_NOT_TERMS = ("epoch", "lr", "accuracy", "loss", "seconds", "images_per_second")

Callback = Callable[[EpochMetrics | None], None]


class Stopwatch:
    """Seconds of training of one epoch; stopped while other interleaved runs take their steps."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.started_at = time.monotonic()

    def start(self) -> None:
        """Count from now on."""
        self.started_at = time.monotonic()

    def stop(self) -> float:
        """Stop counting and return the seconds since the last reset."""
        self.seconds += time.monotonic() - self.started_at
        return self.seconds

    def reset(self) -> None:
        """Set the seconds to 0."""
        self.seconds = 0.0


class ProgressLog:
    """Log one line per epoch and, on a terminal, draw a progress bar with the time left.

    Args:
        title: Name of the run.
        epochs: Epochs of the whole run.
        completed: Metrics of the epochs before the run was resumed.
    """

    def __init__(self, title: str, epochs: int, completed: Sequence[EpochMetrics]) -> None:
        self.title = title
        self.epochs = epochs
        self.seconds = sum(row["seconds"] for row in completed)
        screen = get_console()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=screen,
            transient=True,
            disable=not screen.is_terminal,
        )
        self.task = self.bar.add_task(title, total=epochs, completed=len(completed))

    def __enter__(self) -> "ProgressLog":
        """Show the bar."""
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the bar."""
        self.stop()

    def stop(self) -> None:
        """Remove the bar, if it is shown."""
        self.bar.stop()

    def log_epoch(self, metrics: EpochMetrics) -> None:
        """Log the metrics of an epoch."""
        epoch = metrics["epoch"]
        self.seconds += metrics["seconds"]
        seconds_left = self.seconds / epoch * (self.epochs - epoch)
        terms = [
            f"{name} {value:.4f}"
            for name, value in metrics.items()
            if name not in _NOT_TERMS and not name.startswith("val_")
        ]
        text = "  ".join(terms)
        if "val_accuracy" in metrics:
            text += f"  val {console.format_percent(metrics['val_accuracy'])}"
        report = console.EpochReport(
            self.title,
            epoch,
            self.epochs,
            metrics["loss"],
            metrics.get("val_accuracy"),
            seconds_left,
        )
        log.info(
            "%s  epoch %*d/%d  loss %.4f  %s  %.1f s  left %s",
            self.title,
            len(str(self.epochs)),
            epoch,
            self.epochs,
            metrics["loss"],
            text,
            metrics["seconds"],
            console.format_duration(seconds_left),
            extra={"epoch": report},
        )
        self.bar.advance(self.task)


class CheckpointWriter:
    """Write a checkpoint when one is due, or when a signal is about to end the process."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        state: TrainingState,
        run_dir: RunDirectory,
        device: Device,
        signals: SignalHandler,
        title: str,
    ) -> None:
        self.checkpoints = checkpoints
        self.state = state
        self.run_dir = run_dir
        self.device = device
        self.stopwatch = Stopwatch()
        self.signals = signals
        self.title = title
        self.seconds_before = 0.0  # of training before the run was resumed
        self.times_resumed = 0
        self.started_at = time.monotonic()

    def start(self, checkpoint: dict[str, Any] | None) -> None:
        """Start the clocks, at the checkpoint's seconds if the run is resumed from one."""
        if checkpoint is not None:
            self.stopwatch.seconds = checkpoint["clock"]
            self.seconds_before = checkpoint["seconds"]
            self.times_resumed = checkpoint["resumed"] + 1
        self.started_at = time.monotonic()

    def __call__(self, metrics: EpochMetrics | None) -> None:
        """Save if a checkpoint is due."""
        if self.checkpoints.due(self.state.epoch, self.state.step) or self.signals.pending:
            self.save()

    @property
    def train_seconds(self) -> float:
        """Seconds of training, including those before the run was resumed."""
        return self.seconds_before + time.monotonic() - self.started_at

    def save(self) -> None:
        """Write a checkpoint of the current state."""
        content = {
            **self.state.dump(),
            "rows": self.run_dir.rows,
            "clock": self.stopwatch.seconds,
            "seconds": self.train_seconds,
            "numerics": numerics(self.device),
            "resumed": self.times_resumed,
        }
        if self.checkpoints.save(self.state.epoch, self.state.step, content):
            position = self.state.epoch, self.state.step
            log.debug("%s: checkpoint after epoch %d and %d steps", self.title, *position)

    @contextmanager
    def saving_on_interrupt(self) -> Iterator[None]:
        """Save if a KeyboardInterrupt leaves the block."""
        try:
            yield
        except KeyboardInterrupt:
            self.save()
            raise


class Pruner:
    """Report each epoch to the search or sweep that started the run, and end the run on demand.

    Args:
        report: `report("epoch", metrics)` returns True to end the run; None for a run of its own.
    """

    def __init__(self, report: Callable[..., bool] | None) -> None:
        self.report = report
        self.is_pruned = False
        self.epoch = 0

    def __call__(self, metrics: EpochMetrics | None) -> None:
        """Report the metrics of an epoch."""
        if metrics is not None and self.report is not None:
            self.is_pruned = self.report("epoch", metrics)
            self.epoch = int(metrics["epoch"])

    def raise_if_pruned(self) -> None:
        """End the run if the last epoch was one too many.

        Raises:
            PrunedError: The search gave up this run.
        """
        if self.is_pruned:
            raise PrunedError(f"stopped after epoch {self.epoch} by its search")


def on_epoch(act: Callable[[dict[str, Any]], object]) -> Callback:
    """Make a callback of a function of an epoch's metrics."""

    def callback(metrics: EpochMetrics | None) -> None:
        if metrics is not None:
            act(metrics)

    return callback
