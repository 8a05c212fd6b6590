"""What a person sees of one run: a line an epoch and, on a terminal, a bar with the time that is left."""

import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import rich
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger("kd")

Item = TypeVar("Item")


class EpochReport(NamedTuple):
    """The end of an epoch of a run, which is a student's or a teacher's by its title."""

    title: str
    number: int
    total: int
    loss: float
    val_accuracy: float | None
    seconds_left: float  # seconds


class Handler(logging.Handler):
    """Log records as plain lines that do not break a progress bar; never wrapped, never coloured.

    In a worker process they are sent to the parent: the record of an epoch as what it is, one with the attribute
    `notice` as a warning is, which a sweep shows.
    """

    def emit(self, record: logging.LogRecord) -> None:
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
    get_console().print(text, soft_wrap=True, markup=False, highlight=False)


class Channel(io.TextIOBase):
    """Stands for the terminal in a worker process: whole lines go to `send(kind, content)`."""

    def __init__(self, send: Callable[[str, Any], Any]):
        self.send, self.rest = send, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.send("line", (logging.INFO, line))
        return len(text)


def redirect_output(send: Callable[[str, Any], Any]) -> None:
    """From now on this process sends its lines and epochs to `send` instead of the terminal, and draws no bar."""
    rich.reconfigure(file=Channel(send), force_terminal=False)


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Inside, what is logged goes to this file as well, dated."""
    if not path.parent.is_dir():  # a run makes its directory itself
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


PROGRESS_INTERVAL = 500  # jobs between two lines about progress, where there is no terminal


def progress(items: Iterable[Item], total: int, title: str) -> Iterator[Item]:
    """Pass items through, with a bar on a terminal and elsewhere a line from time to time."""
    columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    terminal = get_console().is_terminal
    with Progress(*columns, console=get_console(), transient=True, disable=not terminal) as bar:
        task = bar.add_task(title, total=total)
        for number, item in enumerate(items, 1):
            yield item
            bar.advance(task)
            if not terminal and number % PROGRESS_INTERVAL == 0:
                log.info("%s: %d of %d jobs", title, number, total)


def format_percent(x: float | None) -> str:
    return "-" if x is None else f"{100 * x:.2f} %"


def format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
        if minutes >= 60
        else f"{minutes}:{seconds:02d}"
    )


def display_path(path: Path) -> Path:
    """A path as short as it can be typed from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


_NOT_TERMS = ("epoch", "lr", "accuracy", "loss", "seconds", "images_per_second")


def log_progress(
    title: str,
    rows: Iterable[dict[str, Any] | None],
    epochs: int,
    before: Sequence[dict[str, Any]] = (),
) -> Iterator[dict[str, Any] | None]:
    """Pass rows through, saying one line for each; None is passed through silently. `before`: rows of earlier."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    spent = sum(row["seconds"] for row in before)
    with Progress(
        *columns, console=get_console(), transient=True, disable=not get_console().is_terminal
    ) as bar:
        task = bar.add_task(title, total=epochs, completed=len(before))
        for row in rows:
            if row is None:
                yield None
                continue
            spent += row["seconds"]
            left = spent / row["epoch"] * (epochs - row["epoch"])
            terms = "  ".join(
                f"{k} {v:.4f}"
                for k, v in row.items()
                if k not in _NOT_TERMS and not k.startswith("val_")
            )
            val = f"  val {format_percent(row['val_accuracy'])}" if "val_accuracy" in row else ""
            epoch = EpochReport(
                title, row["epoch"], epochs, row["loss"], row.get("val_accuracy"), left
            )
            log.info(
                "%s  epoch %*d/%d  loss %.4f  %s%s  %.1f s  left %s",
                title,
                len(str(epochs)),
                row["epoch"],
                epochs,
                row["loss"],
                terms,
                val,
                row["seconds"],
                format_duration(left),
                extra={"epoch": epoch},
            )
            bar.advance(task)
            yield row
