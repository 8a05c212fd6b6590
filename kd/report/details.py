"""Further tables of a report: costs, new images, classes, and the sources of variance."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from kd.report.comparison import format_accuracy, format_interval, probability_table
from kd.report.images import (
    Outputs,
    check_same_images,
    compare_outputs,
    confusions,
    correctness,
    correctness_of_runs,
    image_interval,
    load_outputs,
    mcnemar,
    per_class,
)
from kd.report.sources import REST, variance_by_source
from kd.report.summary import SEEDS, finished_runs
from kd.report.tables import Tables
from kd.report.text_table import Column, Row, TextTable

MAX_SETTINGS = 30  # rows of these tables
MAX_CLASSES = 20  # rows of the table of classes
NORMAL = 1.96  # half-width of a normal 95 % interval, in standard errors
SOURCE_NAMES = {
    "seed": "student (seed)",
    "teacher_seed": "teacher (teacher.seed)",
    "split_seed": "split (data.split_seed)",
    REST: "rest",
}


class Detail(NamedTuple):
    """A further table of the page: its title, the table, and what explains it."""

    title: str
    table: TextTable
    text: str


OutputsBySetting = Mapping[str, Sequence[Outputs]]


# ---- images


def shown_settings(summary: pd.DataFrame) -> list[str]:
    """Return the settings whose outputs a report reads: the chosen ones and their baselines."""
    if summary.empty:
        return []
    chosen = summary[summary["chosen"]].head(MAX_SETTINGS)
    return list(dict.fromkeys([*chosen["setting"], *chosen["baseline"].dropna()]))


def load_shown(tables: Tables) -> tuple[dict[str, list[Outputs]], list[str]]:
    """Load the outputs of the settings that are shown.

    Returns:
        The outputs of each setting all of whose finished runs kept them, and the problems.
    """
    settings = shown_settings(tables.summary)
    done = finished_runs(tables.runs)
    done = done[done["setting"].isin(settings)]
    outputs: dict[str, list[Outputs]] = {}
    problems: list[str] = []
    for setting, group in done.groupby("setting", sort=False):
        loaded = [load_outputs(Path(str(folder))) for folder in group["folder"]]
        problems += [
            f"{Path(str(folder)).name}: {problem}"
            for folder, (_, problem) in zip(group["folder"], loaded, strict=True)
            if problem
        ]
        if all(one is not None for one, _ in loaded):
            outputs[str(setting)] = [one for one, _ in loaded if one is not None]
    comparable = {setting: runs for setting, runs in outputs.items() if _are_comparable(runs)}
    return comparable, problems


def _are_comparable(outputs: Sequence[Outputs]) -> bool:
    """Return whether runs were tested on the same images, as far as labels and classes show."""
    try:
        check_same_images(outputs)
    except ValueError:
        return False
    return True


def with_image_intervals(tables: Tables, outputs: OutputsBySetting) -> pd.DataFrame:
    """Return the summary with intervals that cover new images, where outputs were kept.

    Without outputs the interval of an accuracy is the binomial one, which is at least as wide.
    """
    summary = tables.summary.copy()
    accuracy, difference = [], []
    for _, row in summary.iterrows():
        ours = outputs.get(row["setting"])
        base = outputs.get(row["baseline"]) if isinstance(row["baseline"], str) else None
        if ours:
            accuracy.append(image_interval(correctness_of_runs(ours)))
        else:
            accuracy.append(_binomial(row["test_accuracy"], row.get("test_samples")))
        difference.append(_image_difference(ours, base) if row["chosen"] else math.nan)
    summary["test_accuracy_images_ci95"] = accuracy
    summary["difference_images_ci95"] = difference
    return summary


def _binomial(accuracy: float, images: Any) -> float:
    if images is None or pd.isna(images) or not images:
        return math.nan
    return NORMAL * math.sqrt(accuracy * (1 - accuracy) / int(images))


def _image_difference(ours: Sequence[Outputs] | None, base: Sequence[Outputs] | None) -> float:
    if not ours or not base or not _are_comparable([ours[0], base[0]]):
        return math.nan
    return compare_outputs(ours, base)[1]


def new_images(tables: Tables, outputs: OutputsBySetting) -> Detail | None:
    """Return how far accuracies and differences hold for new images."""
    summary = tables.summary
    rows = []
    for _, row in summary[summary["chosen"]].head(MAX_SETTINGS).iterrows():
        half, images = row["test_accuracy_ci95"], row["test_accuracy_images_ci95"]
        if pd.isna(images):
            continue
        wider = max(images, 0.0 if pd.isna(half) else half)
        cells = {
            "setting": row["setting"],
            "test": format_accuracy(row),
            "seeds": "" if pd.isna(half) else f"{100 * half:.2f}",
            "images": f"{100 * images:.2f}",
            "both": f"{100 * wider:.2f}",
            "difference": format_interval(row["difference"], row["difference_images_ci95"], "+.2f")
            if not pd.isna(row["difference_images_ci95"])
            else "",
            "pair": _pair_text(outputs.get(row["setting"]), outputs.get(str(row["baseline"]))),
        }
        rows.append(Row(cells))
    if not rows:
        return None
    columns = [
        Column("setting", "", "setting"),
        Column("test", "test, %", "number"),
        Column("seeds", "± seeds", "number"),
        Column("images", "± images", "number"),
        Column("both", "± wider of both", "number"),
        Column("difference", "vs standard (± images)", "number"),
        Column("pair", "one pair of runs", "text"),
    ]
    if all(not row.cells["pair"] for row in rows):
        columns = [column for column in columns if column.name != "pair"]
    text = (
        "± seeds covers other seeds on these images, ± images covers other images with these "
        "seeds. For new images and new seeds, quote the wider of both. The difference is taken "
        "image by image, averaged over seeds. Where outputs were not kept, ± images is the "
        "binomial interval, and the difference has none. One pair of runs is compared by McNemar's "
        "exact test, which says nothing about other seeds."
    )
    return Detail("New images", TextTable(columns, rows), text)


def _pair_text(ours: Sequence[Outputs] | None, base: Sequence[Outputs] | None) -> str:
    """Return McNemar's test, if there is one run on each side."""
    if not ours or not base or len(ours) > 1 or len(base) > 1:
        return ""
    if not _are_comparable([ours[0], base[0]]):
        return ""
    test = mcnemar(correctness(ours[0]), correctness(base[0]))
    return f"{test.only_a} only here, {test.only_b} only there right (p = {test.p:.3f})"


def classes(tables: Tables, outputs: OutputsBySetting) -> list[Detail]:
    """Return the accuracy of each class, and the confusions, of the best setting."""
    summary = tables.summary
    best = next(
        (x for _, x in summary[summary["chosen"]].iterrows() if x["setting"] in outputs), None
    )
    if best is None:
        return []
    ours = outputs[best["setting"]]
    table = _class_table(ours).rename(columns={"accuracy": "ours"})
    base = outputs.get(str(best["baseline"]))
    title = f"Classes: {best['setting']}"
    if base and _are_comparable([ours[0], base[0]]):
        table["base"] = _class_table(base)["accuracy"]
        title += f" and {best['baseline']}"
    table = table.sort_values("ours", kind="stable").head(MAX_CLASSES)
    columns = [
        Column("class", "class", "setting"),
        Column("images", "images", "number"),
        Column("ours", f"{best['setting']}, %", "number"),
    ]
    if "base" in table:
        columns.append(Column("base", f"{best['baseline']}, %", "number"))
    rows = [
        Row({name: _cell(name, row[name]) for name in table.columns}) for _, row in table.iterrows()
    ]
    pairs = [
        f"{pair['true']} as {pair['predicted']} ({100 * pair['share']:.1f} %)"
        for pair in confusions(ours).to_dict("records")
    ]
    text = "Mean over seeds of the fraction of the class's test images that are right; worst first."
    if pairs:
        text += f" Most frequent confusions of {best['setting']}: {', '.join(pairs)}."
    return [Detail(title, TextTable(columns, rows), text)]


def _class_table(outputs: Sequence[Outputs]) -> pd.DataFrame:
    first = outputs[0]
    return per_class(first.labels, correctness_of_runs(outputs).mean(0), first.classes)


def _cell(name: str, value: Any) -> str:
    if name in ("ours", "base"):
        return "" if pd.isna(value) else f"{100 * value:.1f}"
    return str(value)


# ---- probabilities


def probabilities(tables: Tables) -> Detail | None:
    """Return how well the probabilities of the chosen settings fit labels and teacher."""
    table = probability_table(tables)
    if not table.rows or len(table.columns) == 1:
        return None
    text = (
        "Means over seeds, ± the half-width of the 95 % confidence interval. NLL and Brier score "
        "measure accuracy and calibration together. The calibration error ECE of a perfectly "
        "calibrated network is the floor, because the test images are finitely many."
    )
    return Detail("Probabilities", table._replace(rows=table.rows[:MAX_SETTINGS]), text)


# ---- costs


def ledger(tables: Tables) -> Detail | None:
    """Return what each chosen setting was given: training, teacher and tuning."""
    summary = tables.summary
    rows = []
    for _, row in summary[summary["chosen"]].head(MAX_SETTINGS).iterrows():
        below = row.get("last_below_best")
        cells = {
            "setting": row["setting"],
            "epochs": str(row["epochs"]),
            "samples": "" if pd.isna(row["samples"]) else f"{row['samples']:,}",
            "train": _flops(row.get("train_flops")),
            "teacher": _flops(row.get("teacher_flops")),
            "tried": str(row["settings_tried"]),
            "below": "" if below is None or pd.isna(below) else f"{100 * below:.2f}",
        }
        rows.append(Row(cells))
    if not rows:
        return None
    columns = [
        Column("setting", "", "setting"),
        Column("epochs", "epochs", "number"),
        Column("samples", "images per epoch", "number"),
        Column("train", "training, TFLOP", "number"),
        Column("teacher", "teacher, TFLOP", "number"),
        Column("tried", "settings tried", "number"),
        Column("below", "best − last epoch, points", "number"),
    ]
    text = (
        "Per run. Training counts 6 operations for each multiply-accumulate of the student's "
        "forward pass, without networks that only the method needs. Teacher counts what its cache "
        "did not save, without the teacher's own training. The last column is the validation "
        "accuracy of the best epoch minus that of the last, which is the one reported."
    )
    return Detail("What each setting was given", TextTable(columns, rows), text)


def _flops(value: Any) -> str:
    return "" if value is None or pd.isna(value) else f"{value / 1e12:,.4g}"


# ---- sources of variance


def variance(tables: Tables) -> Detail | None:
    """Return the variance of the test accuracy by source, where several kinds of seeds vary."""
    done = finished_runs(tables.runs)
    varying = [name for name in SEEDS if name in done and done[name].nunique() > 1]
    if len(varying) < 2 or tables.summary.empty:
        return None
    rows = []
    notes = []
    for setting in tables.summary[tables.summary["chosen"]]["setting"].head(MAX_SETTINGS):
        table, reason = variance_by_source(done[done["setting"] == setting])
        if reason:
            notes.append(f"{setting}: {reason}")
        for component in table.to_dict("records"):
            interval = ""
            if not pd.isna(component["low"]):
                interval = f"{100 * component['low']:.2f} to {100 * component['high']:.2f}"
            cells = {
                "setting": setting,
                "source": SOURCE_NAMES.get(component["source"], component["source"]),
                "levels": str(component["levels"]),
                "sd": f"{100 * component['sd']:.2f}",
                "interval": interval,
                "share": "" if pd.isna(component["share"]) else f"{100 * component['share']:.0f}",
            }
            rows.append(Row(cells))
    if not rows:
        return None
    columns = [
        Column("setting", "", "setting"),
        Column("source", "source", "text"),
        Column("levels", "values", "number"),
        Column("sd", "SD, points", "number"),
        Column("interval", "95 % interval", "number"),
        Column("share", "share of variance, %", "number"),
    ]
    text = (
        "How much the test accuracy varies with each kind of seed. A claim about this teacher "
        "rests on the student's seeds; a claim about teachers of this kind also on the teacher's. "
        + "; ".join(notes)
    ).strip()
    return Detail("Variance by source", TextTable(columns, rows), text)
