"""Tables of finished runs, from their files alone: no torch, no training."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from kd.record import read_json, write_text

MEANS = ["val_accuracy", "test_nll", "test_ece", "test_agreement", "params", "train_seconds"]
BUDGET = ["student", "epochs", "samples"]


def runs(jobs: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """A row a job: what was asked for, its status, and its metrics (accuracies and the like as parts of 1).

    **Arguments:** jobs as {"overrides": [...], "folder": path, "status": str, "reason": str}.
    """
    jobs, rows = list(jobs), []
    shared = set.intersection(*(set(job["overrides"]) for job in jobs)) if jobs else set()
    for job in jobs:
        result = read_json(Path(job["folder"]) / "result.json") if job["status"] == "done" else None
        row = {"status": job["status"], "reason": job["reason"], "overrides": " ".join(job["overrides"])}
        if result:
            teacher = result["teacher"] or {}
            row |= {k: result[k] for k in ("id", "method", "student", "seed", "epochs")}
            row |= {"samples": result["samples"]["train"], **result["metrics"], **result["size"]}
            row |= {"train_seconds": result["time"]["train_seconds"], "teacher": teacher.get("name")}
            row |= {"teacher_test_accuracy": teacher.get("metrics", {}).get("test_accuracy")}
            row["setting"] = setting((o for o in job["overrides"] if o not in shared), result)
        rows.append({**row, "folder": str(job["folder"])})
    return pd.DataFrame(rows)


def setting(overrides: Iterable[str], result: Mapping[str, Any]) -> str:
    """What sets a job's configuration apart from its neighbours', its seed aside."""
    said = [o.lstrip("+") for o in overrides if not o.lstrip("+").startswith(("seed=", "method=", "hydra"))]
    return " ".join([result["method"], *said])


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """A row per configuration, seeds folded: n, mean, standard deviation and 95 % CI (Student's t) of the test
    accuracy, and the means of the other metrics. No interval from one seed."""
    done = table[table["status"] == "done"]
    if done.empty:
        return pd.DataFrame()
    rows = []
    for name, group in done.groupby("setting", sort=False):
        accuracy = group["test_accuracy"]
        n, spread = len(group), accuracy.std()
        half = stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n) if n > 1 else math.nan
        row = {"setting": name, "n": n, "test_accuracy": accuracy.mean(), "std": spread, "ci95": half}
        row |= {c: group[c].mean() for c in MEANS if c in group} | {c: group[c].iloc[0] for c in BUDGET}
        row["teacher_test_accuracy"] = group["teacher_test_accuracy"].max()
        rows.append(row)
    return pd.DataFrame(rows)


def text(table: pd.DataFrame) -> str:
    """The comparison that ends a sweep, as lines for a terminal."""
    if table.empty:
        return "no job finished"
    best = table["teacher_test_accuracy"].max()
    plain = table[table["setting"].str.split().str[0] == "standard"]
    base = plain["test_accuracy"].iloc[0] if len(plain) == 1 else None
    lines = [["", "n", "test accuracy", "vs standard", "gap closed", "val", "NLL", "ECE", "agreement", "epochs"]]
    shown = {
        "val_accuracy": (100, ".2f"),
        "test_nll": (1, ".3f"),
        "test_ece": (1, ".3f"),
        "test_agreement": (100, ".1f"),
    }
    for _, row in table.iterrows():
        gain = None if base is None else row["test_accuracy"] - base
        gap = None if gain is None or pd.isna(best) or best <= base else gain / (best - base)
        spread = "" if pd.isna(row["ci95"]) else f" ± {100 * row['ci95']:.2f}"
        lines.append([
            row["setting"], str(row["n"]), f"{100 * row['test_accuracy']:.2f} %{spread}",
            "-" if not gain else f"{100 * gain:+.2f}", "-" if not gain or gap is None else f"{100 * gap:.0f} %",
            *(_number(row, name, *form) for name, form in shown.items()), f"{row['epochs']:.0f}",
        ])  # fmt: skip
    if not pd.isna(best):
        lines.append(["teacher", "", f"{100 * best:.2f} %", *[""] * 7])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    aligned = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    if table["n"].nunique() > 1:
        aligned.append("note: the rows have different numbers of seeds")
    if len(table[BUDGET].drop_duplicates()) > 1:
        aligned.append("note: the rows differ in student, epochs or training images; they share no budget")
    return "\n".join(line.rstrip() for line in aligned)


def _number(row: pd.Series, name: str, scale: float, form: str) -> str:
    return "-" if name not in row or pd.isna(row[name]) else format(scale * row[name], form)


def write(folder: Path, jobs: Sequence[Mapping[str, Any]]) -> str:
    """Write runs.csv and summary.csv into a sweep's directory; return the comparison as text."""
    table = runs(jobs)
    folded = summary(table)
    write_text(folder / "runs.csv", table.to_csv(index=False))
    write_text(folder / "summary.csv", folded.to_csv(index=False))
    return text(folded)
