"""Write the start of docs/study.md.

It states which method to use, what its gain depends on, the bug of the original study, and the best
accuracy of a small student.
"""

from typing import Any

import pandas as pd

from benchmarks.study_figures import ITS_CODE, PUBLISHED, SWEPT, WRONG, Kept, accuracies, teacher_of
from benchmarks.study_words import Lines, chance, compared, grid, percent, points, tested, told
from kd.report.stats import LEVEL, PairedDifference, paired_difference
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
    for name, (one, p) in found.items():
        mine = accuracies(runs[runs["method"] == name])
        rows.append([f"`{name}`", one.pairs, percent(mine), points(one), chance(p)])
    rows.append([f"teacher {teacher}", 1, f"{top:.2f}", "", ""])
    first = runs.iloc[0]
    student = f"A student {first['student']} ({first['params']:,} parameters)"
    lines = [
        f"{student} and a teacher {teacher}, on JPEG copies of CIFAR-10's images; "
        f"{first['epochs']} epochs for every student; ± is the 95 % interval of a mean over seeds.",
        "",
    ]
    lines += grid(["", "seeds", "test, %", "against standard", "p (Holm)"], rows)
    if (best := best_of(found)) is None:
        return [*lines, "**No method is distinguishable from plain training at this budget.**", ""]
    return [
        *lines,
        f"**Use `{best}`**: {told(*found[best])} than the same student trained on labels alone for "
        "as many epochs. Its settings were chosen on validation images:",
        "",
        *(
            f"    python -m kd {' '.join(words[1:])}"
            for words in said["sweeps"]
            if f"method={best}" in words
        ),
        "",
    ]


def best_of(found: dict[str, tuple[PairedDifference, float]]) -> str | None:
    """Return the method with the largest distinguishable gain over `standard`, if there is one."""
    worth = [name for name, (one, p) in found.items() if p < LEVEL and one.difference > 0]
    return max(worth, key=lambda name: found[name][0].difference, default=None)


def verdict_long(tables: Tables) -> Lines:
    """Return the sentence that the gain is gone in the longest training, where that is so."""
    epochs, _, _, one, p = tested(tables, SWEPT["budget"][0])[-1]
    if p < LEVEL and one.difference > 0:
        return []
    return [
        f"**Not for long training**: with {epochs:g} epochs `logits` against `standard` is "
        f"{told(one, p)}.",
        "",
    ]


def verdict_swept(parts: Kept) -> Lines:
    """Return a line on the gain of `logits` for each key that was swept."""
    rows = []
    for part in (part for part in SWEPT if part in parts):
        (key, what), tables, said = SWEPT[part], parts[part][0], []
        if len(epochs := tables.runs["epochs"].unique()) == 1:
            what += f"; {epochs[0]} epochs"
        for value, _, _, one, p in tested(tables, key):
            bold = "**" if p < LEVEL else ""
            said.append(f"{bold}{points(one)}{bold} at {value:g}")
        anchor = TITLES[part].lower().replace(" ", "-")
        rows.append(f"- [{TITLES[part]}](#{anchor}) ({what}): {', '.join(said)}.")
    if not rows:
        return []
    head = (
        "What `logits` gains over `standard`, in points; "
        f"bold where p < {LEVEL:g} by Holm's correction in the line:"
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
    plain, right, wrong = (
        accuracies(runs[runs["method"] == name]) for name in ("standard", "logits", WRONG)
    )
    lost, gain = paired_difference(wrong, right), paired_difference(right, plain)
    collapses, hurts = (one.p < LEVEL and one.difference < 0 for one in (lost, gain))
    title = {
        (True, False): "Logits distillation does not hurt; a bug did.",
        (True, True): "Logits distillation hurts in this protocol; a bug made it look far worse.",
    }.get((collapses, hurts), "The bug does not explain the published collapse.")
    return [
        f"**{title}** The study that these pages repeat reports {PUBLISHED[WRONG]:.2f} % with it "
        f"and {PUBLISHED['standard']:.2f} % without. In its protocol, a student that is taught "
        f"with what the teacher says of *another* image reaches {percent(wrong)} %, and with what "
        f"it says of its own {percent(right)} %: {told(gain, gain.p)} against plain training.",
        "",
    ]
