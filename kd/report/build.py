"""A report on sweeps and runs, at any time: tables, statistics, figures and one page, from files alone.

    python -m kd.report multirun/2026-11-24/10-00-00 [more directories] [--out DIR] [--runs DIR] [--compare published]

A directory is a sweep's, a run's, or one that holds runs (`runs/`). Unfinished and broken runs are rows with a status.
Written into that directory or, for a run's or for several, into --out (default: kd-report/):

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
    MISALIGNED,
    Tables,
    has_validation,
    is_run,
    load_tables,
    printable,
    validated,
)
from kd.runs.labels import one_line
from kd.runs.locate import PLAN, rows_of
from kd.runs.schema import Study, read_record

MAX_PRINTED_SETTINGS = 30  # settings that a terminal is shown
MAX_NAMED = 3  # settings or runs that a sentence names
MAX_FOLDERS = 6  # folders that it names


class Report(NamedTuple):
    """What was written: the tables, the comparison as text for a terminal, the figures' names, and the page."""

    tables: Tables
    text: str
    figures: list[str]
    page: Path | None


def write(
    places: Sequence[Path],
    out: Path,
    figures: bool = True,
    against: Sequence[Line] = (),
    given_as: str | None = None,
    runs: Sequence[Path] | None = None,
) -> Report:
    """Gather `places` and write everything into `out`; without `figures` (quickly) only the tables.

    **Arguments:** `against`: published figures to set the measured beside; `given_as`: the data set whose images an
    image folder holds; `runs`: folders in which runs are looked for, beside those near a sweep, that are not where
    they were planned. None: they are not looked for, which is for the sweep that has just run them.
    **Raises:** UserError, and nothing is written, when there is no run, or an earlier report in `out` counts finished
    runs that are not there now; then only with `runs`.
    """
    tables = load_tables(places, runs)
    if runs is not None:
        _check_not_empty(tables, places)
        _check_same_sweep(places, out)
        _check_not_poorer(tables, places, out, own=_is_report_output(places, out))
    tables = tables._replace(summary=against_standard(tables.summary, tables.runs))
    compared = compare_with_published(tables, against, given_as) if against else None
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name in ("runs", "history", "summary"):
        files += save(
            getattr(tables, name).drop(columns=["context", "baseline"], errors="ignore"), out / name
        )
    rows = comparison_table(tables)
    if rows:
        frame = pd.DataFrame(rows[1:], columns=[name or "setting" for name in rows[0]])
        write_text(out / "summary.md", frame.to_markdown(index=False, disable_numparse=True) + "\n")
        write_text(out / "summary.tex", to_latex(frame))
        files += ["summary.md", "summary.tex"]
    if compared:
        files += save_published(compared, out)
    notes = warnings(tables)
    cut = max(
        0, len(tables.summary) - MAX_PRINTED_SETTINGS
    )  # of the settings that validation did not choose, which come last
    shown = (
        [*rows[: MAX_PRINTED_SETTINGS + 1], *rows[MAX_PRINTED_SETTINGS + 1 + cut :]]
        if cut
        else rows
    )
    more = [f"... {cut} more settings in {printable(out / 'summary.csv')}"] if cut else []
    lines = [
        *align_columns([row[:-1] for row in shown]),
        *more,
        *(f"note: {note}" for note in notes),
    ]
    said = "\n".join(lines) if rows else "no job finished"
    said += f"\n\n{published_table(compared)}" if compared else ""
    if not figures:
        return Report(tables, said, [], None)

    from kd.report.figures import draw
    from kd.report.html import render

    studies = [found for place in places if any(found := read_record(Study, place / "study.json"))]
    drawn, left = draw(tables, out / "figures", studies)
    title = printable(" + ".join("/".join(place.absolute().parts[-2:]) for place in places))
    verdict = headline(tables)
    done = tables.runs[tables.runs["status"] == "done"] if len(tables.runs) else tables.runs
    about = facts(
        places,
        tables.provenance,
        list(done.get("train_seconds", ())),
        map(Path, done.get("folder", ())),
    )
    page = render(title, out, tables, verdict, notes, rows, drawn, left, files, compared, about)
    write_text(out / "index.html", page)
    return Report(
        tables, f"{said}\n\n{verdict}", [figure.name for figure in drawn], out / "index.html"
    )


def _is_report_output(places: Sequence[Path], out: Path) -> bool:
    """Whether a report is written into the directory that it is on."""
    return len(places) == 1 and places[0].resolve() == out.resolve()


def _check_not_empty(tables: Tables, places: Sequence[Path]) -> None:
    """Raise UserError where there is no run at all."""
    if tables.runs.empty:
        raise UserError(f"no run in {', '.join(map(str, places))}")
    absent = {printable(folder) for search in tables.searches for folder in search.missing}
    if absent.issuperset(tables.runs["folder"]):
        raise UserError(
            f"none of the planned runs is there ({_run_names(absent)}); looked in {_searched_folders(tables)}; "
            "if they were moved, give the folder that holds them with --runs DIR"
        )


def _check_same_sweep(places: Sequence[Path], out: Path) -> None:
    """Raise UserError where `out` is the directory of a sweep that the report is not on."""
    if (out / PLAN).exists() and out.resolve() not in {place.resolve() for place in places}:
        raise UserError(
            f"--out: {out} is the directory of another sweep, whose report lies there; choose another"
        )


def _check_not_poorer(tables: Tables, places: Sequence[Path], out: Path, own: bool) -> None:
    """Raise UserError where the report in `out` counts finished runs that are gone, without a sign of what became of
    them. A run that is done again, or failed since, leaves one."""
    now: dict[str, Any] = {Path(row["folder"]).name: row for row in tables.runs.to_dict("records")}
    before = [
        Path(row.get("folder", ""))
        for row in rows_of(out / "runs.csv")
        if row.get("status") == "done"
    ]
    bases = [os.path.realpath(place) for place in places]
    mine = {
        folder.name
        for folder in before
        if own or folder.name in now or any(map(folder.is_relative_to, bases))
    }
    lost = sorted(name for name in mine if not _with_explanations(now.get(name)))
    if not lost:
        return
    damaged = [
        now[name]["reason"] for name in lost if name in now and " is damaged" in now[name]["reason"]
    ]
    why = f"; {damaged[0]}" if damaged else ""
    looked = _searched_folders(tables)
    raise UserError(
        f"{out}: the report there counts {len(before)} finished runs, of which {len(lost)} are not found now "
        f"({_run_names(lost)}){why}{f'; looked in {looked}' if looked else ''}; give the folder that holds them with "
        "--runs DIR, or write a report without them with --out DIR"
    )


def _with_explanations(row: Mapping[str, Any] | None) -> bool:
    """Whether a run that was done still is or its own files say why not."""
    if row is None or " is damaged" in row["reason"]:
        return row is not None and row["status"] == "done"
    return row["status"] != "planned" or (Path(row["folder"]) / "superseded").is_dir()


def _run_names(folders: Collection[str]) -> str:
    """A few of the runs by the names of their directories."""
    names = sorted(Path(folder).name for folder in folders)
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _searched_folders(tables: Tables) -> str:
    """The folders in which runs were looked for."""
    folders = list(dict.fromkeys(folder for search in tables.searches for folder in search.folders))
    more = f" and {len(folders) - MAX_FOLDERS} more" if len(folders) > MAX_FOLDERS else ""
    return ", ".join(map(printable, folders[:MAX_FOLDERS])) + more


def to_latex(frame: pd.DataFrame) -> str:
    escaped = frame.rename(columns=lambda name: name.replace("%", r"\%")).style.format(
        escape="latex"
    )
    return escaped.hide(axis="index").to_latex(hrules=True)


def save_published(compared: PublishedComparison, out: Path) -> list[str]:
    """published.csv, in numbers, and published.md, in words."""
    write_text(out / "published.csv", compared.table.to_csv(index=False))
    said = [f"{compared.title}.", *compared.missing, CAPTION]
    if compared.rows:
        frame = pd.DataFrame(
            compared.rows[1:], columns=[name or "setting" for name in compared.rows[0]]
        )
        said.insert(1, frame.to_markdown(index=False, disable_numparse=True))
    write_text(out / "published.md", "\n\n".join(said) + "\n")
    return ["published.csv", "published.md"]


def save(frame: pd.DataFrame, path: Path) -> list[str]:
    """`path`.csv and `path`.parquet, each whole or not at all."""
    write_text(path.with_suffix(".csv"), frame.to_csv(index=False))
    typed = frame.convert_dtypes()
    for name in typed.select_dtypes(object):  # a swept key that is now a number, now a word
        typed[name] = typed[name].map(str, na_action="ignore").astype("string")
    with atomic_write(path.with_suffix(".parquet")) as part:
        typed.to_parquet(part, index=False)
    return [f"{path.name}.csv", f"{path.name}.parquet"]


# ---- in words


def _formatter(scale: float, form: str) -> Callable[[Any], str]:
    return lambda value: "" if pd.isna(value) else format(scale * value, form)


SUMMARY_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "val_accuracy": ("val, %", _formatter(100, ".2f")),
    "test_nll": ("NLL", _formatter(1, ".3f")),
    "test_ece": ("ECE", _formatter(1, ".3f")),
    "test_agreement": ("agreement, %", _formatter(100, ".1f")),
    "params": ("params", _formatter(1, ",.0f")),
    "budget": ("budget", str),
}


def comparison_table(tables: Tables) -> list[list[str]]:
    """The summary as text: a head, then a row for each of its rows, then the teachers. Empty when no run is done."""
    table = tables.summary
    if table.empty:
        return []
    shown = {
        name: how
        for name, how in SUMMARY_COLUMNS.items()
        if name in table and table[name].notna().any()
    }
    for name in ("params", "budget"):  # said where they differ
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
                *(form(row[name]) for name, (_, form) in shown.items()),
                _format_interval(row["difference"], row["difference_ci95"], "+.2f"),
                _format_p(row["p_holm"]),
                row["verdict"],
            ]
        )
    for teacher, accuracy, params in teachers(table):
        extra = [f"{params:,.0f}" if name == "params" else "" for name in shown]
        rows.append([f"teacher {teacher}", "", f"{100 * accuracy:.2f}", *extra, "", "", ""])
    return [head, *rows]


def published_table(compared: PublishedComparison) -> str:
    """The comparison with published figures for a terminal; the notes of the figures are beneath it."""
    table = align_columns([row[:-1] for row in compared.rows]) if compared.rows else []
    notes = [f"note: {note}" for note in (*compared.missing, *compared.notes)]
    return "\n".join([f"{compared.title}:", *table, *notes, *([CAPTION] if table else [])])


def teachers(table: pd.DataFrame) -> list[tuple[str, float, float]]:
    """(name, test accuracy, parameters) of each teacher in a summary."""
    known = table.dropna(subset=["teacher_test_accuracy"])
    found = known[["teacher", "teacher_test_accuracy", "teacher_params"]].round(6).drop_duplicates()
    return list(found.itertuples(index=False, name=None))


def _format_interval(value: float, half: float, form: str) -> str:
    if pd.isna(value):
        return ""
    return format(100 * value, form) + ("" if pd.isna(half) else f" ± {100 * half:.2f}")


def _format_p(value: float) -> str:
    return "" if pd.isna(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines of columns: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


def warnings(tables: Tables) -> list[str]:
    """What a reader must know before believing the table."""
    found, table, runs = _relocation_notes(tables), tables.summary, tables.runs
    open_ = runs[~runs["status"].isin(["done", "pruned"])] if len(runs) else runs
    if len(open_):
        states = ", ".join(f"{n} {name}" for name, n in open_["status"].value_counts().items())
        found.append(
            f"{len(open_)} of {len(runs)} runs are not done ({states}); the same command again runs those"
        )
        if damaged := sum(" is damaged" in reason for reason in open_["reason"]):
            found.append(f"{damaged} of those have damaged files, which the column reason names")
    if table.empty:
        return found
    if table["n"].nunique() > 1:
        found.append("the rows have different numbers of seeds")
    if short := len(tables.with_short_names()):
        found.append(
            f"the names of {short} settings are shortened; the column full_setting of runs.csv has them whole"
        )
    if not table["shares_budget"].all():
        found.append(
            "not all rows share one budget (epochs x training images): see the column budget"
        )
    if table["method"].str.endswith(MISALIGNED).any():
        found.append(
            f"{MISALIGNED.strip()} rows were taught, on purpose, with what the teacher says of other images"
        )
    if "val_accuracy" not in table or table["val_accuracy"].isna().any():
        found.append(
            "where there are no validation images, nothing is chosen of the several settings of a method, and the rows "
            "are in the order in which they were planned"
        )
    ties = [
        f"{row['setting']} with {row['tied_with']}"
        for _, row in table.dropna(subset=["tied_with"]).iterrows()
    ]
    if ties:
        more = f", and {len(ties) - MAX_NAMED} more" if len(ties) > MAX_NAMED else ""
        found.append(
            f"settings of one method tie on validation ({', '.join(ties[:MAX_NAMED])}{more}): of those, the one that was "
            "planned first is chosen"
        )
    return found


def _relocation_notes(tables: Tables) -> list[str]:
    """What a reader must know of a sweep that was copied or moved."""
    found = []
    for search in tables.searches:
        where = printable(search.sweep)
        if search.moved:
            folders = sorted({str(Path(folder).parent) for folder in search.moved.values()})
            found.append(
                f"{len(search.moved)} of {search.jobs} runs of {where} are not where they were planned; they were "
                f"found in {', '.join(map(printable, folders[:MAX_NAMED]))}"
            )
        if search.lost:
            found.append(
                f"{len(search.lost)} of {search.jobs} runs of {where} were not found ({_run_names(search.lost)}); looked "
                f"in {_searched_folders(tables)}; --runs DIR names a folder that holds them"
            )
    if tables.searches:
        given = tables.searches[0].given
        unused = [printable(folder) for folder in given.folders if folder not in given.used]
        found += [f"--runs {folder}: no run that was looked for is there" for folder in unused]
    return found


def headline(tables: Tables) -> str:
    """The verdict, in two sentences; of several students or data sets one sentence each."""
    table = tables.summary
    if table.empty:
        return "No run has finished. There is nothing to compare yet."
    if table["context"].nunique() > 1:
        parts = [_best_of(rows) for _, rows in table.groupby("context", sort=False)]
        more = (
            f" {len(parts) - MAX_NAMED} more students or data sets are in the table."
            if len(parts) > MAX_NAMED
            else ""
        )
        return " ".join(parts[:MAX_NAMED]) + more
    first, chosen = _best_of(table), table[table["chosen"]]
    if chosen.empty:
        return first
    best = chosen.iloc[0]  # by validation, where there is one
    others = chosen[(chosen["setting"] != best["setting"]) & (chosen["method"] != "standard")]
    if len(others):
        said = [
            f"{row['setting']}: {row['verdict']}"
            for _, row in others.head(2).iterrows()
            if row["baseline"]
        ]
        left = len(others) - 2
        more = f"; {left} more {'is' if left == 1 else 'are'} in the table" if left > 0 else ""
        if said:
            return f"{first} {'; '.join(said)}{more}."
    if not chosen["baseline"].any() and (chosen["method"] != "standard").any():
        return f"{first} There is no baseline: the same command with method=standard gives one."
    if best["n"] == 1:
        return f"{first} One seed tells nothing about how far chance carries: add seed=0,1,2."
    tutors = teachers(table)
    if tutors:
        return f"{first} Its teacher reaches {100 * tutors[0][1]:.2f} %."
    return f"{first} Nothing else was compared."


def _best_of(table: pd.DataFrame) -> str:
    """What the best setting for one student and data set reaches."""
    chosen = table[table["chosen"]]
    if chosen.empty:
        return "Nothing was chosen: there are no validation images to choose on. See the table for what was measured."
    best = chosen.iloc[0]
    spread = (
        "" if pd.isna(best["test_accuracy_ci95"]) else f" ± {100 * best['test_accuracy_ci95']:.2f}"
    )
    reached = f"{100 * best['test_accuracy']:.2f} %{spread} on test ({best['n']} seed{'s' if best['n'] > 1 else ''})"
    compared = f", {best['verdict']}" if best["method"] != "standard" and best["baseline"] else ""
    return f"{_preferred(table, best['setting'])}{reached}{compared}."


def _preferred(table: pd.DataFrame, best: str) -> str:
    """The beginning of the verdict: what validation says of the best setting, which may be that others tie with it."""
    if len(table) < 2 or not has_validation(table):
        return f"{best} reaches "
    score = validated(table)
    top = [best, *(name for name in table["setting"][score == score.max()] if name != best)]
    if len(top) == 1:
        return f"Of {len(table)} settings validation prefers {best}: "
    named = f"{', '.join(top[:-1])} and {top[-1]}"
    if len(top) > MAX_NAMED:
        named = f"{', '.join(top[:MAX_NAMED])} and {len(top) - MAX_NAMED} more"
    share = f"{100 * score.max():.2f} %"
    return f"Of {len(table)} settings {named} tie on validation ({share}). {best}, which was planned first, reaches "


@streams.protected
def main(words: Sequence[str] | None = None) -> None:
    """`python -m kd.report`. Exit code 2 for a directory without runs, or published figures that cannot be read."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "kd.report", description=(__doc__ or "").split("\n")[0], formatter_class=form
    )
    parser.add_argument(
        "places", nargs="+", type=Path, metavar="DIR", help="a sweep's, a run's, or one of runs"
    )
    parser.add_argument(
        "--out", type=Path, help="where to write (default: DIR, or kd-report/ for several)"
    )
    moved = "where to look for runs that are not where they were planned, nor near the sweep; may be given again"
    parser.add_argument("--runs", type=Path, metavar="DIR", action="append", default=[], help=moved)
    figures = (
        "published figures beside the measured: kd's own, or those of a file with the same columns"
    )
    parser.add_argument("--compare", metavar="published|CSV", help=figures)
    images = "with --compare: the data set whose images an image folder holds, such as cifar10"
    parser.add_argument("--as", dest="given_as", metavar="DATA", help=images)
    parser.add_argument(
        "--columns",
        action="version",
        help="what the columns of the tables mean",
        version="\n".join(explain_columns()),
    )
    asked = parser.parse_args(words)
    own = len(asked.places) == 1 and not is_run(
        asked.places[0]
    )  # a run's files are not the report's to replace
    out = asked.out or (asked.places[0] if own else Path("kd-report"))
    try:
        missing = [str(place) for place in asked.places if not place.is_dir()]
        missing += [f"{place} (--runs)" for place in asked.runs if not place.is_dir()]
        if missing:
            sys.exit(_print_error(f"no directory {missing[0]}"))
        if is_run(out):
            sys.exit(_print_error(f"{out} is a run's own directory; choose another with --out DIR"))
        if (real := out.resolve()) != Path(os.path.normpath(out.absolute())):
            out = real  # the page's links lead from there to the runs
        against = _load_comparison(asked.compare, asked.given_as, out)
        found = write(asked.places, out, against=against, given_as=asked.given_as, runs=asked.runs)
    except UserError as error:
        sys.exit(_print_error(str(error)))
    except OSError as error:
        sys.exit(
            _print_error(
                f"cannot write to {error.filename or out} ({error.strerror}); choose another with --out DIR"
            )
        )
    print(f"{found.text}\n\nreport   {printable(found.page or out)}")


def explain_columns() -> list[str]:
    """A line for each column of each table; `published.csv` has other columns of the same names."""
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


def _load_comparison(place: str | None, given_as: str | None, out: Path) -> list[Line]:
    if place is None:
        if given_as is not None:
            raise UserError(
                "--as: it needs --compare published, or the path of a CSV file of figures"
            )
        return []
    if Path(place).resolve() == (out / "published.csv").resolve():
        raise UserError(
            f"--compare: {place} is what this report writes; give your own figures another name"
        )
    lines = load(place)
    if not lines:
        raise UserError(f"--compare: {place} holds no figure")
    return lines


def _print_error(line: str) -> int:
    print(f"kd: {one_line(line)}", file=sys.stderr)
    return 2
