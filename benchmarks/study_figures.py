"""Draw the figures of docs/study.md, and compute the numbers for them and for its text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import seaborn as sns

from benchmarks.study_claims import SWEPT, accuracies, tested
from kd.report import figures, published
from kd.report.figures import looks
from kd.report.inference import MARGIN
from kd.report.summary import half_width
from kd.report.tables import MISALIGNED, Tables

WRONG = "logits" + MISALIGNED  # the study published this under the name of logits
REPOSITORY = "github.com/danieldutu/cifar10_distillation"
PUBLISHED = {  # in its README: one seed each, on the original pixels
    "teacher"
    if line.student == "cnn-32"
    else WRONG
    if line.method == "logits"
    else line.method: line.accuracy
    for line in published.load("published")
    if line.source == REPOSITORY
}
# accuracies of the original study's code, run once on these JPEG images
ITS_CODE = {"teacher": 79.73, "standard": 73.7, WRONG: 65.7}
# students of the original study, in an order that gives each the same look in all figures
ORIGINAL = ["standard", "logits", "feature", WRONG]
Kept = dict[str, tuple[Tables, dict[str, Any]]]  # part: its tables, and how they were made


def teacher_of(tables: Tables) -> tuple[str, float]:
    """Return (name, test accuracy in %) of the teacher of the runs."""
    row = tables.summary.dropna(subset=["teacher_test_accuracy"]).iloc[0]
    return str(row["teacher"]), 100 * float(row["teacher_test_accuracy"])


def draw(parts: Kept, folder: Path) -> dict[str, str]:
    """Draw the figures of these parts. Returns {name: caption}."""
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
        wanted += [
            ("fair", lambda: figures.accuracy(parts["fair"][0])),
            ("fair_differences", lambda: figures.differences(parts["fair"][0])),
            ("curves", lambda: figures.curves(parts["fair"][0])),
        ]
    wanted += [
        (part, lambda part=part: swept(parts[part][0], part)) for part in SWEPT if part in parts
    ]
    if "student" in parts:
        wanted.append(("pareto", lambda: front(*parts["student"])))
    captions = {}
    with figures.style() as plt:
        for name, make in wanted:
            figure, captions[name] = make()
            figure.savefig(
                folder / f"{name}.png", dpi=130, bbox_inches="tight", metadata={"Software": None}
            )
            plt.close(figure)
    return captions


def accuracy_comparison(tables: Tables) -> tuple[Any, str]:
    """Draw measured and published accuracies."""
    figure, axes = figures.canvas(7.2, 3.2)
    axis, look, (teacher, top) = axes[0][0], looks(ORIGINAL), teacher_of(tables)
    rows = ["teacher", *ORIGINAL]
    for place, name in enumerate(rows):
        if name in PUBLISHED:
            axis.plot(
                PUBLISHED[name],
                place,
                marker="d",
                ms=9,
                mfc="none",
                mec="0.35",
                ls="",
                label="published (one seed, original pixels)" if not place else None,
            )
        if name == "teacher":
            axis.plot(
                top,
                place,
                marker="*",
                ms=12,
                color="0.1",
                ls="",
                label=f"measured teacher {teacher}",
            )
            continue
        values = 100 * accuracies(tables.runs[tables.runs["method"] == name])
        axis.errorbar(
            values.mean(),
            place,
            xerr=half_width(values),
            color=look[name]["color"],
            ls="",
            capsize=4,
            marker=look[name]["marker"],
            ms=8,
        )
    axis.set_yticks(range(len(rows)), rows)
    axis.invert_yaxis()
    axis.set_xlabel("test accuracy, %")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return figure, (
        "The original protocol: means over seeds with 95 % intervals, beside what was published. "
        "Its logits figure is shown with the bug that made it."
    )


def distillation_comparison(tables: Tables) -> tuple[Any, str]:
    """Draw loss and accuracy by epoch, accuracy by size, and accuracy relative to the teacher."""
    names = ["standard", "logits", "feature"]
    figure, axes = figures.canvas(9.2, 6.4, 2, 2)
    look, (teacher, top) = looks(ORIGINAL), teacher_of(tables)
    for axis, column, title, scale in (
        (axes[0][0], "hard", "cross-entropy of training views", 1),
        (axes[0][1], "val_accuracy", "validation accuracy, %", 100),
    ):
        for name in names:
            curve = (
                scale
                * tables.history[tables.history["method"] == name].groupby("epoch")[column].mean()
            )
            axis.plot(curve.index, curve, label=name, ms=4, **look[name])
        axis.set(xlabel="epoch", ylabel=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
    summary = tables.summary.set_index("method")
    for name in names:
        values = 100 * accuracies(tables.runs[tables.runs["method"] == name])
        mark = {
            "color": look[name]["color"],
            "marker": look[name]["marker"],
            "ls": "",
            "capsize": 3,
            "ms": 8,
        }
        axes[1][0].errorbar(
            summary.loc[name, "params"] / 1e6, values.mean(), yerr=half_width(values), **mark
        )
        axes[1][1].errorbar(
            100 * values.mean() / top, name, xerr=100 * half_width(values) / top, **mark
        )
    axes[1][0].plot(
        summary["teacher_params"].max() / 1e6,
        top,
        marker="*",
        ms=12,
        color="0.1",
        ls="",
        label=teacher,
    )
    axes[1][0].annotate(
        f"teacher {teacher}",
        (summary["teacher_params"].max() / 1e6, top),
        (-8, 0),
        textcoords="offset points",
        ha="right",
        va="center",
    )
    axes[1][0].set(xlabel="parameters, millions", ylabel="test accuracy, %", xlim=(0, None))
    axes[1][1].set(xlabel="part of the teacher's accuracy, %")
    axes[1][1].invert_yaxis()
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False
    )
    return (
        figure,
        "The original protocol, outputs aligned: means over seeds; below with 95 % intervals.",
    )


def bug(tables: Tables) -> tuple[Any, str]:
    names = ["standard", "logits", WRONG]
    figure, axes = figures.canvas(6.4, 3.6)
    axis, look = axes[0][0], looks(ORIGINAL)
    for name in names:
        rows = tables.history[tables.history["method"] == name]
        by = rows.groupby("epoch")["val_accuracy"]
        axis.plot(by.mean().index, 100 * by.mean(), label=name, ms=5, **look[name])
        axis.fill_between(
            by.mean().index,
            100 * by.min(),
            100 * by.max(),
            color=look[name]["color"],
            alpha=0.2,
            lw=0,
        )
    axis.axhline(PUBLISHED[WRONG], color="0.4", ls=":", lw=1.2)
    last = tables.history["epoch"].max()
    axis.annotate(
        "published as logits (test images)",
        (last, PUBLISHED[WRONG]),
        (0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
    )
    axis.set(xlabel="epoch", ylabel="validation accuracy, %")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    return figure, "The same student and teacher; the bands are the range of the seeds."


def choices(tables: Tables) -> tuple[Any, str]:
    """Draw T by alpha as a heat map and as curves, and the only swept key of each other method."""
    figure, axes = figures.canvas(9.6, 6.6, 2, 2)
    table = tables.summary
    cells = 100 * table[table["method"] == "logits"].pivot_table(
        index="method.alpha", columns="method.T", values="val_accuracy"
    )
    shown = cells.rename(index="{:g}".format, columns="{:g}".format)
    sns.heatmap(
        shown[::-1],
        annot=True,
        fmt=".2f",
        cmap="cividis",
        ax=axes[0][0],
        linewidths=1,
        cbar_kws={"label": "validation accuracy, %"},
    )
    axes[0][0].set(xlabel="T", ylabel="alpha", title="logits")
    for axis, curves, own, other in (
        (axes[0][1], shown, "T", "alpha"),
        (axes[1][0], shown.T, "alpha", "T"),
    ):
        for name, look in looks(list(curves.index)).items():
            axis.plot(curves.columns, curves.loc[name], label=f"{other} = {name}", **look)
        axis.set(xlabel=f"{own} of logits", ylabel="validation accuracy, %")
        axis.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2 + (own == "T"), frameon=False
        )
    others = [("feature", "method.beta"), ("label_smoothing", "method.smoothing")]
    for name, look in looks([name for name, _ in others]).items():
        key = dict(others)[name]
        rows = table[table["method"] == name].sort_values(key)
        axes[1][1].plot(
            rows[key], 100 * rows["val_accuracy"], label=f"{name}: {figures.short(key)}", **look
        )
    axes[1][1].set(xlabel="value", ylabel="validation accuracy, %")
    axes[1][1].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return (
        figure,
        "Validation accuracy of every setting that was tried; "
        "one seed, so differences of half a point are chance.",
    )


def swept(tables: Tables, part: str) -> tuple[Any, str]:
    """Draw accuracy of `standard` and `logits`, and their difference, over the values of a key."""
    figure, axes = figures.canvas(9.2, 3.4, 2)
    look, found, what = looks(["standard", "logits"]), tested(tables, part), SWEPT[part][1]
    values = [value for value, *_ in found]
    for name, which in (("standard", 1), ("logits", 2)):
        means = [100 * row[which].mean() for row in found]
        halves = [100 * half_width(row[which]) for row in found]
        axes[0][0].errorbar(values, means, yerr=halves, label=name, capsize=3, ms=6, **look[name])
    differences = [one for *_, one in found]
    axes[0][1].errorbar(
        values,
        [100 * one.difference for one in differences],
        [100 * one.half_width for one in differences],
        color=look["logits"]["color"],
        marker="s",
        capsize=3,
        ms=6,
    )
    axes[0][1].axhline(0, color="0.2", lw=1, ls=":")
    axes[0][1].axhspan(-100 * MARGIN, 100 * MARGIN, color="0.92", lw=0, zorder=0)
    axes[0][0].set_ylabel("test accuracy, %")
    axes[0][1].set_ylabel("logits minus standard, points")
    for axis in axes[0]:
        axis.set_xscale("log")
        axis.set_xticks(values, [f"{value:g}" for value in values])
        axis.minorticks_off()
        axis.set_xlabel(what)
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False
    )
    return (
        figure,
        "Means over seeds with 95 % intervals; on the right the differences, with simultaneous "
        f"95 % intervals. The band is the margin of {100 * MARGIN:g} points.",
    )


def front(tables: Tables, said: dict[str, Any]) -> tuple[Any, str]:
    figure, axes = figures.canvas(10.4, 3.6, 3)
    names, latency = ["standard", "logits"], said["latency"]
    look, (teacher, top) = looks(names), teacher_of(tables)
    big = tables.runs.dropna(subset=["teacher_params"]).iloc[0]
    costs_ = [("params", "parameters"), ("macs", "MACs"), ("ms", "ms for one image")]
    for axis, (key, title) in zip(axes[0], costs_, strict=True):
        seen = []
        for name in names:
            mine = tables.runs[(tables.runs["method"] == name) & (tables.runs["status"] == "done")]
            for student, rows in mine.groupby("student"):
                cost = latency[student]["1"] if key == "ms" else rows[key].iloc[0]
                values = 100 * rows["test_accuracy"]
                seen.append((cost, values.mean()))
                axis.errorbar(
                    cost,
                    values.mean(),
                    yerr=half_width(values),
                    color=look[name]["color"],
                    capsize=3,
                    marker=look[name]["marker"],
                    ls="",
                    label=name,
                    ms=6,
                )
        cost = latency[teacher]["1"] if key == "ms" else big[f"teacher_{key}"]
        axis.plot(cost, top, marker="*", color="0.1", ms=12, ls="", label=f"teacher {teacher}")
        edge = figures.pareto([*seen, (cost, top)])
        axis.step(
            *zip(*edge, strict=True),
            where="post",
            color="0.5",
            lw=1,
            ls="--",
            label="Pareto front",
            zorder=1,
        )
        axis.set(xscale="linear" if key == "ms" else "log", xlabel=title)
    axes[0][0].set_ylabel("test accuracy, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once.keys(), loc="outside upper center", ncols=4, frameon=False)
    return (
        figure,
        "Means over seeds with 95 % intervals of students of scale 4, 8, 16 and 32, "
        "and their teacher.",
    )
