"""Measured settings beside published figures: the table of those, and the comparison that a report shows.

The table (`published.csv` here, or one of a user's own with the same columns) holds a figure a line:

data, method     by the names that kd has for them; `standard` is training without a teacher
teacher, student the models; `standard` has no teacher, so that a teacher's own accuracy is a `standard` figure of it
accuracy         on test images, in %; spread is what its source gives after ±, runs how many were averaged
epoch            of the accuracy: best (on test images), last, or unknown
source, note     where the figure is written (in kd's own table: the README of that repository), and what a reader
                 must know to compare it
"""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pandas as pd
from pydantic import BaseModel, BeforeValidator, Field

from kd.core.errors import UserError
from kd.report.tables import Tables, finished_runs
from kd.runs.schema import find_error

PACKAGED = Path(__file__).with_name("published.csv")
CAPTION = (
    "Published figures come from other code and other teachers, often from other hyperparameters, and many are the "
    "best test epoch of a run, where kd's are the last epoch. ± is the 95 % confidence interval of the measured mean; "
    "a difference of some tenths of a point is within what seeds and the choice of the epoch make."
)
COLUMNS = {  # of published.csv in a report's folder
    "setting": "as in the summary, or a teacher",
    "data": "the data set",
    "teacher": "the teacher's model; none for `standard`, which is also what a teacher itself is compared as",
    "student": "the student's model",
    "method": "the distillation method",
    "n": "seeds that were measured",
    "measured": "mean test accuracy after the last epoch, %",
    "measured_ci95": "half the width of its 95 % confidence interval (Student's t); none for n = 1",
    "published": "the published accuracy, %",
    "spread": "what its source gives after ±",
    "runs": "how many runs it is the mean of, where that is known",
    "epoch": "of which epoch it is: best (on test images), last, unknown",
    "difference": "measured minus published, points",
    "source": "where it is written",
    "note": "what to know to compare it",
}
HEAD = [
    "",
    "data",
    "models",
    "n",
    "measured, %",
    "published, %",
    "difference",
    "epoch",
    "runs",
    "source",
    "note",
]
WIDTHS = {
    "mobilenetv205": "mobilenetv2",
    "shufflenetv210": "shufflenetv2",
}  # the tables' nets, whose width goes unsaid
UNNAMED_DATA = "imagefolder"  # the data set that has no name of its own
MAX_NAMED = 5  # settings without a figure that are named

Words = Annotated[str, Field(min_length=1)]
Blank = BeforeValidator(lambda text: text or None)


class Line(BaseModel):
    """A line of the table. Its cells are text when it is read."""

    data: Words
    teacher: str
    student: Words
    method: Words
    accuracy: float = Field(gt=0, lt=100)
    spread: Annotated[float | None, Field(ge=0, lt=100), Blank]
    runs: Annotated[int | None, Field(gt=0), Blank]
    epoch: Literal["best", "last", "unknown"]
    source: Words
    note: str


class PublishedComparison(NamedTuple):
    """What a report shows: a title; a head and a row for each measured and published figure of the same, as text and
    as a table of `COLUMNS`; what has no published figure; and the notes of the figures, each once."""

    title: str
    rows: list[list[str]]
    table: pd.DataFrame
    missing: list[str]
    notes: list[str]


def load(place: str) -> list[Line]:
    """The figures of a file, or of kd's own for `published`. **Raises:** UserError, one line naming file and line."""
    path = PACKAGED if place == "published" else Path(place)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            missing = [name for name in Line.model_fields if name not in (reader.fieldnames or [])]
            if missing:
                needed = ", ".join(Line.model_fields)
                raise UserError(
                    f"--compare: {place} has no column {', '.join(missing)}; needed: {needed}"
                )
            return [_line(cells, f"--compare: {place} line {reader.line_num}") for cells in reader]
    except FileNotFoundError:
        raise UserError(f"--compare: no file {place}; `published` takes kd's own figures") from None
    except (OSError, ValueError, csv.Error) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not a CSV file in UTF-8"
        raise UserError(f"--compare: cannot read {place} ({why})") from None


def _line(cells: dict[Any, Any], where: str) -> Line:
    if None in cells:
        raise UserError(f"{where}: more cells than columns; a cell with a comma needs quotes")
    said = {name: " ".join(cells[name].split()) for name in Line.model_fields}
    if wrong := find_error(Line, said):
        name = wrong.split(":")[0].split()[0]
        raise UserError(
            f"{where}: {wrong}, got {said[name]!r}" if said[name] else f"{where}: {name} is empty"
        )
    return Line.model_validate(said)


def compare_with_published(
    tables: Tables, lines: Iterable[Line], given_as: str | None = None
) -> PublishedComparison:
    """Each measured setting, and each teacher, beside the figures of the same data, models and method.

    **Arguments:** `given_as`: the data set whose images an image folder holds, as the user says.
    **Raises:** UserError when no image folder was trained on, or there is no figure of such data.
    """
    lines = list(lines)
    named = sorted({line.data for line in lines})
    measured = _measured(tables)
    if given_as is not None:
        if given_as not in named:
            raise UserError(
                f"--as: there is no figure on {given_as!r}; allowed: {', '.join(named)}"
            )
        if not any(row["data"] == UNNAMED_DATA for row in measured):
            raise UserError(
                "--as: it names the data of an image folder, and no finished run here was trained on one"
            )
        measured = [
            row | {"data": given_as} if row["data"] == UNNAMED_DATA else row for row in measured
        ]

    known: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        known.setdefault(_key(line.data, line.teacher, line.student, line.method), []).append(line)
    some = {_key(line.data, line.student) for line in lines}
    found: list[dict[str, Any]] = []
    left: list[str] = []
    for row in measured:
        figures = known.get(_key(row["data"], row["teacher"], row["student"], row["method"]), [])
        found += [_joined(row, line) for line in figures]
        if not figures:
            what = (
                f"{row['method']} {_pair(row)}"
                if _key(row["data"], row["student"]) in some
                else row["student"]
            )
            left.append(f"{what} on {row['data']}")
    title = "Beside published figures"
    if given_as is not None:
        title += f" (that the image folder holds {given_as} was said with --as, and is not checked)"
    rows = [HEAD, *map(_cells, found)] if found else []
    missing = _unmatched_notes(left, named if given_as is None else [])
    return PublishedComparison(
        title, rows, pd.DataFrame(found, columns=list(COLUMNS)), missing, _group_notes(found)
    )


def _key(*names: str) -> tuple[str, ...]:
    """Names as they are compared: wrn_40_2, WRN-40-2 and wrn-40-2 are one."""
    plain = ("".join(c for c in name.lower() if c.isalnum()) for name in names)
    return tuple(WIDTHS.get(name, name) for name in plain)


def _measured(tables: Tables) -> list[dict[str, Any]]:
    """A row for each setting, then for each teacher that they had; accuracies in %."""
    rows = []
    for _, row in tables.summary.iterrows():
        if not isinstance(row["data"], str):
            continue
        teacher = (
            row["teacher"]
            if row["method"] != "standard" and isinstance(row["teacher"], str)
            else ""
        )
        rows.append(
            {
                "setting": row["setting"],
                "data": row["data"],
                "teacher": teacher,
                "student": row["student"],
                "method": row["method"],
                "n": int(row["n"]),
                "measured": 100 * row["test_accuracy"],
                "measured_ci95": 100 * row["test_accuracy_ci95"],
            }
        )
    if tables.summary.empty:
        return rows
    taught = finished_runs(tables.runs)[["data", "teacher", "teacher_test_accuracy"]].dropna()
    for data, teacher, accuracy in taught.round(6).drop_duplicates().itertuples(index=False):
        if not isinstance(data, str):
            continue
        rows.append(
            {
                "setting": f"teacher {teacher}",
                "data": data,
                "teacher": "",
                "student": teacher,
                "method": "standard",
                "n": 1,
                "measured": 100 * accuracy,
                "measured_ci95": math.nan,
            }
        )
    return rows


def _joined(row: dict[str, Any], line: Line) -> dict[str, Any]:
    figure = {
        "published": line.accuracy,
        "spread": line.spread,
        "runs": line.runs,
        "epoch": line.epoch,
    }
    words = {"source": line.source, "note": line.note}
    return row | figure | {"difference": row["measured"] - line.accuracy} | words


def _pair(row: dict[str, Any]) -> str:
    return f"{row['teacher']} -> {row['student']}" if row["teacher"] else str(row["student"])


def _cells(row: dict[str, Any]) -> list[str]:
    """A row of the table as text, under `HEAD`."""
    return [
        row["setting"],
        row["data"],
        _pair(row),
        str(row["n"]),
        _format_interval(row["measured"], row["measured_ci95"]),
        _format_interval(row["published"], row["spread"]),
        f"{row['difference']:+.2f}",
        row["epoch"],
        str(row["runs"] or ""),
        row["source"],
        row["note"],
    ]


def _format_interval(value: float, half: float | None) -> str:
    return f"{value:.2f}" + ("" if half is None or math.isnan(half) else f" ± {half:.2f}")


def _unmatched_notes(left: list[str], named: Sequence[str]) -> list[str]:
    """Remarks on what has no figure; `named`: the data sets that an image folder could be said to hold."""
    left = list(dict.fromkeys(left))
    if not left:
        return []
    more = f", and for {len(left) - MAX_NAMED} more" if len(left) > MAX_NAMED else ""
    notes = [f"no published figure for {', '.join(left[:MAX_NAMED])}{more}"]
    if named and any(words.endswith(f" on {UNNAMED_DATA}") for words in left):
        notes.append(f"whose images a folder holds can be said: --as {' or --as '.join(named)}")
    return notes


def _group_notes(found: list[dict[str, Any]]) -> list[str]:
    """Each note of the figures once, with the methods and sources that it is of."""
    of: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        of.setdefault(row["note"], []).append(row)
    notes = []
    for note, rows in of.items():
        methods, sources = (
            ", ".join(dict.fromkeys(row[key] for row in rows)) for key in ("method", "source")
        )
        notes += [f"{methods} in {sources}: {note}"] if note else []
    return notes
