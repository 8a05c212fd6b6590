"""docs/study.md and its figures, written from the kept tables of `benchmarks.study` alone."""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.study import HERE, PARTS, load
from kd import figures, published
from kd.compare import LEVEL, Paired, holm, paired
from kd.files import write_text
from kd.table import MISALIGNED, Tables, half_width

PAGE = HERE.parent / "study.md"
REPOSITORY = "github.com/danieldutu/cifar10_distillation"
PUBLISHED = {  # in its README: one seed each, on the original pixels
    "teacher" if line.student == "cnn-32" else line.method: line.accuracy
    for line in published.load("published")
    if line.source == REPOSITORY
}
ITS_CODE = {"teacher": 79.7, "standard": 73.7, "logits" + MISALIGNED: 65.7}  # its code, run once on these JPEG images
SWEPT = {  # part: the key it sweeps, what that is, as a title of an axis
    "labels": ("student.labels", "part of the labels given"),
    "budget": ("student.epochs", "epochs of the student"),
    "student": ("student.scale", "scale of the student"),
    "teacher": ("teacher.scale", "scale of the teacher"),
}
LOOPS = {"standard": "standard", "label_smoothing": "standard", "feature": "feature"}  # which plain loop a method needs

Lines = list[str]
Kept = dict[str, tuple[Tables, dict[str, Any]]]


def publish(kept: Path = HERE) -> None:
    """Write the page and the figures of all parts that were run."""
    parts = gathered(kept)
    drawn = draw(parts, kept)
    write_text(PAGE if kept == HERE else kept / "study.md", page(parts, drawn))


def gathered(kept: Path = HERE) -> Kept:
    return {part: found for part in PARTS if (found := load(part, kept))}


# ---- numbers in words


def percent(values: pd.Series) -> str:
    """Mean and 95 % interval of accuracies, in %."""
    half = half_width(values)
    return f"{100 * values.mean():.2f}" + ("" if math.isnan(half) else f" ± {100 * half:.2f}")


def points(found: Paired) -> str:
    return f"{100 * found.difference:+.2f}" + ("" if math.isnan(found.ci95) else f" ± {100 * found.ci95:.2f}")


def chance(p: float) -> str:
    return "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def told(found: Paired, p: float) -> str:
    """A comparison as a sentence's end: whichever way it falls."""
    n = f"n = {found.pairs}"
    if math.isnan(p):
        return f"{points(found)} points in {n}: too few to tell"
    said = f"p {chance(p)}" if p < 0.001 else f"p = {chance(p)}"
    if p >= LEVEL:
        return f"{points(found)} points, not distinguishable ({said}, {n})"
    return f"{points(found)} points, {'better' if found.difference > 0 else 'worse'} ({said}, {n})"


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"


def grid(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Lines:
    """A Markdown table, numbers to the right."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def accuracies(runs: pd.DataFrame) -> pd.Series:
    """Test accuracy by seed."""
    return runs[runs["status"] == "done"].set_index("seed")["test_accuracy"]


def against(runs: pd.DataFrame, baseline: pd.DataFrame, names: Sequence[str]) -> dict[str, tuple[Paired, float]]:
    """{method: (its paired comparison with the baseline, p by Holm over all of these)}."""
    plain = accuracies(baseline)
    found = {name: paired(accuracies(runs[runs["method"] == name]), plain) for name in names}
    corrected = holm(pd.Series({name: one.p for name, one in found.items()}))
    return {name: (one, float(corrected[name])) for name, one in found.items()}


def teacher_of(tables: Tables) -> tuple[str, float]:
    """(name, test accuracy in %) of the teacher that taught."""
    row = tables.summary.dropna(subset=["teacher_test_accuracy"]).iloc[0]
    return str(row["teacher"]), 100 * float(row["teacher_test_accuracy"])


# ---- sections


def page(parts: Kept, drawn: dict[str, str]) -> str:
    """The page: the verdict first. `drawn`: {figure: caption}."""
    lines = ["# What distillation is worth on CIFAR-10", ""]
    lines += verdict(parts)
    for part, section in SECTIONS:
        if part in parts:
            lines += [*section(parts, drawn), ""]
    missing = [f"`{part}` ({PARTS[part].__doc__.splitlines()[0].rstrip('.').lower()})" for part in PARTS if part not in parts]  # fmt: skip  # noqa: E501
    lines += costs(parts)
    if missing:
        lines += [f"Not run yet: {', '.join(missing)}.", ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def image(name: str, drawn: dict[str, str]) -> Lines:
    return [f"![{drawn[name]}](study/{name}.png)", "", f"*{drawn[name]}*", ""] if name in drawn else []


def verdict(parts: Kept) -> Lines:
    """What a reader needs who reads no further."""
    lines: Lines = []
    if "fair" in parts:
        tables, _ = parts["fair"]
        runs = tables.runs
        plain = runs[runs["method"] == "standard"]
        names = [name for name in dict.fromkeys(runs["method"]) if name != "standard"]
        found = against(runs, plain, names)
        teacher, top = teacher_of(tables)
        rows = [["`standard`", len(accuracies(plain)), percent(accuracies(plain)), "", ""]]
        for name, (one, p) in found.items():
            rows.append([f"`{name}`", one.pairs, percent(accuracies(runs[runs["method"] == name])), points(one), chance(p)])  # fmt: skip  # noqa: E501
        rows.append([f"teacher {teacher}", 1, f"{top:.2f}", "", ""])
        lines += grid(["", "seeds", "test, %", "against standard", "p (Holm)"], rows)
        worth = [name for name, (one, p) in found.items() if p < LEVEL and one.difference > 0]
        best = max(worth, key=lambda name: found[name][0].difference) if worth else None
        if best:
            lines += [
                f"**Use `{best}`**: {points(found[best][0])} points over the same student trained on labels alone, at "
                f"the same number of epochs (p {chance(found[best][1])}, {found[best][0].pairs} seeds), with settings "
                "chosen on validation images.", "",
            ]  # fmt: skip
        else:
            lines += ["**No method is distinguishable from plain training at this budget.**", ""]
    if "original" in parts:
        tables, _ = parts["original"]
        wrong = tables.runs[tables.runs["method"] == "logits" + MISALIGNED]
        right = tables.runs[tables.runs["method"] == "logits"]
        one = paired(accuracies(wrong), accuracies(right))
        lines += [
            f"**Logits distillation does not hurt; a bug did.** The study that these pages repeat reports "
            f"{PUBLISHED['logits']:.2f} % with it and {PUBLISHED['standard']:.2f} % without. Teaching every image with "
            f"what the teacher says of *another* reproduces the collapse ({percent(accuracies(wrong))} %); teaching it "
            f"with its own gives {percent(accuracies(right))} % in the same protocol, {-100 * one.difference:.1f} "
            "points more.", "",
        ]  # fmt: skip
    return lines


def section_original(parts: Kept, drawn: dict[str, str]) -> Lines:
    tables, _ = parts["original"]
    runs, (teacher, top) = tables.runs, teacher_of(tables)
    names = ["standard", "logits", "feature", "logits" + MISALIGNED]
    rows = [[f"teacher {teacher}", "", "", f"{top:.2f}", f"{PUBLISHED['teacher']:.2f}", f"{ITS_CODE['teacher']:.1f}"]]
    for name in names:
        mine = runs[runs["method"] == name]
        said = PUBLISHED.get(name, PUBLISHED["logits"] if name.endswith(MISALIGNED) else math.nan)
        shown = "" if name == "logits" else f"{said:.2f}"
        code = f"{ITS_CODE[name]:.1f}" if name in ITS_CODE else ""
        rows.append([f"`{name}`", mine["epochs"].iloc[0], len(accuracies(mine)), percent(accuracies(mine)), shown, code])  # fmt: skip  # noqa: E501
    lines = [
        "## The original study, repeated", "",
        "Its protocol as its text gives it (`+experiment=original`): Adam at 1e-3, cosine, batches of 128, T = 3, "
        "alpha = 0.5, beta = 0.4; ELU, dropout 0.5. Published are one seed each, on the original pixels "
        f"([its README](https://{REPOSITORY})); the last column is its own code, run once on the JPEG copies that are "
        "used here (and not by a command of kd's).",
        "",
        *grid(["", "epochs", "n", "measured, %", "published, %", "its code, JPEG, %"], rows),
        *image("accuracy_comparison", drawn), *image("distillation_comparison", drawn),
        "Its methods have unequal epochs, and are therefore not compared here: that is the fair study, below.", "",
        "### The bug", "",
        "Its `logits` student reads teacher outputs that were made once, in one shuffled order, beside images in "
        "another. `teacher.outputs=misaligned` does that on purpose, and every table marks it:", "",
    ]  # fmt: skip
    found = against(runs, runs[runs["method"] == "standard"], ["logits", "logits" + MISALIGNED])
    for name, (one, p) in found.items():
        lines.append(f"- `{name}` against `standard` (both {runs['epochs'].max()} epochs): {told(one, p)}.")
    return [*lines, "", *image("bug", drawn)]


def section_choice(parts: Kept, drawn: dict[str, str]) -> Lines:
    tables, _ = parts["choice"]
    rows = []
    for method, group in tables.summary.groupby("method", sort=False):
        best = group[group["chosen"]].iloc[0]
        rows.append([f"`{method}`", len(group), f"`{best['setting']}`", f"{100 * best['val_accuracy']:.2f}"])
    return [
        "## Settings, chosen on validation images", "",
        "One seed; 5,000 images that no student trains on. The test images were not looked at for this.", "",
        *grid(["method", "settings tried", "chosen", "validation, %"], rows), *image("choice", drawn),
    ]  # fmt: skip


def section_fair(parts: Kept, drawn: dict[str, str]) -> Lines:
    tables, _ = parts["fair"]
    runs, summary = tables.runs, tables.summary
    found = against(runs, runs[runs["method"] == "standard"], [n for n in summary["method"] if n != "standard"])
    lines = [
        "## The fair study", "",
        f"Every student has {runs['epochs'].iloc[0]} epochs of the same batches, its settings come from validation "
        "images, the test images were read once, after the last epoch. Differences are paired by seed; p is of the "
        "paired t-test, with Holm's correction over these methods. `label_smoothing` is the control: it needs no "
        "teacher.", "",
    ]  # fmt: skip
    rows = []
    for _, row in summary.iterrows():
        one, p = found.get(row["method"], (None, math.nan))
        rows.append([
            f"`{row['setting']}`", row["n"], percent(accuracies(runs[runs["method"] == row["method"]])),
            points(one) if one else "", chance(p), f"{row['test_nll']:.3f}", f"{row['test_ece']:.3f}",
            "" if pd.isna(row.get("test_agreement")) else f"{100 * row['test_agreement']:.1f}",
        ])  # fmt: skip
    lines += grid(["", "n", "test, %", "difference", "p (Holm)", "NLL", "ECE", "agreement, %"], rows)
    for name, (one, p) in found.items():
        lines.append(f"- `{name}`: {told(one, p)}.")
    if {"logits", "label_smoothing"} <= set(found):
        with_teacher, without = (accuracies(runs[runs["method"] == n]) for n in ("logits", "label_smoothing"))
        one = paired(with_teacher, without)
        lines.append(f"- `logits` against `label_smoothing`, the part that is the teacher's: {told(one, one.p)}.")
    return [*lines, "", *image("fair", drawn), *image("curves", drawn)]


def section_swept(part: str, title: str, text: str) -> Callable[[Kept, dict[str, str]], Lines]:
    """A section on the gain over the values of one number."""

    def section(parts: Kept, drawn: dict[str, str]) -> Lines:
        tables, _ = parts[part]
        key, what = SWEPT[part]
        rows, found = [], list(gains(tables.runs, key))
        corrected = holm(pd.Series([one.p for _, _, _, one in found]))
        for (value, plain, taught, one), p in zip(found, corrected, strict=True):
            rows.append([f"{value:g}", one.pairs, percent(plain), percent(taught), points(one), chance(p)])
        head = [what, "seeds", "standard, %", "logits, %", "difference", "p (Holm)"]
        return [f"## {title}", "", text, "", *grid(head, rows), *image(part, drawn)]

    return section


def gains(runs: pd.DataFrame, key: str) -> Iterator[tuple[float, pd.Series, pd.Series, Paired]]:
    """For each value of the key: it, accuracies of `standard` and of `logits` by seed, and the comparison. Where the
    key is the teacher's, `standard` is one for all."""
    taught, plain = runs[runs["method"] == "logits"], runs[runs["method"] == "standard"]
    for value, group in taught.groupby(key):
        base = plain if key.startswith("teacher.") else plain[plain[key] == value]
        yield float(value), accuracies(base), accuracies(group), paired(accuracies(group), accuracies(base))


def section_size(parts: Kept, drawn: dict[str, str]) -> Lines:
    tables, said = parts["student"]
    rows = []
    first = tables.runs[(tables.runs["status"] == "done")].drop_duplicates("student")
    latency = said["latency"]
    for _, row in first.sort_values("params").iterrows():
        mine = tables.runs[(tables.runs["student"] == row["student"]) & (tables.runs["method"] == "logits")]
        ms = latency.get(row["student"], {})
        rows.append([row["student"], f"{row['params']:,}", f"{row['macs']:,}", ms.get("1", ""), ms.get("128", ""),
                     percent(accuracies(mine))])  # fmt: skip
    name, top = teacher_of(tables)
    big = tables.summary.dropna(subset=["teacher_params"]).iloc[0]
    ms = latency.get(name, {})
    rows.append([f"teacher {name}", f"{big['teacher_params']:,.0f}", f"{big['teacher_macs']:,.0f}", ms.get("1", ""),
                 ms.get("128", ""), f"{top:.2f}"])  # fmt: skip
    head = ["network", "parameters", "MACs", "ms, 1 image", "ms, 128 images", "test, %"]
    return [
        "## Accuracy against size and speed", "",
        f"Latency is the median of 30 passes on {said['environment']['threads']} threads of "
        f"{said['environment']['processor']}, {said['environment']['precision']}.", "",
        *grid(head, rows), *image("pareto", drawn),
    ]  # fmt: skip


FEW_LABELS = (
    "A part of the labels, chosen by the seed. The `standard` student has only the labelled images, and goes round "
    "them until its epochs are as long; the `logits` student sees all images, through a teacher trained with all "
    "labels."
)
SECTIONS: list[tuple[str, Callable[[Kept, dict[str, str]], Lines]]] = [
    ("original", section_original),
    ("choice", section_choice),
    ("fair", section_fair),
    ("labels", section_swept("labels", "Few labels", FEW_LABELS)),
    ("budget", section_swept("budget", "Short and long training", "Epochs of the student; both have the same.")),
    ("student", section_swept("student", "Small and large students", "The largest is as large as its teacher.")),
    ("student", section_size),
    ("teacher", section_swept("teacher", "Small and large teachers", "The student has scale 16, whoever teaches it.")),
]


def costs(parts: Kept) -> Lines:
    """What it took, the limits, and the commands."""
    lines = ["## What it took", ""]
    rows = []
    speed = json.loads((HERE.parents[1] / "benchmarks" / "throughput.json").read_text())["rows"]
    plain = {"standard": speed[0]["plain"], "logits": speed[1]["plain"], "feature": speed[3]["plain"]}
    ours = slow = 0.0
    for part, (tables, said) in parts.items():
        done = tables.runs[tables.runs["status"] == "done"]
        images = done["epochs"] * done["samples"]
        rates = [plain[LOOPS.get(method, "logits")] for method in done["method"]]
        loop = float((images / pd.Series(rates, index=done.index)).sum())
        ours, slow = ours + said["seconds"], slow + loop
        where = said["environment"]
        rows.append([f"`{part}`", len(done), duration(said["seconds"]), duration(loop),
                     f"{where['processor']}, {where['threads']} threads, {where['precision']}"])  # fmt: skip
    rows.append(["all", "", duration(ours), duration(slow), ""])
    lines += [
        "Wall time of each part, its teacher included where it was not there yet, and what the students alone would "
        "have taken in the loop that everyone writes, at the images a second that `python -m benchmarks.throughput` "
        f"measured for it ({plain['standard']:,.0f} without a teacher, {plain['logits']:,.0f} with one).", "",
        *grid(["part", "students", "kd", "the plain loop", "on"], rows),
        "## Limits", "",
        "- The images are CIFAR-10's as JPEG copies of quality 75: two to three points harder than the original "
        "pixels. With a network, leave out the words that begin with `data`.",
        "- One data set, one family of networks, one teacher of each size. An interval covers the student's seeds, not "
        "the teacher's.",
        "- Settings were chosen with one seed, at scale 16 and 15 epochs, and used unchanged elsewhere.",
        "- A run depends on the kind of processor in its last bits; parts that ran on other machines share no run.", "",
        "## The commands", "",
        "`python -m benchmarks.study PART data=imagefolder data.root=PATH` runs these and keeps their tables; "
        "`python -m benchmarks.study --page` writes this page and its figures from the tables in `docs/study/`.", "",
        "```bash",
    ]  # fmt: skip
    for _, said in parts.values():
        lines += [" ".join(["python -m kd -m", *words]) for words in said["sweeps"]]
    return [*lines, "```", ""]


# ---- figures


def draw(parts: Kept, folder: Path) -> dict[str, str]:
    """Draw what the parts call for. **Returns:** {name: caption}."""
    wanted: list[tuple[str, Callable[[], tuple[Any, str]]]] = []
    if "original" in parts:
        tables, _ = parts["original"]
        wanted += [
            ("accuracy_comparison", lambda: accuracy_comparison(tables)),
            ("distillation_comparison", lambda: distillation_comparison(tables)),
            ("bug", lambda: bug(tables)),
        ]
    if "choice" in parts:
        wanted.append(("choice", lambda: choices(parts["choice"][0])))
    if "fair" in parts:
        wanted += [("fair", lambda: figures.accuracy(parts["fair"][0])), ("curves", lambda: figures.curves(parts["fair"][0]))]  # fmt: skip  # noqa: E501
    wanted += [(part, lambda part=part: swept(parts[part][0], *SWEPT[part])) for part in SWEPT if part in parts]
    if "student" in parts:
        wanted.append(("pareto", lambda: front(*parts["student"])))
    captions = {}
    with style() as plt:
        for name, make in wanted:
            figure, captions[name] = make()
            figure.savefig(folder / f"{name}.png", dpi=130, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
    return captions


@contextmanager
def style() -> Iterator[Any]:
    import matplotlib as mpl
    import seaborn as sns

    mpl.use("agg")
    said: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with sns.axes_style("whitegrid"), mpl.rc_context(said):
        import matplotlib.pyplot as plt

        yield plt


def canvas(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)


def looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dash of each method."""
    colours = figures.palette(names)
    return {name: {"color": colours[name], "marker": figures.MARKERS[i], "ls": figures.DASHES[i % 5]}
            for i, name in enumerate(names)}  # fmt: skip


def accuracy_comparison(tables: Tables) -> tuple[Any, str]:
    """Measured beside published."""
    names = ["standard", "logits", "feature", "logits" + MISALIGNED]
    figure, axes = canvas(7.2, 3.2)
    axis, look, (teacher, top) = axes[0][0], looks(names), teacher_of(tables)
    rows = ["teacher", *names]
    for place, name in enumerate(rows):
        published = PUBLISHED.get(name, PUBLISHED["logits"] if name.endswith(MISALIGNED) else math.nan)
        if name != "logits":  # what was published under that name is the misaligned one
            axis.plot(published, place, marker="d", ms=9, mfc="none", mec="0.35", ls="",
                      label="published (one seed, original pixels)" if not place else None)  # fmt: skip
        if name == "teacher":
            axis.plot(top, place, marker="*", ms=12, color="0.1", ls="", label=f"measured teacher {teacher}")
            continue
        values = 100 * accuracies(tables.runs[tables.runs["method"] == name])
        axis.errorbar(values.mean(), place, xerr=half_width(values), color=look[name]["color"], ls="", capsize=4,
                      marker=look[name]["marker"], ms=8)  # fmt: skip
    axis.set_yticks(range(len(rows)), rows)
    axis.invert_yaxis()
    axis.set_xlabel("test accuracy, %")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return figure, (
        "The original protocol: means over seeds with 95 % intervals, beside what was published. Its logits figure is "
        "shown with the bug that made it."
    )


def distillation_comparison(tables: Tables) -> tuple[Any, str]:
    """Loss and accuracy by epoch, accuracy by size, and what is kept of the teacher."""
    names = ["standard", "logits", "feature"]
    figure, axes = canvas(9.2, 6.4, 2, 2)
    look, (teacher, top) = looks(names), teacher_of(tables)
    for axis, column, title, scale in ((axes[0][0], "hard", "cross-entropy of training views", 1),
                                       (axes[0][1], "val_accuracy", "validation accuracy, %", 100)):  # fmt: skip
        for name in names:
            curve = scale * tables.history[tables.history["method"] == name].groupby("epoch")[column].mean()
            axis.plot(curve.index, curve, label=name, ms=4, **look[name])
        axis.set(xlabel="epoch", ylabel=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
    summary = tables.summary.set_index("method")
    for name in names:
        values = 100 * accuracies(tables.runs[tables.runs["method"] == name])
        mark = {"color": look[name]["color"], "marker": look[name]["marker"], "ls": "", "capsize": 3, "ms": 8}
        axes[1][0].errorbar(summary.loc[name, "params"] / 1e6, values.mean(), yerr=half_width(values), **mark)
        axes[1][1].errorbar(100 * values.mean() / top, name, xerr=100 * half_width(values) / top, **mark)
    axes[1][0].plot(summary["teacher_params"].max() / 1e6, top, marker="*", ms=12, color="0.1", ls="", label=teacher)
    axes[1][0].annotate(f"teacher {teacher}", (summary["teacher_params"].max() / 1e6, top), (-8, 0),
                        textcoords="offset points", ha="right", va="center")  # fmt: skip
    axes[1][0].set(xlabel="parameters, millions", ylabel="test accuracy, %", xlim=(0, None))
    axes[1][1].set(xlabel="part of the teacher's accuracy, %")
    axes[1][1].invert_yaxis()
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure, "The original protocol, outputs aligned: means over seeds; below with 95 % intervals."


def bug(tables: Tables) -> tuple[Any, str]:
    names = ["standard", "logits", "logits" + MISALIGNED]
    figure, axes = canvas(6.4, 3.6)
    axis, look = axes[0][0], looks(names)
    for name in names:
        rows = tables.history[tables.history["method"] == name]
        by = rows.groupby("epoch")["val_accuracy"]
        axis.plot(by.mean().index, 100 * by.mean(), label=name, ms=5, **look[name])
        axis.fill_between(by.mean().index, 100 * by.min(), 100 * by.max(), color=look[name]["color"], alpha=0.2, lw=0)
    axis.axhline(PUBLISHED["logits"], color="0.4", ls=":", lw=1.2)
    last = tables.history["epoch"].max()
    axis.annotate("published as logits", (last, PUBLISHED["logits"]), (0, 3), textcoords="offset points", ha="right")
    axis.set(xlabel="epoch", ylabel="validation accuracy, %")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    return figure, "The same student and teacher; the bands are the range of the seeds."


def choices(tables: Tables) -> tuple[Any, str]:
    import seaborn as sns

    figure, axes = canvas(9.2, 3.4, 1, 2)
    table = tables.summary[tables.summary["method"] == "logits"]
    cells = table.pivot_table(index="method.alpha", columns="method.T", values="val_accuracy")
    sns.heatmap(100 * cells.sort_index(ascending=False), annot=True, fmt=".2f", cmap="cividis", ax=axes[0][0],
                cbar_kws={"label": "validation accuracy, %"}, linewidths=1)  # fmt: skip
    axes[0][0].set(xlabel="T", ylabel="alpha", title="logits")
    shown = [("feature", "method.beta"), ("label_smoothing", "method.smoothing")]
    look = looks([name for name, _ in shown])
    for name, key in shown:
        rows = tables.summary[tables.summary["method"] == name].sort_values(key)
        label = f"{name}: {figures.short(key)}"
        axes[0][1].plot(rows[key], 100 * rows["val_accuracy"], label=label, **look[name])
    axes[0][1].set(xlabel="value", ylabel="validation accuracy, %")
    axes[0][1].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return (
        figure,
        "Validation accuracy of every setting that was tried; one seed, so differences of half a point are chance.",
    )


def swept(tables: Tables, key: str, what: str) -> tuple[Any, str]:
    """Accuracy of both, and the difference, over the values of a key."""
    figure, axes = canvas(9.2, 3.4, 1, 2)
    look, found = looks(["standard", "logits"]), list(gains(tables.runs, key))
    values = [value for value, *_ in found]
    for name, which in (("standard", 1), ("logits", 2)):
        means = [100 * row[which].mean() for row in found]
        halves = [100 * half_width(row[which]) for row in found]
        axes[0][0].errorbar(values, means, yerr=halves, label=name, capsize=3, ms=6, **look[name])
    differences = [one for *_, one in found]
    axes[0][1].errorbar(values, [100 * one.difference for one in differences], [100 * one.ci95 for one in differences],
                        color=look["logits"]["color"], marker="s", capsize=3, ms=6)  # fmt: skip
    axes[0][1].axhline(0, color="0.2", lw=1, ls=":")
    axes[0][0].set_ylabel("test accuracy, %")
    axes[0][1].set_ylabel("logits minus standard, points")
    for axis in axes[0]:
        axis.set_xscale("log")
        axis.set_xticks(values, [f"{value:g}" for value in values])
        axis.minorticks_off()
        axis.set_xlabel(what)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure, "Means over seeds with 95 % intervals; on the right the difference, paired by seed."


def front(tables: Tables, said: dict[str, Any]) -> tuple[Any, str]:
    figure, axes = canvas(10.4, 3.6, 1, 3)
    names, latency = ["standard", "logits"], said["latency"]
    look, (teacher, top) = looks(names), teacher_of(tables)
    big = tables.summary.dropna(subset=["teacher_params"]).iloc[0]
    costs_ = [("params", "parameters"), ("macs", "MACs"), ("ms", "ms for one image")]
    for axis, (key, title) in zip(axes[0], costs_, strict=True):
        seen = []
        for name in names:
            mine = tables.runs[(tables.runs["method"] == name) & (tables.runs["status"] == "done")]
            for student, rows in mine.groupby("student"):
                cost = latency[student]["1"] if key == "ms" else rows[key].iloc[0]
                values = 100 * rows["test_accuracy"]
                seen.append((cost, values.mean()))
                axis.errorbar(cost, values.mean(), yerr=half_width(values), color=look[name]["color"], capsize=3,
                              marker=look[name]["marker"], ls="", label=name, ms=6)  # fmt: skip
        cost = latency[teacher]["1"] if key == "ms" else big[f"teacher_{key}"]
        axis.plot(cost, top, marker="*", color="0.1", ms=12, ls="", label=f"teacher {teacher}")
        edge = figures.pareto([*seen, (cost, top)])
        axis.step(*zip(*edge, strict=True), where="post", color="0.5", lw=1, ls="--", label="Pareto front", zorder=1)
        axis.set(xscale="log", xlabel=title)
        if key == "ms":
            shown = sorted({latency[name]["1"] for name in latency})
            axis.set_xticks(shown, [f"{ms:g}" for ms in shown])
            axis.minorticks_off()
    axes[0][0].set_ylabel("test accuracy, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once.keys(), loc="outside upper center", ncols=4, frameon=False)
    return figure, "Students of scale 4, 8, 16 and 32 with 95 % intervals, and the teacher."
