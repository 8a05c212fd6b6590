"""What a person sees of a sweep that is running: on a terminal a table that changes in place, elsewhere few lines."""

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
from kd.sweep.worker_pool import Outcome

log = logging.getLogger(__name__)

SIGN_OF_LIFE = 60.0  # seconds without a line of a job after which there is one
REFRESH = 0.25  # seconds between two drawings of the table

Job = dict[str, Any]
Result = Mapping[str, Any]


@dataclass
class RunningJob:
    """A job in a worker."""

    job: Job
    start: float
    epoch: EpochReport | None = None
    epoch_time: float = 0.0  # when that epoch ended
    line_time: float = 0.0  # when there was a line about it

    def left(self, now: float) -> float | None:
        """Seconds until the network that is trained now is trained."""
        return (
            None
            if self.epoch is None
            else max(0.0, self.epoch.seconds_left - (now - self.epoch_time))
        )


@dataclass
class BestJob:
    """The finished job with the highest validation accuracy."""

    job: Job
    accuracy: float


@dataclass
class SweepProgress:
    """Keeps count of a sweep's jobs and tells it in plain lines: one when a job starts, one when it ends.

    **Arguments:** `total`: how many jobs there are; `fixed`: the overrides that all jobs have.
    """

    total: int
    fixed: Collection[str] = ()
    already_done: Callable[[], float] = time.monotonic
    running: dict[int, RunningJob] = field(default_factory=dict)
    ended: Counter[str] = field(default_factory=Counter)  # by state, or "found"
    seconds: list[float] = field(default_factory=list)  # of the jobs that were trained here
    workers: int = 1  # the most jobs at once
    best: BestJob | None = None
    shown: set[str] = field(default_factory=set)  # warnings

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    # ---- what the scheduler tells

    def job_started(self, job: Job) -> None:
        now = self.already_done()
        again = job["number"] in self.running
        self.running[job["number"]] = RunningJob(job, now, line_time=now)
        self.workers = max(self.workers, len(self.running))
        self._show_start(job, again)

    def epoch_ended(self, number: int, epoch: EpochReport) -> None:
        if number in self.running:
            self.running[number].epoch, self.running[number].epoch_time = epoch, self.already_done()

    def line(self, number: int, level: int, text: str) -> None:
        """A line of a job's log. Warnings and notices are shown, the same once; the rest is in its kd.log."""
        if log.isEnabledFor(logging.DEBUG):  # hydra.verbose=true
            log.log(level, "[%d] %s", number + 1, text)
        elif level >= logging.WARNING and text not in self.shown:
            self.shown.add(text)
            log.log(level, "[%d] %s", number + 1, text)

    def job_already_done(self, job: Job, result: Result) -> None:
        """It was done before."""
        self.ended["found"] += 1
        self._compare(job, result["metrics"])
        self._show_found(job)

    def job_ended(self, job: Job, outcome: Outcome) -> None:
        run = self.running.pop(job["number"], None)
        seconds = None if run is None else self.already_done() - run.start
        self.ended[outcome.state] += 1
        if outcome.state != "done":
            self._show_failure(job, outcome)
            return
        if seconds is not None:
            self.seconds.append(seconds)
        metrics = (directory.load_result(Path(job["folder"])) or {}).get("metrics", {})
        self._compare(job, metrics)
        self._show_result(job, metrics, seconds)

    def tick(self) -> None:
        """Called at least once a second."""
        now = self.already_done()
        for run in self.running.values():
            if now - run.line_time >= SIGN_OF_LIFE:
                run.line_time = now
                log.info("%s %s", self.name(run.job), self._state(run, now))

    # ---- how it is told

    def _show_start(self, job: Job, again: bool) -> None:
        log.info("%s%s: %s", self.name(job), " again" if again else "", self.label(job))

    def _show_found(self, job: Job) -> None:
        log.info("%s: found in %s", self.name(job), display_path(Path(job["folder"])))

    def _show_failure(self, job: Job, outcome: Outcome) -> None:
        level = logging.INFO if outcome.state == "pruned" else logging.ERROR
        log.log(
            level, "%s %s: %s (%s)", self.name(job), *outcome, display_path(Path(job["folder"]))
        )

    def _show_result(self, job: Job, metrics: Mapping[str, float], seconds: float | None) -> None:
        named = {
            split: metrics[f"{split}_accuracy"]
            for split in ("val", "test")
            if f"{split}_accuracy" in metrics
        }
        words = [f"{split} {format_percent(accuracy)}" for split, accuracy in named.items()]
        words += [] if seconds is None else [format_duration(seconds)]
        log.info("%s done: %s", self.name(job), "  ".join(words))

    def _state(self, run: RunningJob, now: float) -> str:
        if run.epoch is None:
            return f"is in its first epoch, for {format_duration(now - run.start)}"
        epoch, left = run.epoch, run.left(now)
        val = "" if epoch.val_accuracy is None else f"  val {format_percent(epoch.val_accuracy)}"
        of = "" if epoch.title == "student" else f"{epoch.title}  "
        return f"at {of}epoch {epoch.number}/{epoch.total}  loss {epoch.loss:.4f}{val}  left {format_duration(left or 0.0)}"

    # ---- what is known

    def name(self, job: Job) -> str:
        return f"job {job['number'] + 1} of {self.total}"

    def label(self, job: Job) -> str:
        """The overrides that tell it from other jobs."""
        return " ".join([w for w in job["overrides"] if w not in self.fixed] or job["overrides"])

    def seconds_left(self) -> float | None:
        """Seconds until the last job has ended, as far as can be known from those that have."""
        now = self.already_done()
        each = self._seconds_each(now)
        if each is None:
            return None
        own = [
            _or(run.left(now), max(0.0, each - (now - run.start))) for run in self.running.values()
        ]
        waiting = max(0, self.total - sum(self.ended.values()) - len(self.running))
        return max([(waiting * each + sum(own)) / self.workers, *own])

    def _seconds_each(self, now: float) -> float | None:
        seconds = self.seconds or [
            now - run.start + (run.left(now) or 0.0)
            for run in self.running.values()
            if run.epoch is not None and run.epoch.title == "student"
        ]
        return sum(seconds) / len(seconds) if seconds else None

    def _compare(self, job: Job, metrics: Mapping[str, float]) -> None:
        accuracy = metrics.get("val_accuracy")
        if accuracy is not None and (self.best is None or accuracy > self.best.accuracy):
            self.best = BestJob(job, accuracy)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


class LiveProgress(SweepProgress):
    """The same on a terminal: a row for each running job, the counts beneath, and lasting lines above for failures."""

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
        self.drawn = 0.0
        self.stack = ExitStack()

    def __enter__(self) -> Self:
        self.stack.enter_context(self.live)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()

    def tick(self) -> None:
        if self.already_done() - self.drawn >= REFRESH:
            self.drawn = self.already_done()
            self.live.refresh()

    def _show_start(self, job: Job, again: bool) -> None:
        pass

    def _show_found(self, job: Job) -> None:
        pass

    def _show_failure(self, job: Job, outcome: Outcome) -> None:
        if outcome.state != "pruned":
            super()._show_failure(job, outcome)

    def _show_result(self, job: Job, metrics: Mapping[str, float], seconds: float | None) -> None:
        pass

    # ---- the table

    def render(self) -> Group:
        footer = [self._counts(), *self._best()]
        most = max(
            1, self.console.height - len(footer) - 3
        )  # with the head and a line that is left out
        runs = sorted(self.running.values(), key=lambda run: run.job["number"])
        more = [Text(f"... {len(runs) - most} more running", "dim")] if len(runs) > most else []
        return Group(*([self._table(runs[:most])] if runs else []), *more, *footer)

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
        now = self.already_done()
        for run in runs:
            cells = self._cells(run, now)
            table.add_row(*(Text(cells[title]) for title in columns))
        return table

    def _columns(self) -> list[str]:
        titles = ["job", "method", "settings", "epoch", "loss", "val, %", "left"]
        narrow = {
            "loss": 72,
            "method": 60,
            "left": 48,
            "settings": 30,
            "val, %": 30,
        }  # the widths from which on there is room for them
        return [title for title in titles if self.console.width >= narrow.get(title, 0)]

    def _cells(self, run: RunningJob, now: float) -> dict[str, str]:
        method = str(run.job["config"]["method"]["name"])
        settings = self.label(run.job)
        if self.console.width >= 60:
            settings = " ".join(word for word in settings.split(" ") if word != f"method={method}")
        cells = {"job": str(run.job["number"] + 1), "method": method, "settings": settings}
        epoch, left = run.epoch, run.left(now)
        if epoch is None or left is None:
            return {**cells, "epoch": "-", "loss": "", "val, %": "", "left": ""}
        student = epoch.title == "student"
        val = "" if epoch.val_accuracy is None else f"{100 * epoch.val_accuracy:.2f}"
        numbers = {
            "loss": f"{epoch.loss:.4f}",
            "val, %": val,
            "left": format_duration(left) if student else f"> {format_duration(left)}",
        }
        return {
            **cells,
            "epoch": f"{'' if student else f'{epoch.title} '}{epoch.number}/{epoch.total}",
            **numbers,
        }

    def _counts(self) -> Text:
        waiting = max(0, self.total - sum(self.ended.values()) - len(self.running))
        counts = {"running": len(self.running), **self.ended, "to do": waiting}
        text = Text(f"{self.total} jobs: ", no_wrap=True, overflow="ellipsis")
        for state, number in counts.items():
            if number:
                bad = state in ("failed", "killed", "diverged")
                text.append(f"{number} {state}", "bold red" if bad else "").append(", ")
        text.right_crop(2)
        left = self.seconds_left()
        return text if left is None else text.append(f"; left {format_duration(left)}")

    def _best(self) -> list[Text]:
        if self.best is None:
            return []
        words = f"best so far: val {format_percent(self.best.accuracy)}, job {self.best.job['number'] + 1}"
        return [Text(f"{words} ({self.label(self.best.job)})", no_wrap=True, overflow="ellipsis")]


def sweep_progress(total: int, fixed: Collection[str] = ()) -> SweepProgress:
    """The table where standard output is a terminal that can draw one, else lines."""
    console = get_console()
    is_terminal = (
        console.is_terminal and not console.is_dumb_terminal and bool(console.file.isatty())
    )
    return LiveProgress(total, fixed) if is_terminal else SweepProgress(total, fixed)
