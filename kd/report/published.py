"""Compare measured settings with published figures.

The table of published figures is `published.csv` in this package, or a file with the same columns.
It holds one figure per line:

data, method      named as in kd; the method `standard` is training without a teacher
teacher, student  the architectures; `standard` has no teacher, so the accuracy of a teacher itself
                  is a `standard` figure with that teacher as the student
accuracy          on test images, in %
spread            the value that the source gives after ±
runs              how many runs were averaged
epoch             of the accuracy: best (on test images), last, or unknown
source            where the figure is published (for kd's own table: the README of that repository)
note              what a reader needs to know when comparing
"""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pandas as pd
from pydantic import BaseModel, BeforeValidator, Field

from kd.core.errors import UserError
from kd.report.summary import finished_runs
from kd.report.tables import Tables
from kd.report.text_table import Column, Row, TextTable
from kd.runs.schema import find_error

PACKAGED = Path(__file__).with_name("published.csv")
CAPTION = (
    "Published figures come from other code and other teachers, and often from other "
    "hyperparameters. Many of them are the best test epoch of a run, whereas kd reports the last "
    "epoch. Measured ± is the half-width of the 95 % confidence interval of the mean; published ± "
    "is what the source gives, mostly the standard deviation (SD) over its runs. ± of a "
    "difference is its 95 % interval from both, where the source names its number of runs. It "
    "covers seeds, not other code, so no verdict is given."
)
COLUMNS = {  # of published.csv in a report
    "setting": "setting as in the summary, or a teacher",
    "data": "data set",
    "teacher": "teacher architecture; empty for `standard`; a teacher's own accuracy is compared "
    "as `standard`",
    "student": "student architecture",
    "method": "distillation method",
    "n": "number of measured seeds",
    "measured": "mean test accuracy after the last epoch, %",
    "measured_ci95": "half-width of its 95 % confidence interval (Student's t); empty for n = 1",
    "published": "published accuracy, %",
    "spread": "value that the source gives after ±, mostly the standard deviation over its runs",
    "runs": "number of runs that the published accuracy is the mean of, where known",
    "epoch": "epoch of the published accuracy: best (on test images), last or unknown",
    "difference": "measured minus published, percentage points",
    "difference_ci95": "half-width of its 95 % confidence interval from both spreads (Welch), "
    "where both numbers of runs are known; it covers seeds only",
    "source": "where the figure is published",
    "note": "what a reader needs to know when comparing",
}
TEXT_COLUMNS = (  # of the same comparison as text
    Column("setting", "", "setting"),
    Column("data", "data"),
    Column("models", "models"),
    Column("n", "n", "number"),
    Column("measured", "measured, %", "number"),
    Column("published", "published, % (SD)", "number"),
    Column("difference", "difference", "number"),
    Column("epoch", "epoch"),
    Column("runs", "runs", "number"),
    Column("source", "source"),
    Column("note", "note", "sentence"),
)
WIDTHS = {  # the published tables name these architectures without their width
    "mobilenetv205": "mobilenetv2",
    "shufflenetv210": "shufflenetv2",
}
UNNAMED_DATA = "imagefolder"  # the data set that has no name of its own
MAX_NAMED = 5  # settings without a figure that are listed

NonEmptyString = Annotated[str, Field(min_length=1)]
BlankAsNone = BeforeValidator(lambda text: text or None)


class Line(BaseModel):
    """A line of the table of published figures. Its fields are parsed from text."""

    data: NonEmptyString
    teacher: str
    student: NonEmptyString
    method: NonEmptyString
    accuracy: float = Field(gt=0, lt=100)
    spread: Annotated[float | None, Field(ge=0, lt=100), BlankAsNone]
    runs: Annotated[int | None, Field(gt=0), BlankAsNone]
    epoch: Literal["best", "last", "unknown"]
    source: NonEmptyString
    note: str


class PublishedComparison(NamedTuple):
    """The comparison with published figures, as a report shows it.

    Attributes:
        title: Heading of the section.
        text_table: A row of text for each pair of a measured and a published figure.
        table: The same pairs as numbers, with the columns `COLUMNS`.
        missing: Sentences about the settings without a published figure.
        notes: The notes of the figures, each once.
    """

    title: str
    text_table: TextTable
    table: pd.DataFrame
    missing: list[str]
    notes: list[str]


def load(source: str) -> list[Line]:
    """Load the published figures of a CSV file.

    Args:
        source: Path of the file, or `published` for the figures shipped with kd.

    Raises:
        UserError: The file cannot be read or parsed. The message names the file and the line.
    """
    path = PACKAGED if source == "published" else Path(source)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            missing = [name for name in Line.model_fields if name not in (reader.fieldnames or [])]
            if missing:
                required = ", ".join(Line.model_fields)
                raise UserError(
                    f"--compare: {source} has no column {', '.join(missing)}; required: {required}"
                )
            return [_line(cells, f"--compare: {source} line {reader.line_num}") for cells in reader]
    except FileNotFoundError:
        raise UserError(
            f"--compare: no such file: {source}; use `published` for the figures shipped with kd"
        ) from None
    except (OSError, ValueError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a UTF-8 CSV file"
        raise UserError(f"--compare: cannot read {source} ({reason})") from None


def _line(cells: dict[Any, Any], location: str) -> Line:
    if None in cells:
        raise UserError(f"{location}: more cells than columns; quote cells that contain commas")
    values = {name: " ".join(cells[name].split()) for name in Line.model_fields}
    if problem := find_error(Line, values):
        name = problem.split(":")[0].split()[0]
        if not values[name]:
            raise UserError(f"{location}: {name} is empty")
        raise UserError(f"{location}: {problem}, got {values[name]!r}")
    return Line.model_validate(values)


def compare_with_published(
    tables: Tables, lines: Iterable[Line], image_folder_data: str | None = None
) -> PublishedComparison:
    """Compare settings and teachers with the figures of the same data, models and method.

    Args:
        tables: The measured runs.
        lines: The published figures.
        image_folder_data: The data set that the image folder contains, as given by the user.

    Raises:
        UserError: `image_folder_data` is given, but no run was trained on an image folder, or
            there are no figures for that data set.
    """
    lines = list(lines)
    data_names = sorted({line.data for line in lines})
    measured = _measured(tables)
    if image_folder_data is not None:
        if image_folder_data not in data_names:
            allowed = ", ".join(data_names)
            raise UserError(
                f"--as: no published figures for {image_folder_data!r}; allowed: {allowed}"
            )
        if not any(row["data"] == UNNAMED_DATA for row in measured):
            raise UserError(
                "--as: applies only to image folders, and no finished run was trained on one"
            )
        measured = [
            row | {"data": image_folder_data} if row["data"] == UNNAMED_DATA else row
            for row in measured
        ]

    lines_by_key: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        key = _key(line.data, line.teacher, line.student, line.method)
        lines_by_key.setdefault(key, []).append(line)
    published_students = {_key(line.data, line.student) for line in lines}
    matches: list[dict[str, Any]] = []
    unmatched: list[str] = []
    for row in measured:
        key = _key(row["data"], row["teacher"], row["student"], row["method"])
        figures = lines_by_key.get(key, [])
        matches += [_joined(row, line) for line in figures]
        if not figures:
            label = row["student"]
            if _key(row["data"], row["student"]) in published_students:
                label = f"{row['method']} {_pair(row)}"
            unmatched.append(f"{label} on {row['data']}")
    title = "Comparison with published figures"
    if image_folder_data is not None:
        title += (
            f" (assuming that the image folder contains {image_folder_data}, as given by --as; "
            "not checked)"
        )
    return PublishedComparison(
        title,
        text_table=TextTable(TEXT_COLUMNS, [_text_row(row) for row in matches]),
        table=pd.DataFrame(matches, columns=list(COLUMNS)),
        missing=_unmatched_notes(unmatched, data_names if image_folder_data is None else []),
        notes=_group_notes(matches),
    )


def _key(*names: str) -> tuple[str, ...]:
    """Normalize names for comparison: wrn_40_2, WRN-40-2 and wrn-40-2 are equal."""
    plain = ("".join(c for c in name.lower() if c.isalnum()) for name in names)
    return tuple(WIDTHS.get(name, name) for name in plain)


def _measured(tables: Tables) -> list[dict[str, Any]]:
    """Return a row for each setting, then for each of their teachers; accuracies in %."""
    rows = []
    for _, row in tables.summary.iterrows():
        if not isinstance(row["data"], str):
            continue
        has_teacher = row["method"] != "standard" and isinstance(row["teacher"], str)
        rows.append(
            {
                "setting": row["setting"],
                "data": row["data"],
                "teacher": row["teacher"] if has_teacher else "",
                "student": row["student"],
                "method": row["method"],
                "n": int(row["n"]),
                "measured": 100 * row["test_accuracy"],
                "measured_ci95": 100 * row["test_accuracy_ci95"],
            }
        )
    if tables.summary.empty:
        return rows
    teachers = finished_runs(tables.runs)[["data", "teacher", "teacher_test_accuracy"]].dropna()
    for data, teacher, accuracy in teachers.round(6).drop_duplicates().itertuples(index=False):
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
    return row | {
        "published": line.accuracy,
        "spread": line.spread,
        "runs": line.runs,
        "epoch": line.epoch,
        "difference": row["measured"] - line.accuracy,
        "difference_ci95": _difference_half_width(row, line),
        "source": line.source,
        "note": line.note,
    }


def _pair(row: dict[str, Any]) -> str:
    return f"{row['teacher']} -> {row['student']}" if row["teacher"] else str(row["student"])


def _text_row(row: dict[str, Any]) -> Row:
    """Return a row of the comparison as text."""
    cells = {
        **{name: str(row[name] or "") for name in ("setting", "data", "epoch", "source", "note")},
        "models": _pair(row),
        "n": str(row["n"]),
        "measured": _format_interval(row["measured"], row["measured_ci95"]),
        "published": f"{row['published']:.2f}"
        + (f" (SD {row['spread']:.2f})" if row["spread"] is not None else ""),
        "difference": _format_interval(row["difference"], row["difference_ci95"], "+.2f"),
        "runs": str(row["runs"] or ""),
    }
    return Row(cells)


def _difference_half_width(row: dict[str, Any], line: Line) -> float:
    """Return half the 95 % interval of measured minus published, by Welch's t; nan if unknown."""
    from scipy import stats

    half, n = row["measured_ci95"], row["n"]
    if not line.spread or (line.runs or 0) < 2 or n < 2 or math.isnan(half):
        return math.nan
    runs = int(line.runs or 0)
    ours = (half / float(stats.t.ppf(0.975, n - 1))) ** 2
    theirs = line.spread**2 / runs
    df = (ours + theirs) ** 2 / (ours**2 / (n - 1) + theirs**2 / (runs - 1))
    return float(stats.t.ppf(0.975, df)) * math.sqrt(ours + theirs)


def _format_interval(value: float, half_width: float | None, spec: str = ".2f") -> str:
    if half_width is None or math.isnan(half_width):
        return format(value, spec)
    return f"{format(value, spec)} ± {half_width:.2f}"


def _unmatched_notes(unmatched: list[str], data_names: Sequence[str]) -> list[str]:
    """Return sentences about the settings without a published figure.

    Args:
        unmatched: The settings, with their data sets.
        data_names: The data sets that an image folder could contain, to suggest with --as.
    """
    unmatched = list(dict.fromkeys(unmatched))
    if not unmatched:
        return []
    more = f", and for {len(unmatched) - MAX_NAMED} more" if len(unmatched) > MAX_NAMED else ""
    notes = [f"no published figure for {', '.join(unmatched[:MAX_NAMED])}{more}"]
    if data_names and any(label.endswith(f" on {UNNAMED_DATA}") for label in unmatched):
        choices = " or --as ".join(data_names)
        notes.append(
            "to compare an image folder that contains one of the published data sets, add "
            f"--as {choices}"
        )
    return notes


def _group_notes(matches: list[dict[str, Any]]) -> list[str]:
    """Return each note once, with the methods and sources of the figures that carry it."""
    rows_by_note: dict[str, list[dict[str, Any]]] = {}
    for row in matches:
        rows_by_note.setdefault(row["note"], []).append(row)
    notes = []
    for note, rows in rows_by_note.items():
        methods = ", ".join(dict.fromkeys(row["method"] for row in rows))
        sources = ", ".join(dict.fromkeys(row["source"] for row in rows))
        if note:
            notes.append(f"{methods} in {sources}: {note}")
    return notes
