"""Write a report on sweeps and runs from their files: tables, statistics, figures and one page.

    python -m kd.report multirun/2026-11-24/10-00-00 [more directories]
                        [--out DIR] [--runs DIR] [--compare published]

A directory is that of a sweep, of a run, or one that contains runs (`runs/`). Unfinished and broken
runs are rows with a status. The report is written into that directory or, for a single run or for
several directories, into --out (default: kd-report/). It consists of

runs.csv, history.csv, summary.csv, and each as .parquet     figures/*.png, *.svg
summary.md, summary.tex                                      index.html
published.csv, published.md (with --compare)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from kd.core.io import atomic_write, write_text
from kd.report import details
from kd.report.checks import (
    check_not_empty,
    check_not_poorer,
    check_same_sweep,
    is_report_output,
)
from kd.report.comparison import comparison_table
from kd.report.provenance import Fact, facts
from kd.report.published import CAPTION, Line, PublishedComparison, compare_with_published
from kd.report.stats import against_standard
from kd.report.tables import Tables, load_tables
from kd.report.text_table import TextTable
from kd.report.verdict import claims_text, headline, warnings
from kd.runs.directory import printable
from kd.runs.schema import Study, read_record

MAX_PRINTED_SETTINGS = 30  # settings printed to a terminal


class Report(NamedTuple):
    """A report that was written.

    Attributes:
        tables: The tables.
        text: The comparison as text for a terminal.
        figures: The names of the figures.
        page: The path of the page; None if only the tables were written.
    """

    tables: Tables
    text: str
    figures: list[str]
    page: Path | None


def write(
    directories: Sequence[Path],
    out: Path,
    figures: bool = True,
    published_lines: Sequence[Line] = (),
    image_folder_data: str | None = None,
    run_folders: Sequence[Path] | None = None,
    margin: float | None = None,
) -> Report:
    """Load the runs in `directories` and write their report into `out`.

    Args:
        directories: Directories of sweeps or of runs, or directories that contain runs.
        out: Directory of the report.
        figures: Whether to write the figures and the page too, not only the tables.
        published_lines: Published figures to compare with.
        image_folder_data: The data set that an image folder contains, as given by the user.
        run_folders: Folders to search, in addition to those near a sweep, for runs that are not
            where they were planned. With None, as for a sweep that has just finished, such runs
            are not searched for, and `out` is not checked for an earlier report.
        margin: Differences of accuracy up to this count as none, as a fraction; None takes
            `report.margin` of the runs.

    Raises:
        UserError: Nothing is written. There are no runs, `out` is the directory of another sweep,
            or an earlier report in `out` counts finished runs that cannot be found now; all only
            with `run_folders`. Or `image_folder_data` does not fit; see `compare_with_published`.
    """
    tables = load_tables(directories, run_folders)
    if run_folders is not None:
        check_not_empty(tables, directories)
        check_same_sweep(directories, out)
        check_not_poorer(tables, directories, out, in_place=is_report_output(directories, out))
    if margin is not None:
        tables = tables._replace(margin=margin, margin_is_late=True)
    summary = against_standard(tables.summary, tables.runs, tables.margin)
    tables = tables._replace(summary=summary)
    outputs, problems = details.load_shown(tables)
    if len(summary):
        tables = tables._replace(summary=details.with_image_intervals(tables, outputs))
    published = None
    if published_lines:
        published = compare_with_published(tables, published_lines, image_folder_data)
    out.mkdir(parents=True, exist_ok=True)
    comparison = comparison_table(tables)
    files = _save_tables(tables, comparison, published, out)
    notes = [*warnings(tables), *_outputs_notes(problems)]
    text = _terminal_text(tables, comparison, notes, out)
    if published:
        text += f"\n\n{_published_text(published)}"
    if not figures:
        return Report(tables, text, [], None)

    from kd.report.figures import draw
    from kd.report.html import Page, render

    drawn, skipped = draw(tables, out / "figures", _searches(directories))
    verdict = headline(tables)
    page = Page(
        title=printable(" + ".join("/".join(x.absolute().parts[-2:]) for x in directories)),
        folder=out,
        tables=tables,
        verdict=verdict,
        notes=notes,
        comparison=comparison,
        figures=drawn,
        skipped=skipped,
        files=files,
        published=published,
        facts=_facts(directories, tables),
        claims=claims_text(tables),
        details=_details(tables, outputs),
    )
    write_text(out / "index.html", render(page))
    names = [figure.name for figure in drawn]
    return Report(tables, f"{text}\n\n{verdict}", names, out / "index.html")


def _details(tables: Tables, outputs: details.OutputsBySetting) -> list[details.Detail]:
    """Return the tables that follow the comparison, without those that do not apply."""
    if tables.summary.empty:
        return []
    candidates = [
        details.variance(tables),
        details.new_images(tables, outputs),
        details.probabilities(tables),
        *details.classes(tables, outputs),
        details.ledger(tables),
    ]
    return [detail for detail in candidates if detail]


def _outputs_notes(problems: Sequence[str]) -> list[str]:
    """Return a note about outputs for the test images that could not be read."""
    if not problems:
        return []
    more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
    return [f"outputs for the test images could not be read: {printable(problems[0])}{more}"]


def _save_tables(
    tables: Tables, comparison: TextTable, published: PublishedComparison | None, out: Path
) -> list[str]:
    """Write all tables into `out`, and return the names of the files."""
    files = []
    for name in ("runs", "history", "summary"):
        frame = getattr(tables, name).drop(columns=["context", "baseline"], errors="ignore")
        files += save(frame, out / name)
    if comparison.rows:
        write_text(out / "summary.md", comparison.markdown())
        write_text(out / "summary.tex", comparison.latex())
        files += ["summary.md", "summary.tex"]
    if published:
        files += _save_published(published, out)
    return files


def _searches(directories: Sequence[Path]) -> list[tuple[dict[str, str] | None, str]]:
    """Return the record of each hyperparameter search, or what is wrong with it."""
    records = [read_record(Study, folder / "study.json") for folder in directories]
    return [record for record in records if any(record)]


def _facts(directories: Sequence[Path], tables: Tables) -> list[Fact]:
    """Return what was run."""
    done = tables.runs[tables.runs["status"] == "done"] if len(tables.runs) else tables.runs
    seconds = list(done.get("train_seconds", ()))
    return facts(directories, tables.provenance, seconds, map(Path, done.get("folder", ())))


def _terminal_text(tables: Tables, comparison: TextTable, notes: Sequence[str], out: Path) -> str:
    """Return the comparison for a terminal, without the verdicts and without the last settings.

    The settings left out are those that come last: validation did not choose them.
    """
    if not comparison.rows:
        return "no run has finished"
    omitted = max(0, len(tables.summary) - MAX_PRINTED_SETTINGS)
    shown = comparison
    more = []
    if omitted:
        teachers = comparison.rows[len(tables.summary) :]
        shown = comparison._replace(rows=[*comparison.rows[:MAX_PRINTED_SETTINGS], *teachers])
        more = [f"... {omitted} more settings in {printable(out / 'summary.csv')}"]
    lines = shown.lines(without=["verdict"])
    return "\n".join([*lines, *more, *(f"note: {note}" for note in notes)])


def _published_text(published: PublishedComparison) -> str:
    """Return the comparison with published figures for a terminal, followed by its notes."""
    notes = [f"note: {note}" for note in (*published.missing, *published.notes)]
    if not published.text_table.rows:
        return "\n".join([f"{published.title}:", *notes])
    lines = published.text_table.lines(without=["note"])
    return "\n".join([f"{published.title}:", *lines, *notes, CAPTION])


def _save_published(published: PublishedComparison, out: Path) -> list[str]:
    """Write published.csv, with numbers, and published.md, with text, and return their names."""
    write_text(out / "published.csv", published.table.to_csv(index=False))
    paragraphs = [f"{published.title}.", *published.missing, CAPTION]
    if published.text_table.rows:
        paragraphs.insert(1, published.text_table.markdown().rstrip("\n"))
    write_text(out / "published.md", "\n\n".join(paragraphs) + "\n")
    return ["published.csv", "published.md"]


def save(frame: pd.DataFrame, path: Path) -> list[str]:
    """Write `path`.csv and `path`.parquet atomically, and return their names."""
    write_text(path.with_suffix(".csv"), frame.to_csv(index=False))
    typed = frame.convert_dtypes()
    for name in typed.select_dtypes(object):  # a swept key whose values mix numbers and words
        typed[name] = typed[name].map(str, na_action="ignore").astype("string")
    with atomic_write(path.with_suffix(".parquet")) as partial_file:
        typed.to_parquet(partial_file, index=False)
    return [f"{path.name}.csv", f"{path.name}.parquet"]
