"""The console output of a run: one line per epoch and, on a terminal, a bar with the time left."""

import io
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import rich
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger("kd")

Item = TypeVar("Item")


class EpochReport(NamedTuple):
    """The state of a run at the end of an epoch; the title distinguishes student and teacher."""

    title: str
    number: int
    total: int
    loss: float
    val_accuracy: float | None
    seconds_left: float


class Handler(logging.Handler):
    """Print log records as plain lines: no wrapping, no colour, no broken progress bar.

    In a worker process the records are sent to the parent instead. The record of an epoch is sent
    as an `EpochReport`. A record with the attribute `notice` is sent as a warning, so that a sweep
    shows it.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record, or send it to the parent process."""
        output = get_console().file
        epoch = getattr(record, "epoch", None)
        if not isinstance(output, Channel):
            print_line(self.format(record))
        elif epoch is not None:
            output.send("epoch_ended", epoch)
        else:
            level = logging.WARNING if getattr(record, "notice", False) else record.levelno
            output.send("line", (level, self.format(record)))


def print_line(text: str) -> None:
    """Print text as it is, without wrapping, markup or highlighting."""
    get_console().print(text, soft_wrap=True, markup=False, highlight=False)


class Channel(io.TextIOBase):
    """A replacement for the terminal in a worker process.

    Each complete line is passed to `send(kind, content)`.
    """

    def __init__(self, send: Callable[[str, Any], Any]):
        self.send = send
        self.incomplete_line = ""

    def write(self, text: str) -> int:
        """Send the complete lines, and keep the incomplete last one for the next call."""
        *lines, self.incomplete_line = (self.incomplete_line + text).split("\n")
        for line in lines:
            self.send("line", (logging.INFO, line))
        return len(text)


def redirect_output(send: Callable[[str, Any], Any]) -> None:
    """Send all further lines and epochs of this process to `send`, and draw no progress bars."""
    rich.reconfigure(file=Channel(send), force_terminal=False)


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Write log records to this file as well, with timestamps, for the duration of the context."""
    if not path.parent.is_dir():  # creating the directory is left to the run
        yield
        return
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


PROGRESS_INTERVAL = 500  # jobs between two progress lines, where the output is not a terminal


def progress(items: Iterable[Item], total: int, title: str) -> Iterator[Item]:
    """Pass items through, showing a bar on a terminal or an occasional line elsewhere."""
    columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    terminal = get_console().is_terminal
    with Progress(*columns, console=get_console(), transient=True, disable=not terminal) as bar:
        task = bar.add_task(title, total=total)
        for number, item in enumerate(items, 1):
            yield item
            bar.advance(task)
            if not terminal and number % PROGRESS_INTERVAL == 0:
                log.info("%s: %d of %d jobs", title, number, total)


def format_percent(fraction: float | None) -> str:
    """Format a fraction as a percentage with two decimals, or "-" for None."""
    return "-" if fraction is None else f"{100 * fraction:.2f} %"


def format_duration(seconds: float) -> str:
    """Format a number of seconds as M:SS, or as H:MM:SS from one hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
    return f"{minutes}:{seconds:02d}"


def display_path(path: Path) -> Path:
    """Return the path relative to the working directory if it lies below it, else unchanged."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
