"""Which figures a sweep calls for, and how they reach the disk."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from kd.core.errors import first_line
from kd.core.io import atomic_write
from kd.report.figures.calibration import reliability
from kd.report.figures.epochs import curves
from kd.report.figures.grids import heat
from kd.report.figures.intervals import accuracy
from kd.report.figures.searches import search
from kd.report.figures.selection import FigureNotApplicable
from kd.report.figures.sizes import size
from kd.report.figures.style import short, style
from kd.report.figures.sweeps import response
from kd.report.tables import Tables

Maker = Callable[[], tuple[Any, str]]  # draws a figure, and gives it with its caption


class Figure(NamedTuple):
    """A drawn figure: `name`.png and `name`.svg lie in the report's folder; `shape` is width by height."""

    name: str
    title: str
    caption: str
    shape: float


class SkippedFigure(NamedTuple):
    """A figure that was not drawn, and why."""

    title: str
    reason: str


def draw(
    tables: Tables, folder: Path, studies: Sequence[tuple[Mapping[str, str] | None, str]] = ()
) -> tuple[list[Figure], list[SkippedFigure]]:
    """Draw what the sweep's shape calls for into `folder`, as PNG and SVG. Each of `studies` names an Optuna study, or
    says why it cannot be named.

    **Returns:** (drawn, left out).
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn, left = [], []
    with style() as plt:
        for name, title, make in _applicable_figures(tables, studies):
            try:
                figure, caption = make()
                for ending in ("png", "svg"):
                    _save(figure, folder, name, ending)
                width, height = figure.get_size_inches()
                drawn.append(Figure(name, title, caption, width / height))
            except FigureNotApplicable as why:
                left.append(SkippedFigure(title, str(why)))
            except OSError:
                raise
            except Exception as error:  # of matplotlib, for values that no axis can hold
                left.append(SkippedFigure(title, f"it cannot be drawn: {first_line(error)}"))
            plt.close("all")
    return drawn, left


def _applicable_figures(
    tables: Tables, studies: Sequence[tuple[Mapping[str, str] | None, str]]
) -> list[tuple[str, str, Maker]]:
    """(name, title, maker) of each figure that a sweep can have."""
    wanted: list[tuple[str, str, Maker]] = [
        ("accuracy", "Test accuracy", lambda: accuracy(tables)),
        ("curves", "Learning curves", lambda: curves(tables)),
    ]
    numbers = numeric(tables)
    for key in numbers:
        wanted.append(
            (f"response-{key}", f"Response to {short(key)}", partial(response, tables, key))
        )
    if not numbers:
        wanted.append(
            ("response", "Response curves", partial(_raise_not_applicable, "no number was swept"))
        )
    pairs = [(a, b) for i, a in enumerate(numbers) for b in numbers[i + 1 :]]
    for a, b in pairs:
        wanted.append((f"heat-{a}-{b}", f"{short(a)} by {short(b)}", partial(heat, tables, a, b)))
    if not pairs:
        wanted.append(
            (
                "heat",
                "Heat maps",
                partial(_raise_not_applicable, "fewer than two numbers were swept"),
            )
        )
    wanted.append(("size", "Accuracy against size", lambda: size(tables)))
    wanted.append(("reliability", "Reliability", lambda: reliability(tables)))
    for number, (study, damage) in enumerate(studies, 1):
        ending, name = (
            ("", "")
            if len(studies) == 1
            else (f"-{number}", f" {study['study'] if study else number}")
        )
        for what, title in (
            ("history", "History of the search"),
            ("importance", "Importance of what was searched"),
        ):
            make = partial(search, study, what) if study else partial(_raise_not_applicable, damage)
            wanted.append((f"search-{what}{ending}", f"{title}{name}", make))
    return wanted


def _raise_not_applicable(reason: str) -> Any:
    raise FigureNotApplicable(reason)


def _save(figure: Any, folder: Path, name: str, ending: str) -> None:
    metadata = {"Date": None} if ending == "svg" else None
    with atomic_write(folder / f"{name}.{ending}") as part, warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph"
        )  # a name may be in letters that no installed font has
        figure.savefig(part, format=ending, bbox_inches="tight", metadata=metadata)


def numeric(tables: Tables) -> list[str]:
    """The swept keys that are numbers."""
    return [
        key
        for key in tables.swept
        if key in tables.summary and _is_numeric(tables.summary[key].dropna())
    ]


def _is_numeric(values: "pd.Series[Any]") -> bool:
    return pd.api.types.is_numeric_dtype(values) and values.dtype != bool and values.nunique() > 1
