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

import argparse
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from kd.core import streams
from kd.core.errors import UserError
from kd.core.io import atomic_write, write_text
from kd.report.provenance import facts
from kd.report.published import CAPTION, Line, PublishedComparison, compare_with_published, load
from kd.report.published import COLUMNS as PUBLISHED
from kd.report.stats import against_standard
from kd.report.tables import (
    COLUMNS,
    Tables,
    has_validation,
    load_tables,
    validated,
)
from kd.runs.directory import printable
from kd.runs.labels import MISALIGNED, one_line
from kd.runs.locate import PLAN, is_run, rows_of
from kd.runs.schema import Study, read_record

MAX_PRINTED_SETTINGS = 30  # settings printed to a terminal
MAX_NAMED = 3  # settings or runs listed in a sentence
MAX_FOLDERS = 6  # folders listed in a sentence


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

    Raises:
        UserError: Nothing is written. There are no runs, `out` is the directory of another sweep,
            or an earlier report in `out` counts finished runs that cannot be found now; all only
            with `run_folders`. Or `image_folder_data` does not fit; see `compare_with_published`.
    """
    tables = load_tables(directories, run_folders)
    if run_folders is not None:
        _check_not_empty(tables, directories)
        _check_same_sweep(directories, out)
        _check_not_poorer(tables, directories, out, in_place=_is_report_output(directories, out))
    tables = tables._replace(summary=against_standard(tables.summary, tables.runs))
    comparison = None
    if published_lines:
        comparison = compare_with_published(tables, published_lines, image_folder_data)
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name in ("runs", "history", "summary"):
        frame = getattr(tables, name).drop(columns=["context", "baseline"], errors="ignore")
        files += save(frame, out / name)
    rows = comparison_table(tables)
    if rows:
        frame = pd.DataFrame(rows[1:], columns=[name or "setting" for name in rows[0]])
        write_text(out / "summary.md", frame.to_markdown(index=False, disable_numparse=True) + "\n")
        write_text(out / "summary.tex", to_latex(frame))
        files += ["summary.md", "summary.tex"]
    if comparison:
        files += save_published(comparison, out)
    notes = warnings(tables)
    text = _terminal_text(tables, rows, notes, out)
    text += f"\n\n{published_table(comparison)}" if comparison else ""
    if not figures:
        return Report(tables, text, [], None)

    from kd.report.figures import draw
    from kd.report.html import render

    studies = []
    for folder in directories:
        study_and_damage = read_record(Study, folder / "study.json")
        if any(study_and_damage):
            studies.append(study_and_damage)
    drawn, skipped = draw(tables, out / "figures", studies)
    short_paths = ("/".join(folder.absolute().parts[-2:]) for folder in directories)
    title = printable(" + ".join(short_paths))
    verdict = headline(tables)
    done = tables.runs[tables.runs["status"] == "done"] if len(tables.runs) else tables.runs
    provenance = facts(
        directories,
        tables.provenance,
        list(done.get("train_seconds", ())),
        map(Path, done.get("folder", ())),
    )
    page = render(
        title, out, tables, verdict, notes, rows, drawn, skipped, files, comparison, provenance
    )
    write_text(out / "index.html", page)
    return Report(
        tables, f"{text}\n\n{verdict}", [figure.name for figure in drawn], out / "index.html"
    )


def _terminal_text(tables: Tables, rows: list[list[str]], notes: Sequence[str], out: Path) -> str:
    """Return the comparison for a terminal, without the verdicts and without the last settings.

    The settings left out are those that come last: validation did not choose them.
    """
    omitted = max(0, len(tables.summary) - MAX_PRINTED_SETTINGS)
    shown = rows
    more = []
    if omitted:
        teachers_start = MAX_PRINTED_SETTINGS + 1 + omitted
        shown = [*rows[: MAX_PRINTED_SETTINGS + 1], *rows[teachers_start:]]
        more = [f"... {omitted} more settings in {printable(out / 'summary.csv')}"]
    lines = [
        *align_columns([row[:-1] for row in shown]),
        *more,
        *(f"note: {note}" for note in notes),
    ]
    return "\n".join(lines) if rows else "no run has finished"


def _is_report_output(directories: Sequence[Path], out: Path) -> bool:
    """Return whether a report is written into the directory that it is about."""
    return len(directories) == 1 and directories[0].resolve() == out.resolve()


def _check_not_empty(tables: Tables, directories: Sequence[Path]) -> None:
    """Raise UserError if there is no run at all."""
    if tables.runs.empty:
        raise UserError(f"no run found in {', '.join(map(str, directories))}")
    missing = {printable(folder) for search in tables.searches for folder in search.missing}
    if missing.issuperset(tables.runs["folder"]):
        raise UserError(
            f"none of the planned runs was found ({_run_names(missing)}); "
            f"looked in {_searched_folders(tables)}; "
            "if they were moved, pass the folder that contains them with --runs DIR"
        )


def _check_same_sweep(directories: Sequence[Path], out: Path) -> None:
    """Raise UserError if `out` is the directory of a sweep that the report is not about."""
    if (out / PLAN).exists() and out.resolve() not in {folder.resolve() for folder in directories}:
        raise UserError(
            f"--out: {out} is the directory of another sweep, which has its own report; "
            "choose another directory"
        )


def _check_not_poorer(
    tables: Tables, directories: Sequence[Path], out: Path, in_place: bool
) -> None:
    """Raise UserError if the report in `out` counts finished runs that vanished without a trace.

    A run that is being rerun, or has failed since, leaves a trace in its own files.

    Args:
        tables: The tables of the new report.
        directories: The directories that it is about.
        out: Directory of the report.
        in_place: Whether `out` is the directory that the report is about.
    """
    row_by_name: dict[str, Any] = {
        Path(row["folder"]).name: row for row in tables.runs.to_dict("records")
    }
    previous = [
        Path(row.get("folder", ""))
        for row in rows_of(out / "runs.csv")
        if row.get("status") == "done"
    ]
    roots = [os.path.realpath(folder) for folder in directories]
    expected = {
        folder.name
        for folder in previous
        if in_place or folder.name in row_by_name or any(map(folder.is_relative_to, roots))
    }
    lost = sorted(name for name in expected if not _is_accounted_for(row_by_name.get(name)))
    if not lost:
        return
    damaged = [
        row_by_name[name]["reason"]
        for name in lost
        if name in row_by_name and " is damaged" in row_by_name[name]["reason"]
    ]
    damage = f"; {damaged[0]}" if damaged else ""
    folders = _searched_folders(tables)
    searched = f"; looked in {folders}" if folders else ""
    raise UserError(
        f"{out}: the report there counts {len(previous)} finished runs, but {len(lost)} of them "
        f"cannot be found or read now ({_run_names(lost)}){damage}{searched}; pass the folder that "
        "contains them with --runs DIR, or write a report without them with --out DIR"
    )


def _is_accounted_for(row: Mapping[str, Any] | None) -> bool:
    """Return whether a run that was done still is, or its own files show why it is not."""
    if row is None or " is damaged" in row["reason"]:
        return row is not None and row["status"] == "done"
    return row["status"] != "planned" or (Path(row["folder"]) / "superseded").is_dir()


def _run_names(folders: Collection[str]) -> str:
    """Return the names of the first few run directories, and how many more there are."""
    names = sorted(Path(folder).name for folder in folders)
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _searched_folders(tables: Tables) -> str:
    """Return the folders that were searched for runs."""
    folders = list(dict.fromkeys(folder for search in tables.searches for folder in search.folders))
    more = f" and {len(folders) - MAX_FOLDERS} more" if len(folders) > MAX_FOLDERS else ""
    return ", ".join(map(printable, folders[:MAX_FOLDERS])) + more


def to_latex(frame: pd.DataFrame) -> str:
    """Return a table in LaTeX, with its text escaped."""
    escaped = frame.rename(columns=lambda name: name.replace("%", r"\%")).style.format(
        escape="latex"
    )
    return escaped.hide(axis="index").to_latex(hrules=True)


def save_published(comparison: PublishedComparison, out: Path) -> list[str]:
    """Write published.csv, with numbers, and published.md, with text, and return their names."""
    write_text(out / "published.csv", comparison.table.to_csv(index=False))
    paragraphs = [f"{comparison.title}.", *comparison.missing, CAPTION]
    if comparison.rows:
        columns = [name or "setting" for name in comparison.rows[0]]
        frame = pd.DataFrame(comparison.rows[1:], columns=columns)
        paragraphs.insert(1, frame.to_markdown(index=False, disable_numparse=True))
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


# ---- in words


def _formatter(scale: float, spec: str) -> Callable[[Any], str]:
    return lambda value: "" if pd.isna(value) else format(scale * value, spec)


SUMMARY_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "val_accuracy": ("val, %", _formatter(100, ".2f")),
    "test_nll": ("NLL", _formatter(1, ".3f")),
    "test_ece": ("ECE", _formatter(1, ".3f")),
    "test_agreement": ("agreement, %", _formatter(100, ".1f")),
    "params": ("params", _formatter(1, ",.0f")),
    "budget": ("budget", str),
}


def comparison_table(tables: Tables) -> list[list[str]]:
    """Return the summary as text: a header, its rows, then the teachers.

    The table is empty if no run is done.
    """
    table = tables.summary
    if table.empty:
        return []
    shown = {
        name: column
        for name, column in SUMMARY_COLUMNS.items()
        if name in table and table[name].notna().any()
    }
    for name in ("params", "budget"):  # shown only if they differ
        if table[name].nunique() < 2:
            shown.pop(name, None)
    head = [
        "",
        "n",
        "test, %",
        *(title for title, _ in shown.values()),
        "vs standard",
        "p (Holm)",
        "verdict",
    ]
    rows = []
    for _, row in table.iterrows():
        n = str(row["n"]) if row["n"] == row["planned"] else f"{row['n']} of {row['planned']}"
        rows.append(
            [
                row["setting"],
                n,
                _format_interval(row["test_accuracy"], row["test_accuracy_ci95"], ".2f"),
                *(formatter(row[name]) for name, (_, formatter) in shown.items()),
                _format_interval(row["difference"], row["difference_ci95"], "+.2f"),
                _format_p(row["p_holm"]),
                row["verdict"],
            ]
        )
    for teacher, accuracy, params in teachers(table):
        cells = [f"{params:,.0f}" if name == "params" else "" for name in shown]
        rows.append([f"teacher {teacher}", "", f"{100 * accuracy:.2f}", *cells, "", "", ""])
    return [head, *rows]


def published_table(comparison: PublishedComparison) -> str:
    """Return the comparison with published figures for a terminal, followed by its notes."""
    table = align_columns([row[:-1] for row in comparison.rows]) if comparison.rows else []
    notes = [f"note: {note}" for note in (*comparison.missing, *comparison.notes)]
    return "\n".join([f"{comparison.title}:", *table, *notes, *([CAPTION] if table else [])])


def teachers(table: pd.DataFrame) -> list[tuple[str, float, float]]:
    """Return (name, test accuracy, parameters) of each teacher in a summary."""
    taught = table.dropna(subset=["teacher_test_accuracy"])
    columns = taught[["teacher", "teacher_test_accuracy", "teacher_params"]]
    distinct = columns.round(6).drop_duplicates()
    return list(distinct.itertuples(index=False, name=None))


def _format_interval(value: float, half_width: float, spec: str) -> str:
    """Format a fraction and the half-width of its confidence interval in percent."""
    if pd.isna(value):
        return ""
    interval = "" if pd.isna(half_width) else f" ± {100 * half_width:.2f}"
    return format(100 * value, spec) + interval


def _format_p(value: float) -> str:
    if pd.isna(value):
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines of aligned columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


def warnings(tables: Tables) -> list[str]:
    """Return what a reader must know to interpret the table."""
    notes = _relocation_notes(tables)
    table = tables.summary
    runs = tables.runs
    unfinished = runs[~runs["status"].isin(["done", "pruned"])] if len(runs) else runs
    if len(unfinished):
        counts = unfinished["status"].value_counts()
        states = ", ".join(f"{n} {name}" for name, n in counts.items())
        notes.append(
            f"{len(unfinished)} of {len(runs)} runs are not done ({states}); "
            "run the same command again to complete them"
        )
        if damaged := sum(" is damaged" in reason for reason in unfinished["reason"]):
            notes.append(f"{damaged} of those have damaged files (see the column reason)")
    if table.empty:
        return notes
    if table["n"].nunique() > 1:
        notes.append("the rows have different numbers of seeds")
    if shortened := len(tables.with_short_names()):
        notes.append(
            f"the names of {shortened} settings are shortened; "
            "the column full_setting of runs.csv holds the full names"
        )
    if not table["shares_budget"].all():
        notes.append(
            "not all rows share one budget (epochs x training images); see the column budget"
        )
    if table["method"].str.endswith(MISALIGNED).any():
        notes.append(
            f"{MISALIGNED.strip()} rows: the students were trained, on purpose, on the teacher's "
            "outputs for other images"
        )
    if "val_accuracy" not in table or table["val_accuracy"].isna().any():
        notes.append(
            "without validation images no setting is chosen where a method has several; their rows "
            "keep the order in which they were planned"
        )
    ties = [
        f"{row['setting']} with {row['tied_with']}"
        for _, row in table.dropna(subset=["tied_with"]).iterrows()
    ]
    if ties:
        more = f", and {len(ties) - MAX_NAMED} more" if len(ties) > MAX_NAMED else ""
        notes.append(
            f"settings of the same method tie on validation ({', '.join(ties[:MAX_NAMED])}{more}); "
            "of those, the one planned first is chosen"
        )
    return notes


def _relocation_notes(tables: Tables) -> list[str]:
    """Return what a reader must know about sweeps that were copied or moved."""
    notes = []
    for search in tables.searches:
        sweep = printable(search.sweep)
        if search.moved:
            folders = sorted({str(Path(folder).parent) for folder in search.moved.values()})
            found_in = ", ".join(map(printable, folders[:MAX_NAMED]))
            notes.append(
                f"{len(search.moved)} of {search.jobs} runs of {sweep} are not where they were "
                f"planned; they were found in {found_in}"
            )
        if search.lost:
            notes.append(
                f"{len(search.lost)} of {search.jobs} runs of {sweep} were not found "
                f"({_run_names(search.lost)}); looked in {_searched_folders(tables)}; "
                "pass the folder that contains them with --runs DIR"
            )
    if tables.searches:
        given = tables.searches[0].given
        unused = [printable(folder) for folder in given.folders if folder not in given.used]
        notes += [f"--runs {folder}: no run was taken from this folder" for folder in unused]
    return notes


def headline(tables: Tables) -> str:
    """Return the verdict in two sentences, or in one for each student and data set."""
    table = tables.summary
    if table.empty:
        return "No run has finished. There is nothing to compare yet."
    if table["context"].nunique() > 1:
        sentences = [_best_of(rows) for _, rows in table.groupby("context", sort=False)]
        omitted = len(sentences) - MAX_NAMED
        more = ""
        if omitted > 0:
            noun = "student or data set" if omitted == 1 else "students or data sets"
            more = f" The table has {omitted} more {noun}."
        return " ".join(sentences[:MAX_NAMED]) + more
    first = _best_of(table)
    chosen = table[table["chosen"]]
    if chosen.empty:
        return first
    best = chosen.iloc[0]  # on validation, if there are validation images
    others = chosen[(chosen["setting"] != best["setting"]) & (chosen["method"] != "standard")]
    if len(others):
        verdicts = [
            f"{row['setting']}: {row['verdict']}"
            for _, row in others.head(2).iterrows()
            if row["baseline"]
        ]
        omitted = len(others) - 2
        more = f"; {omitted} more {'is' if omitted == 1 else 'are'} in the table"
        if verdicts:
            return f"{first} {'; '.join(verdicts)}{more if omitted > 0 else ''}."
    if not chosen["baseline"].any() and (chosen["method"] != "standard").any():
        return (
            f"{first} There is no baseline; to add it, run the same command with method=standard."
        )
    if best["n"] == 1:
        return f"{first} With one seed there is no confidence interval; add seed=0,1,2."
    if teacher_rows := teachers(table):
        _, accuracy, _ = teacher_rows[0]
        return f"{first} Its teacher reaches {100 * accuracy:.2f} % test accuracy."
    return f"{first} Nothing else was compared."


def _best_of(table: pd.DataFrame) -> str:
    """Return a sentence about the best setting for one student and data set."""
    chosen = table[table["chosen"]]
    if chosen.empty:
        return (
            "No setting was chosen because there are no validation images to choose on. "
            "The table shows what was measured."
        )
    best = chosen.iloc[0]
    accuracy = _format_interval(best["test_accuracy"], best["test_accuracy_ci95"], ".2f")
    seeds = f"{best['n']} seed{'s' if best['n'] > 1 else ''}"
    verdict = f", {best['verdict']}" if best["method"] != "standard" and best["baseline"] else ""
    return f"{_preferred(table, best['setting'])}{accuracy} % test accuracy ({seeds}){verdict}."


def _preferred(table: pd.DataFrame, best: str) -> str:
    """Return the beginning of the verdict: how the best setting compares on validation.

    Other settings may tie with it.
    """
    if len(table) < 2 or not has_validation(table):
        return f"{best} reaches "
    score = validated(table)
    top = [best, *(name for name in table["setting"][score == score.max()] if name != best)]
    if len(top) == 1:
        return f"Best of {len(table)} settings on validation: {best}, "
    names = f"{', '.join(top[:-1])} and {top[-1]}"
    if len(top) > MAX_NAMED:
        names = f"{', '.join(top[:MAX_NAMED])} and {len(top) - MAX_NAMED} more"
    tie = f"Of {len(table)} settings, {names} tie on validation ({100 * score.max():.2f} %)."
    return f"{tie} The one planned first, {best}, reaches "


@streams.protected()
def main(args: Sequence[str] | None = None) -> None:
    """Run `python -m kd.report`.

    The exit code is 2 if a directory has no runs, or published figures cannot be read.
    """
    parser = _argument_parser()
    options = parser.parse_args(args)
    directories = options.directories
    # the files of a run must not be replaced by those of a report
    in_place = len(directories) == 1 and not is_run(directories[0])
    out = options.out or (directories[0] if in_place else Path("kd-report"))
    try:
        problems = [
            *(f"no such directory: {folder}" for folder in directories if not folder.is_dir()),
            *(
                f"--runs: no such directory: {folder}"
                for folder in options.runs
                if not folder.is_dir()
            ),
        ]
        if problems:
            sys.exit(_print_error(problems[0]))
        if is_run(out):
            sys.exit(
                _print_error(f"{out} is the directory of a run; choose another with --out DIR")
            )
        resolved = out.resolve()
        if resolved != Path(os.path.normpath(out.absolute())):
            out = resolved  # the links of the page to the runs are relative to it
        lines = _load_comparison(options.compare, options.image_folder_data, out)
        report = write(
            directories,
            out,
            published_lines=lines,
            image_folder_data=options.image_folder_data,
            run_folders=options.runs,
        )
    except UserError as error:
        sys.exit(_print_error(str(error)))
    except OSError as error:
        path = error.filename or out
        sys.exit(
            _print_error(
                f"cannot write to {path} ({error.strerror}); choose another directory with "
                "--out DIR"
            )
        )
    print(f"{report.text}\n\nreport   {printable(report.page or out)}")


def _argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "kd.report",
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "directories",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="directory of a sweep or of a run, or one that contains runs",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="directory of the report (default: DIR, or kd-report/ for a run or several DIR)",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        metavar="DIR",
        action="append",
        default=[],
        help="folder to search for runs that are neither where they were planned nor near the "
        "sweep; can be given several times",
    )
    parser.add_argument(
        "--compare",
        metavar="published|CSV",
        help="compare with published figures: those shipped with kd (`published`), or those of a "
        "CSV file with the same columns",
    )
    parser.add_argument(
        "--as",
        dest="image_folder_data",
        metavar="DATA",
        help="with --compare: the data set that an image folder contains, such as cifar10",
    )
    parser.add_argument(
        "--columns",
        action="version",
        help="explain the columns of the tables and exit",
        version="\n".join(explain_columns()),
    )
    return parser


def explain_columns() -> list[str]:
    """Return a line for each column of each table.

    Columns of `published.csv` differ in meaning from those of the same names in other tables.
    """
    tables = {"runs.*, history.*, summary.*": COLUMNS, "published.csv (--compare)": PUBLISHED}
    lines = []
    for title, columns in tables.items():
        lines += [
            "",
            f"{title}:",
            "",
            *(f"{name:22}{meaning}" for name, meaning in columns.items()),
        ]
    return lines[1:]


def _load_comparison(source: str | None, image_folder_data: str | None, out: Path) -> list[Line]:
    """Load the figures of --compare, checked together with --as; an empty list without them."""
    if source is None:
        if image_folder_data is not None:
            raise UserError("--as: requires --compare published or --compare CSV")
        return []
    if Path(source).resolve() == (out / "published.csv").resolve():
        raise UserError(
            f"--compare: {source} would be overwritten by this report; "
            "give your own figures another name"
        )
    lines = load(source)
    if not lines:
        raise UserError(f"--compare: {source} contains no figures")
    return lines


def _print_error(line: str) -> int:
    """Print an error and return the exit code."""
    print(f"kd: {one_line(line)}", file=sys.stderr)
    return 2
