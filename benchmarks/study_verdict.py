"""Write the start of docs/study.md.

It states which method to use, what its gain depends on, the bug of the original study, and the best
accuracy of a small student.
"""

from typing import Any

import pandas as pd

from benchmarks.study_claims import (
    SWEPT,
    accuracies,
    by_method,
    compared,
    contrast,
    share,
    tested,
)
from benchmarks.study_figures import ITS_CODE, PUBLISHED, WRONG, Kept, teacher_of
from benchmarks.study_words import Lines, decision, grid, percent, points, told
from kd.report.comparison import format_p
from kd.report.inference import Estimate
from kd.report.tables import Tables

TITLES = {  # of the sections that the lines of `verdict_swept` lead to
    "labels": "Few labels",
    "budget": "Short and long training",
    "student": "Small and large students",
    "teacher": "Small and large teachers",
}


def verdict(parts: Kept) -> Lines:
    """Return the lines of the summary at the start of the page."""
    lines: Lines = []
    if "fair" in parts:
        lines += verdict_fair(*parts["fair"])
        if "budget" in parts and best_of(compared(parts["fair"][0])) == "logits":
            lines += verdict_long(parts["budget"][0])
    lines += verdict_swept(parts)
    if "original" in parts:
        lines += verdict_bug(parts["original"][0])
    return lines + verdict_best(parts)


def verdict_fair(tables: Tables, said: dict[str, Any]) -> Lines:
    """Return the table of the fair study, and which method to use."""
    runs, found, (teacher, top) = tables.runs, compared(tables), teacher_of(tables)
    plain = accuracies(runs[runs["method"] == "standard"])
    rows = [["`standard`", len(plain), percent(plain), "", ""]]
    for name, one in found.items():
        mine = accuracies(runs[runs["method"] == name])
        verdict = decision(one, len(found))
        rows.append([f"`{name}`", one.seeds, percent(mine), points(one), format_p(one.p), verdict])
    rows[0].append("")
    rows.append([f"teacher {teacher}", 1, f"{top:.2f}", "", "", ""])
    first = runs.iloc[0]
    student = f"A student {first['student']} ({first['params']:,} parameters)"
    lines = [
        f"{student} and a teacher {teacher}, on JPEG copies of CIFAR-10's images; "
        f"{first['epochs']} epochs for every student. ± is the 95 % interval over seeds. All that "
        "follows holds with this teacher and on these test images.",
        "",
    ]
    lines += grid(["", "seeds", "test, %", "against standard", "p", "verdict"], rows)
    if (best := best_of(found)) is None:
        return [*lines, "**No method is better than plain training at this budget.**", ""]
    return [
        *lines,
        f"**Use `{best}`**: {told(found[best], len(found))} than the same student trained on "
        "labels alone for as many epochs. Its settings were chosen on validation images:",
        "",
        *(
            f"    python -m kd {' '.join(words[1:])}"
            for words in said["sweeps"]
            if f"method={best}" in words
        ),
        "",
    ]


def best_of(found: dict[str, Estimate]) -> str | None:
    """Return the method with the largest gain over `standard` of those that are better."""
    better = [name for name, one in found.items() if one.decide() == "better"]
    return max(better, key=lambda name: found[name].difference, default=None)


def verdict_long(tables: Tables) -> Lines:
    """Return the sentence on the longest training, unless `logits` is better there too."""
    rows = tested(tables, "budget")
    epochs, _, _, one = rows[-1]
    title = {
        "worse": "Not for long training",
        "equal": "Not needed for long training",
        "undecided": "Undecided for long training",
        "too few": "Undecided for long training",
    }.get(one.decide())
    if title is None:
        return []
    return [
        f"**{title}**: with {epochs:g} epochs `logits` against `standard` is "
        f"{told(one, len(rows))}.",
        "",
    ]


def verdict_swept(parts: Kept) -> Lines:
    """Return a line on the gain of `logits` for each key that was swept."""
    rows = []
    for part in (part for part in SWEPT if part in parts):
        (_, what), tables, said = SWEPT[part], parts[part][0], []
        if len(epochs := tables.runs["epochs"].unique()) == 1:
            what += f"; {epochs[0]} epochs"
        for value, _, _, one in tested(tables, part):
            bold = "**" if one.decide() in ("better", "worse") else ""
            said.append(f"{bold}{points(one)}{bold} at {value:g}")
        anchor = TITLES[part].lower().replace(" ", "-")
        rows.append(f"- [{TITLES[part]}](#{anchor}) ({what}): {', '.join(said)}.")
    if not rows:
        return []
    head = (
        "What `logits` gains over `standard`, in points; bold where better or worse. ± is the "
        "simultaneous 95 % interval: each line is one family."
    )
    return [head, "", *rows, ""]


def verdict_best(parts: Kept) -> Lines:
    """Return lines on the best students of the fair study's size and the original teacher."""
    found = [parts[part][0].runs for part in ("fair", "budget", "teacher") if part in parts]
    if not found:
        return []
    runs = pd.concat(found)
    runs = runs[(runs["status"] == "done") & (runs["student"] == "cnn-16")]
    runs = runs.drop_duplicates(["method", "epochs", "teacher", "seed"])
    lines = [
        f"**The best student of {runs['params'].iloc[0]:,} parameters**, "
        "by its validation accuracy:",
        "",
    ]
    for within, mark, whose in (
        (
            15,
            ITS_CODE["teacher"],
            "the original study's teacher in its own code, on these images, after 25 epochs",
        ),
        (45, PUBLISHED["teacher"], "that teacher's published figure, on the original pixels"),
    ):
        if runs["epochs"].max() < within:
            continue
        groups = runs[runs["epochs"] <= within].groupby(
            ["method", "epochs", "teacher"], dropna=False
        )
        (name, epochs, teacher), group = max(
            groups, key=lambda pair: float(pair[1]["val_accuracy"].mean())
        )
        mine, by = accuracies(group), "" if pd.isna(teacher) else f" taught by {teacher}"
        above = f"{(100 * mine > mark).sum()} of {len(mine)} seeds above {mark:.2f} %"
        lines.append(
            f"- within {within} epochs: {percent(mine)} % (`{name}`{by}, {epochs} epochs), "
            f"{above}, {whose}."
        )
    return [*lines, ""]


def verdict_bug(tables: Tables) -> Lines:
    """Return a line on whether misalignment explains the published accuracy of distillation."""
    runs = tables.runs
    right, wrong = (accuracies(runs[runs["method"] == name]) for name in ("logits", WRONG))
    found = compared(tables)
    _, level = share(len(found), extra=True)
    lost, gain = contrast(by_method(tables), WRONG, "logits", level), found["logits"]
    collapses, hurts = (one.decide() == "worse" for one in (lost, gain))
    title = {
        (True, False): "Logits distillation does not hurt; a bug did.",
        (True, True): "Logits distillation hurts in this protocol; a bug made it look far worse.",
    }.get((collapses, hurts), "The bug does not explain the published collapse.")
    return [
        f"**{title}** The study that these pages repeat reports {PUBLISHED[WRONG]:.2f} % with it "
        f"and {PUBLISHED['standard']:.2f} % without. In its protocol, a student that is taught "
        f"with what the teacher says of *another* image reaches {percent(wrong)} %, and with what "
        f"it says of its own {percent(right)} %: {told(gain, len(found))} against plain training.",
        "",
    ]
