"""Show a running sweep: as a table that is redrawn on a terminal, and as a few lines elsewhere."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich import get_console
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kd.core.console import EpochReport, display_path, format_duration, format_percent
from kd.runs import directory
from kd.runs.schema import JobRecord
from kd.runs.status import RunState, RunStatus

log = logging.getLogger(__name__)

SIGN_OF_LIFE = 60.0  # seconds between two lines about a job that is still running
REFRESH = 0.25  # seconds between two drawings of the table


@dataclass
class RunningJob:
    """A job that a worker is running. Times are readings of the sweep's clock, in seconds."""

    job: JobRecord
    start: float
    epoch: EpochReport | None = None
    epoch_time: float = 0.0  # when that epoch ended
    line_time: float = 0.0  # when the last line about the job was logged

    def left(self, now: float) -> float | None:
        """Return the seconds until the network being trained is finished; None before an epoch."""
        if self.epoch is None:
            return None
        return max(0.0, self.epoch.seconds_left - (now - self.epoch_time))


@dataclass
class BestJob:
    """The finished job with the highest validation accuracy."""

    job: JobRecord
    accuracy: float


@dataclass
class SweepProgress:
    """Counts of a sweep's jobs, logged as one line when a job starts and one when it ends.

    Attributes:
        total: Number of jobs.
        fixed: The overrides that all jobs have.
        clock: Returns the current time in seconds.
    """

    total: int
    fixed: Collection[str] = ()
    clock: Callable[[], float] = time.monotonic
    running: dict[int, RunningJob] = field(default_factory=dict)
    ended: Counter[str] = field(default_factory=Counter)  # by state, or "found"
    seconds: list[float] = field(default_factory=list)  # durations of the jobs that were trained
    workers: int = 1  # the most jobs that have run at once
    best: BestJob | None = None
    shown: set[str] = field(default_factory=set)  # warnings

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    # ---- events, reported by the scheduler

    def job_started(self, job: JobRecord) -> None:
        """Record and show that a job has started, possibly for another attempt."""
        now = self.clock()
        again = job["number"] in self.running
        self.running[job["number"]] = RunningJob(job, now, line_time=now)
        self.workers = max(self.workers, len(self.running))
        self._show_start(job, again)

    def epoch_ended(self, number: int, epoch: EpochReport) -> None:
        """Record the last epoch of the running job of this number."""
        if number in self.running:
            self.running[number].epoch = epoch
            self.running[number].epoch_time = self.clock()

    def line(self, number: int, level: int, text: str) -> None:
        """Log a line from a job's log if it is a warning; show each distinct warning only once.

        All lines are in the job's own kd.log. With hydra.verbose=true all of them are shown.
        """
        if log.isEnabledFor(logging.DEBUG):  # hydra.verbose=true
            log.log(level, "[%d] %s", number + 1, text)
        elif level >= logging.WARNING and text not in self.shown:
            self.shown.add(text)
            log.log(level, "[%d] %s", number + 1, text)

    def job_already_done(self, job: JobRecord, result: Mapping[str, Any]) -> None:
        """Record and show that a job had finished before this sweep."""
        self.ended["found"] += 1
        self._compare(job, result["metrics"])
        self._show_found(job)

    def job_ended(self, job: JobRecord, outcome: RunStatus) -> None:
        """Record and show that a job has ended."""
        run = self.running.pop(job["number"], None)
        seconds = None if run is None else self.clock() - run.start
        self.ended[outcome.state] += 1
        if outcome.state != RunState.DONE:
            self._show_failure(job, outcome)
            return
        if seconds is not None:
            self.seconds.append(seconds)
        metrics = (directory.load_result(Path(job["folder"])) or {}).get("metrics", {})
        self._compare(job, metrics)
        self._show_result(job, metrics, seconds)

    def tick(self) -> None:
        """Log a line about each job that has had none for a minute. Call at least once a second."""
        now = self.clock()
        for run in self.running.values():
            if now - run.line_time >= SIGN_OF_LIFE:
                run.line_time = now
                log.info("%s %s", self.name(run.job), self._state(run, now))

    # ---- output

    def _show_start(self, job: JobRecord, again: bool) -> None:
        log.info("%s%s: %s", self.name(job), " (retry)" if again else "", self.label(job))

    def _show_found(self, job: JobRecord) -> None:
        log.info("%s: found in %s", self.name(job), display_path(Path(job["folder"])))

    def _show_failure(self, job: JobRecord, outcome: RunStatus) -> None:
        level = logging.INFO if outcome.state == RunState.PRUNED else logging.ERROR
        log.log(
            level, "%s %s: %s (%s)", self.name(job), *outcome, display_path(Path(job["folder"]))
        )

    def _show_result(
        self, job: JobRecord, metrics: Mapping[str, float], seconds: float | None
    ) -> None:
        cells = [
            f"{split} {format_percent(metrics[f'{split}_accuracy'])}"
            for split in ("val", "test")
            if f"{split}_accuracy" in metrics
        ]
        if seconds is not None:
            cells.append(format_duration(seconds))
        log.info("%s done: %s", self.name(job), "  ".join(cells))

    def _state(self, run: RunningJob, now: float) -> str:
        if run.epoch is None:
            return f"has been in its first epoch for {format_duration(now - run.start)}"
        epoch = run.epoch
        left = format_duration(run.left(now) or 0.0)
        val = "" if epoch.val_accuracy is None else f"  val {format_percent(epoch.val_accuracy)}"
        network = "" if epoch.title == "student" else f"{epoch.title}  "
        progress = f"{network}epoch {epoch.number}/{epoch.total}"
        return f"at {progress}  loss {epoch.loss:.4f}{val}  left {left}"

    # ---- queries

    def name(self, job: JobRecord) -> str:
        """Return the job's number and the number of jobs, as "job 3 of 12"."""
        return f"job {job['number'] + 1} of {self.total}"

    def label(self, job: JobRecord) -> str:
        """Return the overrides that distinguish the job from other jobs."""
        distinct = [override for override in job["overrides"] if override not in self.fixed]
        return " ".join(distinct or job["overrides"])

    def seconds_left(self) -> float | None:
        """Estimate the seconds until the last job ends from those that have ended; None if none."""
        now = self.clock()
        per_job = self._seconds_per_job(now)
        if per_job is None:
            return None
        left = [
            _or(run.left(now), max(0.0, per_job - (now - run.start)))
            for run in self.running.values()
        ]
        waiting = max(0, self.total - sum(self.ended.values()) - len(self.running))
        return max([(waiting * per_job + sum(left)) / self.workers, *left])

    def _seconds_per_job(self, now: float) -> float | None:
        """Return the mean duration of ended jobs, or else of running ones by estimate."""
        seconds = self.seconds or [
            now - run.start + (run.left(now) or 0.0)
            for run in self.running.values()
            if run.epoch is not None and run.epoch.title == "student"
        ]
        return sum(seconds) / len(seconds) if seconds else None

    def _compare(self, job: JobRecord, metrics: Mapping[str, float]) -> None:
        accuracy = metrics.get("val_accuracy")
        if accuracy is not None and (self.best is None or accuracy > self.best.accuracy):
            self.best = BestJob(job, accuracy)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


class LiveProgress(SweepProgress):
    """The same on a terminal: a row per running job, the counts below, and failures above.

    Only failures and warnings are logged as lines; these stay on the screen above the table.
    """

    def __init__(
        self, total: int, fixed: Collection[str] = (), console: Console | None = None, **more: Any
    ) -> None:
        super().__init__(total, fixed, **more)
        self.console = console or get_console()
        self.live = Live(
            console=self.console,
            get_renderable=self.render,
            auto_refresh=False,
            transient=True,
            vertical_overflow="crop",
        )
        self.last_refresh = 0.0
        self.stack = ExitStack()

    def __enter__(self) -> Self:
        self.stack.enter_context(self.live)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()

    def tick(self) -> None:
        """Redraw the table if it is due."""
        if self.clock() - self.last_refresh >= REFRESH:
            self.last_refresh = self.clock()
            self.live.refresh()

    def _show_start(self, job: JobRecord, again: bool) -> None:
        pass

    def _show_found(self, job: JobRecord) -> None:
        pass

    def _show_failure(self, job: JobRecord, outcome: RunStatus) -> None:
        if outcome.state != RunState.PRUNED:
            super()._show_failure(job, outcome)

    def _show_result(
        self, job: JobRecord, metrics: Mapping[str, float], seconds: float | None
    ) -> None:
        pass

    # ---- the table

    def render(self) -> Group:
        """Return the table of running jobs with the counts and the best job below it."""
        footer = [self._counts(), *self._best()]
        # Leave room for the header and the line about omitted rows, and one line spare.
        max_rows = max(1, self.console.height - len(footer) - 3)
        runs = sorted(self.running.values(), key=lambda run: run.job["number"])
        more: list[Text] = []
        if len(runs) > max_rows:
            more = [Text(f"... {len(runs) - max_rows} more running", "dim")]
        table = [self._table(runs[:max_rows])] if runs else []
        return Group(*table, *more, *footer)

    def _table(self, runs: list[RunningJob]) -> Table:
        columns = self._columns()
        table = Table(
            box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", expand=True
        )
        for title in columns:
            wide = title == "settings"
            table.add_column(
                title,
                no_wrap=True,
                overflow="ellipsis",
                justify="left" if wide else "right",
                ratio=1 if wide else None,
                min_width=len(str(self.total)) if title == "job" else None,
            )
        now = self.clock()
        for run in runs:
            cells = self._cells(run, now)
            table.add_row(*(Text(cells[title]) for title in columns))
        return table

    def _columns(self) -> list[str]:
        titles = ["job", "method", "settings", "epoch", "loss", "val, %", "left"]
        # Minimum width of the terminal, in characters, at which each column is shown.
        min_widths = {"loss": 72, "method": 60, "left": 48, "settings": 30, "val, %": 30}
        return [title for title in titles if self.console.width >= min_widths.get(title, 0)]

    def _cells(self, run: RunningJob, now: float) -> dict[str, str]:
        method = str(run.job["config"]["method"]["name"])
        settings = self.label(run.job)
        if self.console.width >= 60:  # there is a column for the method
            settings = " ".join(word for word in settings.split(" ") if word != f"method={method}")
        cells = {"job": str(run.job["number"] + 1), "method": method, "settings": settings}
        epoch = run.epoch
        left = run.left(now)
        if epoch is None or left is None:
            return {**cells, "epoch": "-", "loss": "", "val, %": "", "left": ""}
        is_student = epoch.title == "student"
        progress = f"{epoch.number}/{epoch.total}"
        return {
            **cells,
            "epoch": progress if is_student else f"{epoch.title} {progress}",
            "loss": f"{epoch.loss:.4f}",
            "val, %": "" if epoch.val_accuracy is None else f"{100 * epoch.val_accuracy:.2f}",
            "left": format_duration(left) if is_student else f"> {format_duration(left)}",
        }

    def _counts(self) -> Text:
        waiting = max(0, self.total - sum(self.ended.values()) - len(self.running))
        counts = {"running": len(self.running), **self.ended, "to do": waiting}
        text = Text(f"{self.total} jobs: ", no_wrap=True, overflow="ellipsis")
        for state, count in counts.items():
            if count:
                bad = state in (RunState.FAILED, RunState.KILLED, RunState.DIVERGED)
                text.append(f"{count} {state}", "bold red" if bad else "").append(", ")
        text.right_crop(2)
        left = self.seconds_left()
        return text if left is None else text.append(f"; left {format_duration(left)}")

    def _best(self) -> list[Text]:
        if self.best is None:
            return []
        accuracy = format_percent(self.best.accuracy)
        number = self.best.job["number"] + 1
        line = f"best so far: val {accuracy}, job {number} ({self.label(self.best.job)})"
        return [Text(line, no_wrap=True, overflow="ellipsis")]


def sweep_progress(total: int, fixed: Collection[str] = ()) -> SweepProgress:
    """Return a live table if standard output is a terminal that can draw one, and lines otherwise.

    Args:
        total: Number of jobs.
        fixed: The overrides that all jobs have.
    """
    console = get_console()
    is_terminal = (
        console.is_terminal and not console.is_dumb_terminal and bool(console.file.isatty())
    )
    return LiveProgress(total, fixed) if is_terminal else SweepProgress(total, fixed)
