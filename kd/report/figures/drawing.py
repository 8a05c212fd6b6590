"""Choose the figures that apply to a sweep, draw them and write them to disk."""

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from kd.core.errors import first_line
from kd.core.io import atomic_write
from kd.report.figures.calibration import reliability
from kd.report.figures.differences import differences
from kd.report.figures.epochs import curves
from kd.report.figures.grids import heat
from kd.report.figures.intervals import accuracy
from kd.report.figures.searches import search
from kd.report.figures.selection import FigureNotApplicable
from kd.report.figures.sizes import size
from kd.report.figures.style import short, style
from kd.report.figures.sweeps import response
from kd.report.tables import Tables

Maker = Callable[[], tuple[Any, str]]  # draws a figure; returns it with its caption


class Figure(NamedTuple):
    """A drawn figure, written to the figures folder as `name`.png and `name`.svg.

    `shape` is the ratio of width to height.
    """

    name: str
    title: str
    caption: str
    shape: float


class SkippedFigure(NamedTuple):
    """A figure that was not drawn, and the reason."""

    title: str
    reason: str


def draw(
    tables: Tables, folder: Path, studies: Sequence[tuple[Mapping[str, str] | None, str]] = ()
) -> tuple[list[Figure], list[SkippedFigure]]:
    """Draw the figures that apply to the sweep into `folder`, as PNG and SVG.

    Args:
        tables: The tables of the sweep.
        folder: Where the files are written; it is created if it does not exist.
        studies: For each Optuna study, (its name and storage, ""), or (None, the reason why it
            cannot be identified).

    Returns:
        (drawn figures, skipped figures).
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    skipped = []
    with style() as plt:
        for name, title, make in _applicable_figures(tables, studies):
            try:
                figure, caption = make()
                for extension in ("png", "svg"):
                    _save(figure, folder, name, extension)
                width, height = figure.get_size_inches()
                drawn.append(Figure(name, title, caption, width / height))
            except FigureNotApplicable as error:
                skipped.append(SkippedFigure(title, str(error)))
            except OSError:
                raise
            except Exception as error:  # matplotlib's, for values that no axis can show
                skipped.append(SkippedFigure(title, f"drawing failed: {first_line(error)}"))
            plt.close("all")
    return drawn, skipped


def _applicable_figures(
    tables: Tables, studies: Sequence[tuple[Mapping[str, str] | None, str]]
) -> list[tuple[str, str, Maker]]:
    """Return (name, title, maker) of each figure that a sweep can have."""
    planned: list[tuple[str, str, Maker]] = [
        ("accuracy", "Test accuracy", lambda: accuracy(tables)),
        ("differences", "Difference from the baseline", lambda: differences(tables)),
        ("curves", "Learning curves", lambda: curves(tables)),
    ]
    numeric_keys = numeric(tables)
    for key in numeric_keys:
        title = f"Response to {short(key)}"
        planned.append((f"response-{key}", title, partial(response, tables, key)))
    if not numeric_keys:
        skip = partial(_raise_not_applicable, "no numeric key was swept")
        planned.append(("response", "Response curves", skip))
    pairs = list(itertools.combinations(numeric_keys, 2))
    for row_key, column_key in pairs:
        title = f"{short(row_key)} by {short(column_key)}"
        make_heat = partial(heat, tables, row_key, column_key)
        planned.append((f"heat-{row_key}-{column_key}", title, make_heat))
    if not pairs:
        skip = partial(_raise_not_applicable, "fewer than two numeric keys were swept")
        planned.append(("heat", "Heat maps", skip))
    planned.append(("size", "Accuracy against size", lambda: size(tables)))
    planned.append(("reliability", "Reliability", lambda: reliability(tables)))
    for number, (study, damage) in enumerate(studies, 1):
        name_suffix = ""
        title_suffix = ""
        if len(studies) > 1:
            name_suffix = f"-{number}"
            title_suffix = f": {study['study']}" if study else f": study {number}"
        for plot, title in (
            ("history", "Search history"),
            ("importance", "Hyperparameter importance"),
        ):
            make: Maker = partial(_raise_not_applicable, damage)
            if study:
                make = partial(search, study, plot)
            planned.append((f"search-{plot}{name_suffix}", f"{title}{title_suffix}", make))
    return planned


def _raise_not_applicable(reason: str) -> Any:
    raise FigureNotApplicable(reason)


def _save(figure: Any, folder: Path, name: str, extension: str) -> None:
    metadata = {"Date": None} if extension == "svg" else None
    with atomic_write(folder / f"{name}.{extension}") as temporary, warnings.catch_warnings():
        # a name may contain characters that no installed font has
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(temporary, format=extension, bbox_inches="tight", metadata=metadata)


def numeric(tables: Tables) -> list[str]:
    """Return the swept keys whose values are numbers."""
    return [
        key
        for key in tables.swept
        if key in tables.summary and _is_numeric(tables.summary[key].dropna())
    ]


def _is_numeric(values: "pd.Series[Any]") -> bool:
    return pd.api.types.is_numeric_dtype(values) and values.dtype != bool and values.nunique() > 1
