"""What a person sees in the terminal: a line an epoch and, on a terminal, a bar with the time that is left."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger("kd")


class Handler(logging.Handler):
    """Log records as plain lines that do not break a progress bar; never wrapped, never coloured."""

    def emit(self, record: logging.LogRecord) -> None:
        get_console().print(self.format(record), soft_wrap=True, markup=False, highlight=False)


def percent(x: float | None) -> str:
    return "-" if x is None else f"{100 * x:.2f} %"


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


def place(path: Path) -> Path:
    """A path as short as it can be typed from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


_OWN = ("epoch", "lr", "loss", "seconds", "images_per_second")


def watch(title: str, rows: Iterable[dict[str, Any]], epochs: int) -> Iterator[dict[str, Any]]:
    """Pass rows through, saying one line for each."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    spent = 0.0
    with Progress(*columns, console=get_console(), transient=True, disable=not get_console().is_terminal) as bar:
        task = bar.add_task(title, total=epochs)
        for row in rows:
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
