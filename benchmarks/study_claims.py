"""Compare the settings of the study by the report's procedure, one family for each part."""

import math
from collections.abc import Iterator

import pandas as pd

from kd.report.inference import (
    LEVEL,
    Difference,
    Estimate,
    compare,
    dunnett,
    holm_intervals,
    spreads_differ,
)
from kd.report.tables import Tables

GRAIN = 1e-4  # one of CIFAR-10's test images
SWEPT = {  # part: (the key that it sweeps, the title of its axis)
    "labels": ("student.label_fraction", "part of the labels given"),
    "budget": ("student.epochs", "epochs of the student"),
    "student": ("student.scale", "scale of the student"),
    "teacher": ("teacher.scale", "scale of the teacher"),
}


def accuracies(runs: pd.DataFrame) -> pd.Series:
    """Return test accuracy by seed."""
    return runs[runs["status"] == "done"].set_index("seed")["test_accuracy"]


def gains(runs: pd.DataFrame, key: str) -> Iterator[tuple[float, pd.Series, pd.Series]]:
    """Yield the accuracies of `standard` and of `logits` by seed, for each value of the key.

    For a key of the teacher, all values are compared with the same `standard` runs.
    """
    taught, plain = runs[runs["method"] == "logits"], runs[runs["method"] == "standard"]
    for value, group in taught.groupby(key):
        base = plain if key.startswith("teacher.") else plain[plain[key] == value]
        yield float(value), accuracies(base), accuracies(group)


def share(settings: int, extra: bool) -> tuple[float, float]:
    """Return the error rates of comparisons with a baseline, and of one comparison beside them."""
    if not extra:
        return LEVEL, 0.0
    return LEVEL * settings / (settings + 1), LEVEL / (settings + 1)


def contrast(accuracy: pd.DataFrame, name: str, other: str, level: float) -> Estimate:
    """Compare two settings of a family, neither of which is its baseline."""
    complete = accuracy.dropna()
    n, k = complete.shape
    values = complete.to_numpy()
    residuals = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    df = (n - 1) * (k - 1)
    sd = max(math.sqrt((residuals**2).sum() / df), GRAIN)
    difference = float((complete[name] - complete[other]).mean())
    found = dunnett({name: difference}, sd * math.sqrt(2 / n), df, n, level)[name]
    return found._replace(p=min(1.0, found.p * LEVEL / level))


def tested(tables: Tables, part: str) -> list[tuple[float, pd.Series, pd.Series, Estimate]]:
    """Compare `logits` with `standard` for each value of the key that a part sweeps.

    The values are one family. They share an error variance, or, where their spreads differ, each
    has its own and Holm's correction.

    Returns:
        (value, accuracies of `standard` by seed, accuracies of `logits` by seed, comparison).
    """
    found = list(gains(tables.runs, SWEPT[part][0]))
    if part == "teacher":  # one baseline for all
        level, _ = share(len(found), extra=True)
        estimates = compare(by_teacher(tables), "standard", {}, GRAIN, level).estimates
        return [(value, *both, estimates[f"{value:g}"]) for value, *both in found]
    names = [f"{value:g}" for value, *_ in found]
    differences = pd.DataFrame(
        {name: taught - plain for name, (_, plain, taught) in zip(names, found, strict=True)}
    ).dropna()
    n = len(differences)
    means = differences.mean()
    if spreads_differ(differences, GRAIN):
        spreads = differences.std().clip(lower=GRAIN) / math.sqrt(n)
        rows = [Difference(x, float(means[x]), float(spreads[x]), n - 1, n) for x in names]
        estimates = holm_intervals(rows)
    else:
        df = (n - 1) * len(names)
        sd = max(math.sqrt(float(differences.var().mean())), GRAIN)
        by_name = {name: float(means[name]) for name in names}
        estimates = dunnett(by_name, sd / math.sqrt(n), df, n, correlation=0.0)
    return [
        (value, plain, taught, estimates[name])
        for name, (value, plain, taught) in zip(names, found, strict=True)
    ]


def by_teacher(tables: Tables) -> pd.DataFrame:
    """Return accuracies by seed of `standard`, and of `logits` with each scale of the teacher."""
    columns = {}
    for value, plain, taught in gains(tables.runs, SWEPT["teacher"][0]):
        columns["standard"] = plain
        columns[f"{value:g}"] = taught
    return pd.DataFrame(columns)


def compared(tables: Tables) -> dict[str, Estimate]:
    """Return the comparison with `standard` of each method of the summary, by method."""
    found = {}
    for _, row in tables.summary[tables.summary["method"] != "standard"].iterrows():
        found[row["method"]] = Estimate(
            *(row[name] for name in ("difference", "difference_ci95", "difference_ci90", "p")),
            int(row["seeds"]),
            row["difference_error"],
            row["difference_df"],
        )
    return found


def by_method(tables: Tables) -> pd.DataFrame:
    """Return accuracies by seed of each method of the largest budget."""
    runs = tables.runs[tables.runs["epochs"] == tables.runs["epochs"].max()]
    return pd.DataFrame({name: accuracies(group) for name, group in runs.groupby("method")})
