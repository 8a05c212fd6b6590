"""Write docs/study.md and its figures from the tables that `benchmarks.study` stored."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from benchmarks.study import HERE, PARTS, load, write_summary
from benchmarks.study_claims import (
    SWEPT,
    accuracies,
    by_method,
    by_teacher,
    compared,
    contrast,
    share,
    tested,
)
from benchmarks.study_figures import (
    ITS_CODE,
    ORIGINAL,
    PUBLISHED,
    REPOSITORY,
    WRONG,
    Kept,
    draw,
    teacher_of,
)
from benchmarks.study_verdict import TITLES, verdict
from benchmarks.study_words import (
    Lines,
    decision,
    duration,
    grid,
    percent,
    place,
    points,
    told,
)
from kd.core.io import write_text
from kd.report.comparison import format_p

PAGE = HERE.parent / "study.md"
# the plain loop of a method; other methods need the one of `logits`
LOOPS = {"standard": "standard", "label_smoothing": "standard", "feature": "feature"}


def publish(kept: Path = HERE) -> None:
    """Write the page and the figures of all parts that were run."""
    parts = gathered(kept)
    for part, (tables, _) in parts.items():
        write_summary(part, tables.summary, kept)
    drawn = draw(parts, kept)
    write_text(PAGE if kept == HERE else kept / "study.md", page(parts, drawn))


def gathered(kept: Path = HERE) -> Kept:
    return {part: found for part in PARTS if (found := load(part, kept))}


# ---- sections


def page(parts: Kept, drawn: dict[str, str]) -> str:
    """Return the text of the page, which begins with the verdict. `drawn`: {figure: caption}."""
    lines = ["# What distillation is worth on CIFAR-10", ""]
    lines += verdict(parts)
    for part, section in SECTIONS:
        if part in parts:
            lines += [*section(parts, drawn), ""]
    missing = []
    for part, sweeps in PARTS.items():
        if part not in parts:
            summary = sweeps.__doc__.splitlines()[0].rstrip(".").lower()
            missing.append(f"`{part}` ({summary})")
    lines += costs(parts)
    if missing:
        lines += [f"Not run yet: {', '.join(missing)}.", ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def image(name: str, drawn: dict[str, str]) -> Lines:
    return (
        [f"![{drawn[name]}](study/{name}.png)", "", f"*{drawn[name]}*", ""] if name in drawn else []
    )


def section_original(parts: Kept, drawn: dict[str, str]) -> Lines:
    tables, _ = parts["original"]
    runs, (teacher, top) = tables.runs, teacher_of(tables)
    rows = [
        [
            f"teacher {teacher}",
            "",
            "",
            f"{top:.2f}",
            f"{PUBLISHED['teacher']:.2f}",
            f"{ITS_CODE['teacher']:g}",
        ]
    ]
    for name in ORIGINAL:
        mine = runs[runs["method"] == name]
        shown = f"{PUBLISHED[name]:.2f}" if name in PUBLISHED else ""
        code = f"{ITS_CODE[name]:g}" if name in ITS_CODE else ""
        epochs = mine["epochs"].iloc[0]
        measured = accuracies(mine)
        rows.append([f"`{name}`", epochs, len(measured), percent(measured), shown, code])
    lines = [
        "## The original study, repeated",
        "",
        "Its protocol as its text gives it (`+experiment=original`): Adam at 1e-3, cosine, batches "
        "of 128, T = 3, alpha = 0.5, beta = 0.4; ELU, dropout 0.5. Published are one seed each, on "
        f"the original pixels ([its README](https://{REPOSITORY})); the last column is its own "
        "code, run once on the JPEG copies that are used here (and not by a command of kd's). The "
        "text describes batch norm and a teacher of 4.3 million parameters, which that code does "
        "not have; the networks here are as in the text.",
        "",
        *grid(["", "epochs", "n", "measured, %", "published, %", "its code, JPEG, %"], rows),
        *image("accuracy_comparison", drawn),
        *image("distillation_comparison", drawn),
        "Its methods have unequal epochs, and are therefore not compared here: that is the fair "
        "study, below.",
        "",
        "### The bug",
        "",
        "Its `logits` student reads teacher outputs that were made once, in one shuffled order, "
        "beside images in another. `teacher.outputs=misaligned` does that on purpose, and every "
        "table marks it:",
        "",
    ]
    found = compared(tables)
    for name in ("logits", WRONG):
        lines.append(
            f"- `{name}` against `standard` (both {runs['epochs'].max()} epochs): "
            f"{told(found[name], len(found))}."
        )
    _, level = share(len(found), extra=True)
    lost = contrast(by_method(tables), WRONG, "logits", level)
    lines.append(f"- `{WRONG}` against `logits`: {told(lost)}.")
    lines += ["", "These three comparisons are one family of 5 %."]
    return [*lines, "", *image("bug", drawn)]


def section_choice(parts: Kept, drawn: dict[str, str]) -> Lines:
    tables, _ = parts["choice"]
    rows = []
    for method, group in tables.summary.groupby("method", sort=False):
        best = group[group["chosen"]].iloc[0]
        rows.append(
            [f"`{method}`", len(group), f"`{best['setting']}`", f"{100 * best['val_accuracy']:.2f}"]
        )
    return [
        "## Settings, chosen on validation images",
        "",
        "One seed; 5,000 images that no student trains on, and nothing else, decide: the noise of "
        "5,000 images is half a point, so another seed may well choose otherwise. T and alpha of "
        "`feature` are its defaults.",
        "",
        *grid(["method", "settings tried", "chosen", "validation, %"], rows),
        *image("choice", drawn),
    ]


def section_fair(parts: Kept, drawn: dict[str, str]) -> Lines:
    tables, _ = parts["fair"]
    runs, summary = tables.runs, tables.summary
    found = compared(tables)
    correlation = float(summary["seed_correlation"].max())
    lines = [
        "## The fair study",
        "",
        f"Every student has {runs['epochs'].iloc[0]} epochs of the same batches, its settings come "
        "from validation images, the test images were read once, after the last epoch. "
        "`label_smoothing` is the control: it needs no teacher. One error variance is estimated "
        "from all seeds and methods; the intervals of the differences hold together (Dunnett), and "
        "with the comparison of `logits` with `label_smoothing` they are one family of 5 %. "
        f"Over the seeds, two methods correlate with r = {correlation:.2f}. The methods were "
        f"tuned unequally: {tuning(parts)}.",
        "",
    ]
    rows = []
    for _, row in summary.iterrows():
        one = found.get(row["method"])
        rows.append(
            [
                f"`{row['setting']}`",
                row["n"],
                percent(accuracies(runs[runs["method"] == row["method"]])),
                points(one) if one else "",
                format_p(one.p) if one else "",
                interval(row, "test_nll"),
                interval(row, "test_ece"),
                "" if pd.isna(row.get("test_agreement")) else f"{100 * row['test_agreement']:.1f}",
            ]
        )
    lines += grid(["", "n", "test, %", "difference", "p", "NLL", "ECE", "agreement, %"], rows)
    for name, one in found.items():
        lines.append(f"- `{name}`: {told(one, len(found))}.")
    if {"logits", "label_smoothing"} <= set(found):
        _, level = share(len(found), extra=True)
        one = contrast(by_method(tables), "logits", "label_smoothing", level)
        lines.append(
            f"- `logits` against `label_smoothing`, the part that is the teacher's: {told(one)}."
        )
    bound = ece_bound(float(summary["test_accuracy"].max()))
    lines += [
        "",
        "ECE is not zero for a perfectly calibrated network: with 10,000 images and this accuracy "
        f"it is up to {bound:.3f}.",
    ]
    return [
        *lines,
        "",
        *image("fair", drawn),
        *image("fair_differences", drawn),
        *image("curves", drawn),
    ]


def tuning(parts: Kept) -> str:
    """Return how many settings of each method were tried, and on how many seeds."""
    if "choice" not in parts:
        return "with settings from elsewhere"
    counts = parts["choice"][0].summary["method"].value_counts(sort=False)
    return ", ".join(f"`{name}` {n}" for name, n in counts.items()) + " settings, one seed each"


def interval(row: pd.Series, name: str) -> str:
    half = row.get(f"{name}_ci95", math.nan)
    return f"{row[name]:.3f}" + ("" if pd.isna(half) else f" ± {half:.3f}")


def ece_bound(accuracy: float, images: int = 10_000, bins: int = 15) -> float:
    """Return the largest expected calibration error of a perfectly calibrated network.

    The bins of the runs are not kept. By the Cauchy-Schwarz inequality the error is largest if
    all bins have equally many images.
    """
    return math.sqrt(2 / math.pi * bins * accuracy * (1 - accuracy) / images)


def section_swept(part: str, text: str) -> Callable[[Kept, dict[str, str]], Lines]:
    """Return a function that writes the section on the gain over the values of one key."""

    def section(parts: Kept, drawn: dict[str, str]) -> Lines:
        return [f"## {TITLES[part]}", "", text, "", *gain_grid(parts, part), *image(part, drawn)]

    return section


def gain_grid(parts: Kept, part: str) -> Lines:
    """Return the table of a part's gains, with the teachers' accuracies where teachers differ."""
    tables, (key, what) = parts[part][0], SWEPT[part]
    found = tested(tables, part)
    rows = [
        [
            f"{value:g}",
            one.seeds,
            percent(plain),
            percent(taught),
            points(one),
            format_p(one.p),
            decision(one, len(found)),
        ]
        for value, plain, taught, one in found
    ]
    head = [what, "seeds", "standard, %", "logits, %", "difference", "p", "verdict"]
    if key.startswith("teacher."):
        by_value = tables.runs.groupby(key)  # in the order of the rows
        reached = by_value["teacher_test_accuracy"].first()
        head.insert(1, "the teacher, %")
        for row, accuracy in zip(rows, reached, strict=True):
            row.insert(1, f"{100 * accuracy:.2f}")
    return grid(head, rows)


def section_teacher(parts: Kept, drawn: dict[str, str]) -> Lines:
    """Return the section on the teacher's scale, comparing the largest teacher to the smallest."""
    runs = parts["teacher"][0].runs
    tables = parts["teacher"][0]
    accuracy = by_teacher(tables)
    _, smallest, *_, largest = accuracy
    _, level = share(accuracy.shape[1] - 1, extra=True)
    one = contrast(accuracy, str(largest), str(smallest), level)
    return [
        f"## {TITLES['teacher']}",
        "",
        f"One student, {runs['student'].iloc[0]}, whoever teaches it.",
        "",
        *gain_grid(parts, "teacher"),
        f"The largest teacher against the smallest: {told(one)}. It belongs to the family of the "
        "table.",
        "",
        *image("teacher", drawn),
    ]


def section_size(parts: Kept, drawn: dict[str, str]) -> Lines:
    tables, said = parts["student"]
    rows = []
    first = tables.runs[(tables.runs["status"] == "done")].drop_duplicates("student")
    latency = said["latency"]
    for _, row in first.sort_values("params").iterrows():
        mine = tables.runs[
            (tables.runs["student"] == row["student"]) & (tables.runs["method"] == "logits")
        ]
        ms = latency.get(row["student"], {})
        rows.append(
            [
                row["student"],
                f"{row['params']:,}",
                f"{row['macs']:,}",
                ms.get("1", ""),
                ms.get("128", ""),
                percent(accuracies(mine)),
            ]
        )
    name, top = teacher_of(tables)
    big = tables.runs.dropna(subset=["teacher_params"]).iloc[0]
    ms = latency.get(name, {})
    rows.append(
        [
            f"teacher {name}",
            f"{big['teacher_params']:,.0f}",
            f"{big['teacher_macs']:,.0f}",
            ms.get("1", ""),
            ms.get("128", ""),
            f"{top:.2f}",
        ]
    )
    head = ["network", "parameters", "MACs", "ms, 1 image", "ms, 128 images", "test, % (`logits`)"]
    return [
        "## Accuracy against size and speed",
        "",
        "Latency is the median of 100 passes, all networks in turn, on "
        f"{place(said['environments'][-1])}.",
        "",
        *grid(head, rows),
        *image("pareto", drawn),
    ]


FEW_LABELS = (
    "A part of the labels, chosen by the seed. The `standard` student has only the labelled "
    "images, and goes round them until its epochs are as long; the `logits` student sees all "
    "images, those without a label through the teacher alone, which was trained with all labels."
)
SECTIONS: list[tuple[str, Callable[[Kept, dict[str, str]], Lines]]] = [
    ("original", section_original),
    ("choice", section_choice),
    ("fair", section_fair),
    ("labels", section_swept("labels", FEW_LABELS)),
    ("budget", section_swept("budget", "Epochs of the student; both have the same.")),
    ("student", section_swept("student", "The largest is as large as its teacher.")),
    ("student", section_size),
    ("teacher", section_teacher),
]


def costs(parts: Kept) -> Lines:
    """Return the sections on running time, limits and commands."""
    lines = ["## What it took", ""]
    rows = []
    rate = json.loads((HERE.parents[1] / "benchmarks" / "throughput.json").read_text())
    speed = rate["rows"]
    there = rate["environment"]["precision"]  # kd's, which depends on the kind of machine
    plain = {
        "standard": speed[0]["plain"],
        "logits": speed[1]["plain"],
        "feature": speed[3]["plain"],
    }
    ours = slow = 0.0
    other = [
        f"`{part}`"
        for part, (_, said) in parts.items()
        if any(one["precision"] != there for one in said["environments"])
    ]
    for part, (tables, said) in parts.items():
        done = tables.runs[tables.runs["status"] == "done"]
        images = done["epochs"] * done["samples"]
        rates = [plain[LOOPS.get(method, "logits")] for method in done["method"]]
        loop = float((images / pd.Series(rates, index=done.index)).sum())
        ours, slow = ours + said["seconds"], slow + loop
        where = "; ".join(dict.fromkeys(map(place, said["environments"])))
        rows.append([f"`{part}`", len(done), duration(said["seconds"]), duration(loop), where])
    rows.append(["all", "", duration(ours), duration(slow), ""])
    lines += [
        "Wall time of each part, its teacher included where it was not there yet, and what the "
        "students alone would have taken in the loop that everyone writes, at the images a second "
        "that `python -m benchmarks.throughput` measured for it "
        f"({plain['standard']:,.0f} without a teacher, {plain['logits']:,.0f} with one of "
        "scale 32)."
        + (f" The two times of {', '.join(other)} are of different machines." if other else ""),
        "",
        *grid(["part", "students", "kd", "the plain loop", "on"], rows),
        "## Limits",
        "",
        "- The images are CIFAR-10's as JPEG copies of quality 75, harder than the original "
        "pixels: the teacher of the original study's own code reaches "
        f"{ITS_CODE['teacher']:g} % on them, and {PUBLISHED['teacher']:.2f} % is published. With "
        "a network, leave out the words that begin with `data`.",
        "- One data set, one family of networks, one teacher of each size. An interval covers the "
        "student's seeds, not the teacher's.",
        "- Settings were chosen with one seed, at scale 16 and 15 epochs, and used unchanged "
        "elsewhere.",
        "- A run depends on the kind of processor in its last bits; parts that ran on other "
        "machines share no run.",
        "",
        "## The commands",
        "",
        "`python -m benchmarks.study PART data=imagefolder data.root=PATH` runs these and keeps "
        "their tables; `python -m benchmarks.study --page` writes this page and its figures from "
        "the tables in `docs/study/`.",
        "",
        "```bash",
    ]
    for _, said in parts.values():
        lines += [" ".join(["python -m kd -m", *words]) for words in said["sweeps"]]
    return [*lines, "```", ""]
