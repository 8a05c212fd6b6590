"""The verdict of a report in words, and what a reader must know to interpret it."""

from pathlib import Path

import pandas as pd

from kd.report.checks import run_names, searched_folders
from kd.report.comparison import format_interval, teachers
from kd.report.tables import Tables, has_validation, validated
from kd.runs.directory import printable
from kd.runs.labels import MISALIGNED

MAX_NAMED = 3  # settings or runs listed in a sentence


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
                f"({run_names(search.lost)}); looked in {searched_folders(tables)}; "
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
    accuracy = format_interval(best["test_accuracy"], best["test_accuracy_ci95"])
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
