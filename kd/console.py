"""What a person sees in the terminal: a line an epoch and, on a terminal, a bar with the time that is left."""

import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger("kd")


class Handler(logging.Handler):
    """Log records as plain lines that do not break a progress bar; never wrapped, never coloured."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def say(text: str) -> None:
    get_console().print(text, soft_wrap=True, markup=False, highlight=False)


class _Lines(io.TextIOBase):
    """A file that hands on whole lines."""

    def __init__(self, hand_on: Callable[[str], Any]):
        self.hand_on, self.rest = hand_on, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.hand_on(line)
        return len(text)


def send_to(hand_on: Callable[[str], Any]) -> None:
    """From now on this process says its lines to `hand_on` instead of the terminal, and draws no bar."""
    rich.reconfigure(file=_Lines(hand_on))


@contextmanager
def file(path: Path) -> Iterator[None]:
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


@contextmanager
def bar(total: int) -> Iterator[Callable[[], None]]:
    """On a terminal, a bar over `total` jobs; call what it gives when one has ended."""
    columns = TextColumn("jobs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=get_console(), transient=True, disable=not get_console().is_terminal) as drawn:
        task = drawn.add_task("jobs", total=total)
        yield lambda: drawn.advance(task)


def percent(x: float | None) -> str:
    return "-" if x is None else f"{100 * x:.2f} %"


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


def place(path: Path) -> Path:
    """A path as short as it can be typed from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


_OWN = ("epoch", "lr", "accuracy", "loss", "seconds", "images_per_second")


def watch(
    title: str, rows: Iterable[dict[str, Any] | None], epochs: int, before: Sequence[dict[str, Any]] = ()
) -> Iterator[dict[str, Any] | None]:
    """Pass rows through, saying one line for each; None is passed through silently. `before`: rows of earlier."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    spent = sum(row["seconds"] for row in before)
    with Progress(*columns, console=get_console(), transient=True, disable=not get_console().is_terminal) as bar:
        task = bar.add_task(title, total=epochs, completed=len(before))
        for row in rows:
            if row is None:
                yield None
                continue
            spent += row["seconds"]
            left = spent / row["epoch"] * (epochs - row["epoch"])
            terms = "  ".join(f"{k} {v:.4f}" for k, v in row.items() if k not in _OWN and not k.startswith("val_"))
            val = f"  val {percent(row['val_accuracy'])}" if "val_accuracy" in row else ""
            log.info(
                "%s  epoch %*d/%d  loss %.4f  %s%s  %.1f s  left %s",
                title, len(str(epochs)), row["epoch"], epochs, row["loss"], terms, val, row["seconds"], clock(left),
            )  # fmt: skip
            bar.advance(task)
            yield row
