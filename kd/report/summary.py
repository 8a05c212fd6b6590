"""Fold the runs of a setting into one row, and choose a setting of each method on validation."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from kd.runs.status import RunState

# Keys that define what is trained on what: settings are compared within them, never chosen
CONTEXT = ("student.", "data.")
AVERAGED = (  # columns of runs whose mean is a column of the summary
    "val_accuracy",
    "val_nll",
    "val_brier",
    "val_ece",
    "val_agreement",
    "val_teacher_kl",
    "train_seconds",
    "images_per_second",
    "teacher_test_accuracy",
    "train_flops",
    "teacher_flops",
    "last_below_best",
)
WITH_INTERVAL = (  # likewise, with an interval over seeds
    "test_nll",
    "test_brier",
    "test_ece",
    "test_agreement",
    "test_teacher_kl",
)
KEPT_COLUMNS = (  # columns copied from the first run
    "data",
    "params",
    "macs",
    "teacher",
    "teacher_params",
    "teacher_macs",
    "epochs",
    "samples",
    "test_samples",
    "batch_size",
    "budget",
)
SEEDS = ("seed", "teacher_seed", "split_seed")  # columns that tell the runs of a setting apart
OBJECTIVE = "val_accuracy"  # what a setting is chosen by, unless a search had another objective
MAXIMIZED = ("val_accuracy", "val_agreement")  # objectives of which more is better


def half_width(values: pd.Series, grain: float = 0.0) -> float:
    """Return half the 95 % confidence interval of a mean, by Student's t.

    Args:
        values: One value per seed.
        grain: The smallest difference of a value; no spread is taken to be smaller.

    Returns:
        The half-width; nan for fewer than two values.
    """
    n = int(values.count())
    return _quantile(n - 1) * max(values.std(), grain) / math.sqrt(n) if n > 1 else math.nan


@functools.cache
def _quantile(degrees_of_freedom: int) -> float:
    from scipy import stats

    return float(stats.t.ppf(0.975, degrees_of_freedom))


def bounded(mean: float, half: float) -> tuple[float, float]:
    """Return the ends of an accuracy's interval on the scale of logits, which 0 and 1 bound.

    Args:
        mean: The accuracy, 0 to 1.
        half: The half-width of its interval on the scale of accuracies.
    """
    if math.isnan(half):
        return math.nan, math.nan
    inside = min(max(mean, half / 4), 1 - half / 4) if half < 1 else 0.5
    center = math.log(inside / (1 - inside))
    reach = min(half / (inside * (1 - inside)), 700 - abs(center))
    low, high = (1 / (1 + math.exp(-center - sign * reach)) for sign in (-1, 1))
    return min(low, mean), max(high, mean)


def finished_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs that are done, one for each setting and its seeds.

    If a setting was run more than once with the same seeds, because the identity of its
    configuration has changed since, the last run counts.
    """
    keys = ["setting", *(name for name in SEEDS if name in runs)]
    return runs[runs["status"] == RunState.DONE].drop_duplicates(keys, keep="last")


def with_seed_names(runs: pd.DataFrame) -> "pd.Series[Any]":
    """Return the name of each run's student seed, with the seed of the split where that differs.

    The runs of two settings with equal names share the order of images, views and initial weights.
    """
    names = runs["seed"].astype("Int64").astype(str)
    if "split_seed" in runs and runs["split_seed"].nunique() > 1:
        names = names + " split " + runs["split_seed"].astype("Int64").astype(str)
    return names


def summarise(runs: pd.DataFrame, swept: Sequence[str], objective: str = OBJECTIVE) -> pd.DataFrame:
    """Return a row for each setting that has a finished run.

    A row holds n, means, the spread of the test accuracy, and whether validation chooses the
    setting among those of its method. The chosen rows come first, each part best on validation
    first.

    Args:
        runs: One row per run.
        swept: The configuration keys that differ between runs.
        objective: The validation metric that settings are chosen by.
    """
    rows = []
    keys = [name for name in SEEDS if name in runs]
    planned = {
        str(setting): group.drop_duplicates(keys)
        for setting, group in runs.groupby("setting", sort=False)
    }
    done = finished_runs(runs)
    by_setting = {str(name): group for name, group in done.groupby("setting", sort=False)}
    for setting, plan in planned.items():
        if setting in by_setting:
            rows.append(_fold(by_setting[setting], swept) | {"planned": len(plan)})
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    seeds = {
        setting: (set(with_seed_names(plan)), with_seed_names(by_setting[setting]))
        for setting, plan in planned.items()
        if setting in by_setting
    }
    return _mark_chosen(table, by_setting, seeds, objective)


def _fold(done: pd.DataFrame, swept: Sequence[str]) -> dict[str, Any]:
    """Return the row of a setting, from its finished runs."""
    first = done.iloc[0]
    row = {name: first[name] for name in ("setting", "method", "student")}
    row |= {key: first[key] for key in swept if key in done}
    row["n"] = len(done)
    row["planned"] = 0  # its place among the columns
    accuracy = done["test_accuracy"]
    unit = accuracy
    if "teacher_seed" in done and (teachers := int(done["teacher_seed"].nunique())) > 1:
        row["teachers"] = teachers
        unit = done.groupby("teacher_seed")["test_accuracy"].mean()
    half = half_width(unit, _grain(first.get("test_samples")))
    low, high = bounded(accuracy.mean(), half)
    row |= {
        "test_accuracy": accuracy.mean(),
        "test_accuracy_std": accuracy.std(),
        "test_accuracy_ci95": half,
        "test_accuracy_low": low,
        "test_accuracy_high": high,
        "test_accuracy_median": accuracy.median(),
    }
    for name in WITH_INTERVAL:
        if name in done:
            row |= {name: done[name].mean(), f"{name}_ci95": half_width(done[name])}
    row |= {name: done[name].mean() for name in AVERAGED if name in done}
    row |= {name: first[name] for name in KEPT_COLUMNS if name in done}
    row["context"] = str(
        [(key, first[key]) for key in swept if key.startswith(CONTEXT) and key != "student.epochs"]
    )
    return row


def _grain(images: Any) -> float:
    """Return the smallest difference of a test accuracy, or 0.0 if it is not known."""
    return 0.0 if images is None or pd.isna(images) or not images else 1 / float(images)


def _mark_chosen(
    table: pd.DataFrame,
    runs: Mapping[str, pd.DataFrame],
    seeds: Mapping[str, tuple[set[str], "pd.Series[Any]"]],
    objective: str,
) -> pd.DataFrame:
    """Return `table` with the columns on the choice, sorted.

    Only complete settings are chosen: those whose runs are done with all seeds that are planned
    for every setting of the method. They are compared on these seeds alone. The chosen rows come
    first, the complete ones before the others, and each part is sorted by the objective; rows that
    tie stay in planned order. The rows of a student and data set without validation images come
    last, in planned order.

    Args:
        table: One row per setting, in planned order.
        runs: The finished runs of each setting.
        seeds: For each setting the planned seeds, and the seed of each finished run.
        objective: The validation metric that settings are chosen by.
    """
    sign = 1.0 if objective in MAXIMIZED else -1.0
    table["settings_tried"] = 1
    table["choice_seeds"] = ""
    known = _known(table, objective)
    scores = dict.fromkeys(table["setting"], -math.inf)
    is_complete = dict(zip(table["setting"], table["n"] == table["planned"], strict=True))
    chosen: set[str] = set()
    tied: dict[str, str] = {}
    for _, group in table.groupby(["context", "method"], sort=False):
        names = list(group["setting"])
        table.loc[group.index, "settings_tried"] = len(names)
        if len(names) == 1:
            chosen.update(names)
        if not known[group.index[0]]:
            continue
        common, candidates = _candidates({name: seeds[name] for name in names})
        table.loc[group.index, "choice_seeds"] = ", ".join(sorted(common, key=_by_number))
        for name in names:
            values = sign * runs[name][objective]
            if common and name in candidates:
                values = values[seeds[name][1].isin(common)]
            scores[name] = round(float(values.mean()), 12)
            is_complete[name] &= name in candidates
        eligible = [name for name in names if name in candidates]
        best = max(eligible, key=scores.__getitem__)
        chosen.add(best)
        tied |= {name: best for name in eligible if name != best and scores[name] == scores[best]}
    table["chosen"] = table["setting"].isin(chosen)
    table["tied_with"] = [tied.get(name) for name in table["setting"]]
    complete = table["setting"].map(is_complete).astype(bool)
    score = table["setting"].map(scores).astype(float)
    order = pd.DataFrame({"chosen": table["chosen"], "complete": complete, "score": score})
    order = order.sort_values(["chosen", "complete", "score"], ascending=False, kind="stable")
    table["complete"] = complete
    table["choice_value"] = sign * score.where(known)
    return table.loc[order.index].reset_index(drop=True)


def _candidates(
    seeds: Mapping[str, tuple[set[str], "pd.Series[Any]"]],
) -> tuple[set[str], set[str]]:
    """Return the seeds that the settings of a method are compared on, and the settings to compare.

    If no setting is complete, the settings are compared on the seeds that are done for all of
    them. If there are none, those with the most seeds are compared, on all of them.
    """
    done = {name: set(finished) for name, (_, finished) in seeds.items()}
    planned = set.intersection(*(plan for plan, _ in seeds.values()))
    if planned and (complete := {name for name in done if planned <= done[name]}):
        return planned, complete
    if common := set.intersection(*done.values()):
        return common, set(done)
    most = max(len(finished) for finished in done.values())
    return set(), {name for name in done if len(done[name]) == most}


def _by_number(name: str) -> tuple[int, str]:
    return int(name.partition(" ")[0]), name


def _known(table: pd.DataFrame, objective: str) -> "pd.Series[bool]":
    """Return for each row whether all rows of its student and data set have the objective."""
    if objective not in table:
        return pd.Series(False, index=table.index)
    return table[objective].notna().groupby(table["context"]).transform("all")


def has_validation(table: pd.DataFrame) -> bool:
    """Return whether every row of a summary has a validation accuracy to be ordered by."""
    return "val_accuracy" in table and bool(table["val_accuracy"].notna().all())


def validated(table: pd.DataFrame) -> pd.Series:
    """Return the validation accuracies, rounded.

    Means of the same numbers that differ only by the order of summation become equal.
    """
    return table["val_accuracy"].round(12)


def ece_floor(reliability: Mapping[str, Iterable[float]], runs: int = 1) -> float:
    """Return the expected calibration error that a perfectly calibrated network would have.

    With finitely many images the fraction of right ones in a bin differs from the confidence by
    chance: by sqrt(2 p (1 - p) / (pi n)) on average for n images of mean confidence p.

    Args:
        reliability: Per bin the number of `images` and the sum of their `confidence`, over all
            runs.
        runs: The number of runs.
    """
    images = list(reliability["images"])
    total = 0.0
    for n, confidence in zip(images, reliability["confidence"], strict=True):
        if n > 0:
            p = min(confidence / n, 1.0)
            total += math.sqrt(2 / math.pi * n / runs * p * (1 - p))
    return total * runs / sum(images) if sum(images) else math.nan
