"""The verdict of a report in words, and what a reader must know to interpret it."""

import math
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from kd.report.checks import run_names, searched_folders
from kd.report.comparison import format_accuracy, teachers
from kd.report.inference import LEVEL
from kd.report.summary import OBJECTIVE, has_validation
from kd.report.tables import Tables
from kd.runs.directory import printable
from kd.runs.labels import MISALIGNED
from kd.runs.status import RunState

MAX_NAMED = 3  # settings or runs listed in a sentence
FEW_ERRORS = 20  # errors on the test images below which settings cannot be told apart


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
    notes += _statistics_notes(tables)
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


def _statistics_notes(tables: Tables) -> list[str]:
    """Return what limits the comparison: seeds, choices and errors that are too few."""
    table = tables.summary
    notes = []
    teachers = table.get("teachers", pd.Series(1, index=table.index)).fillna(1)
    if (table["n"] / teachers).nunique() > 1:
        notes.append("the rows have different numbers of seeds")
    runs = tables.runs[~tables.runs["setting"].isin(table["setting"])]
    for setting, group in runs.groupby("setting", sort=False):
        if n := int((group["status"] == RunState.DIVERGED).sum()):
            notes.append(f"{setting} has no row: {n} of {len(group)} seeds diverged, none is done")
    tried = table[table["chosen"]].drop_duplicates("method").set_index("method")["settings_tried"]
    if tried.nunique() > 1:
        counts = ", ".join(f"{method} {n}" for method, n in tried.items())
        notes.append(
            f"the methods were tuned unequally: each was chosen among its settings ({counts})"
        )
    images = pd.to_numeric(table["test_samples"]).astype("Float64").fillna(math.inf)
    if few := int(((1 - table["test_accuracy"]) * images < FEW_ERRORS).sum()):
        notes.append(
            f"{few} of {len(table)} settings make fewer than {FEW_ERRORS} errors on "
            f"{images.min():,.0f} test images; so few errors cannot tell settings apart"
        )
    if tables.margin_is_late:
        notes.append(
            f"the margin of {100 * tables.margin:g} points was given with --margin, after the test "
            "images had been read"
        )
    return notes


def claims_text(tables: Tables) -> str:
    """Return what the claims of the table are about, and the error rate that they have together."""
    table = tables.summary
    if table.empty or table["family"].isna().all():
        return ""
    claimed = table[table["family"].notna()]
    groups = claimed.groupby(["baseline", "budget"], sort=False)
    sizes = [int(group["family"].iloc[0]) for _, group in groups]
    if len(sizes) == 1:
        family = (
            "One comparison is made"
            if sizes[0] == 1
            else f"The {sizes[0]} comparisons with {claimed['baseline'].iloc[0]} are one family"
        )
        error_rate = (
            f"{family}: the chance of any false “better” or “worse” is at most {100 * LEVEL:g} %."
        )
    else:
        error_rate = (
            f"The comparisons are {len(sizes)} families, one for each baseline and budget "
            f"({', '.join(map(str, sizes))} comparisons): the chance of any false “better” or "
            f"“worse” is at most {100 * LEVEL:g} % in each family, not over the page."
        )
    about = "Claims hold for this teacher, on these test images."
    if (claimed["unit"] == "teachers").all():
        about = "Claims hold for teachers of this kind, on these test images."
    elif (claimed["unit"] == "teachers").any():
        about = "Claims over teachers hold for teachers of this kind, others for these teachers."
    margin = (
        f"“Equal” means a difference of at most {100 * tables.margin:g} points (report.margin)."
    )
    correlation = claimed["seed_correlation"].dropna()
    paired = ""
    if len(correlation):
        paired = f" Over the seeds, two settings correlate with r = {correlation.mean():.2f}."
    return f"{error_rate} {about} {margin}{paired}"


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
        sentences = [_best_of(tables, rows) for _, rows in table.groupby("context", sort=False)]
        omitted = len(sentences) - MAX_NAMED
        more = ""
        if omitted > 0:
            noun = "student or data set" if omitted == 1 else "students or data sets"
            more = f" The table has {omitted} more {noun}."
        return " ".join(sentences[:MAX_NAMED]) + more
    first = _best_of(tables, table)
    chosen = table[table["chosen"]]
    if chosen.empty:
        return first
    best = chosen.iloc[0]  # on validation, if there are validation images
    others = chosen[(chosen["setting"] != best["setting"]) & (chosen["method"] != "standard")]
    if len(others):
        compared = others[others["baseline"].notna()].head(2)
        verdicts = dict(zip(compared["setting"], compared["verdict"], strict=True))
        omitted = len(others) - 2
        more = f"; {omitted} more {'is' if omitted == 1 else 'are'} in the table"
        if verdicts:
            return f"{first} {_joined(verdicts)}{more if omitted > 0 else ''}."
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


def _joined(verdicts: Mapping[str, str]) -> str:
    """Join the verdicts on several settings; conditions that they share are stated once."""
    parts = {setting: verdict.rpartition(" (over ") for setting, verdict in verdicts.items()}
    conditions = {condition for _, _, condition in parts.values()}
    if len(parts) < 2 or len(conditions) > 1 or any(not claim for claim, _, _ in parts.values()):
        return "; ".join(f"{setting}: {verdict}" for setting, verdict in verdicts.items())
    claims = "; ".join(f"{setting}: {claim}" for setting, (claim, _, _) in parts.items())
    return f"{claims} (each over {conditions.pop()}"


def _best_of(tables: Tables, table: pd.DataFrame) -> str:
    """Return a sentence about the best setting for one student and data set."""
    chosen = table[table["chosen"]]
    if chosen.empty:
        return (
            "No setting was chosen because there are no validation images to choose on. "
            "The table shows what was measured."
        )
    best = chosen.iloc[0]
    accuracy = format_accuracy(best)
    noun = "run" if not pd.isna(best.get("teachers", float("nan"))) else "seed"
    seeds = f"{best['n']} {noun}{'s' if best['n'] > 1 else ''}"
    verdict = f", {best['verdict']}" if best["method"] != "standard" and best["baseline"] else ""
    if best["method"] == "standard" and best["unstable"]:
        verdict = f", unstable ({best['unstable']} of {best['planned']})"
    accuracy = accuracy.replace(" (", " % (") if "(" in accuracy else f"{accuracy} %"
    text = (
        f"{accuracy} test accuracy, {seeds}"
        if "(" in accuracy
        else (f"{accuracy} test accuracy ({seeds})")
    )
    return f"{_preferred(table, best['setting'], tables.objective)}{text}{verdict}."


def _preferred(table: pd.DataFrame, best: str, objective: str) -> str:
    """Return the beginning of the verdict: how the best setting compares on validation.

    Other settings may tie with it.
    """
    score = table["choice_value"]
    if len(table) < 2 or not has_validation(table) or score.isna().any():
        return f"{best} reaches "
    by = "validation" if objective == OBJECTIVE else objective
    sound = table["complete"] if table["complete"].any() else table["complete"] | True
    value = score[table["setting"] == best].iloc[0]
    top = [best, *(name for name in table["setting"][(score == value) & sound] if name != best)]
    if len(top) == 1:
        return f"Best of {len(table)} settings on {by}: {best}, "
    names = f"{', '.join(top[:-1])} and {top[-1]}"
    if len(top) > MAX_NAMED:
        names = f"{', '.join(top[:MAX_NAMED])} and {len(top) - MAX_NAMED} more"
    shown = f"{100 * value:.2f} %" if objective == OBJECTIVE else f"{value:.4g}"
    tie = f"Of {len(table)} settings, {names} tie on {by} ({shown})."
    return f"{tie} The one planned first, {best}, reaches "
