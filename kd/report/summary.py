"""Fold the runs of a setting into one row, and choose a setting of each method on validation."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

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


class SettingSeeds(NamedTuple):
    """The student's seeds of a setting.

    Attributes:
        planned: The seeds of the planned runs.
        done: The seed of each finished run.
        objective: The objective of each finished run.
    """

    planned: set[str]
    done: list[str]
    objective: list[float]


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
    runs = runs.assign(block=with_seed_names(runs) if len(runs) else "")
    done = finished_runs(runs)
    if done.empty:
        return pd.DataFrame()
    keys = [name for name in SEEDS if name in runs]
    plan = runs.drop_duplicates(["setting", *keys])
    finished = set(done["setting"])
    order = [name for name in plan["setting"].unique() if name in finished]
    table = _fold(done, swept, plan.groupby("setting").size()).loc[order].reset_index()
    seeds = {str(name): SettingSeeds(set(), [], []) for name in order}
    for name, seed in zip(plan["setting"], plan["block"], strict=True):
        if name in seeds:
            seeds[name].planned.add(seed)
    values = done[objective] if objective in done else [math.nan] * len(done)
    for name, seed, value in zip(done["setting"], done["block"], values, strict=True):
        seeds[name].done.append(seed)
        seeds[name].objective.append(value)
    return _mark_chosen(table, seeds, objective)


def _fold(done: pd.DataFrame, swept: Sequence[str], planned: "pd.Series[Any]") -> pd.DataFrame:
    """Return a row for each setting, from its finished runs; the settings are the index."""
    groups = done.groupby("setting", sort=False)
    first = done.drop_duplicates("setting").set_index("setting")
    table = first[["method", "student", *(key for key in swept if key in first)]].copy()
    table["n"] = groups.size()
    table["planned"] = planned
    accuracy = groups["test_accuracy"]
    count, spread = table["n"].astype(float), accuracy.std()
    if "teacher_seed" in done and ((teachers := groups["teacher_seed"].nunique()) > 1).any():
        table["teachers"] = teachers.where(teachers > 1)
        units = done.groupby(["setting", "teacher_seed"])["test_accuracy"].mean()
        between = units.groupby("setting").std().reindex(table.index)
        spread = spread.where(teachers <= 1, between)
        count = count.where(teachers <= 1, teachers.astype(float))
    images = pd.to_numeric(first.get("test_samples", pd.Series(dtype=float)), errors="coerce")
    grain = (1 / images.astype("Float64")).astype(float).reindex(table.index).fillna(0.0)
    table["test_accuracy"] = accuracy.mean()
    table["test_accuracy_std"] = accuracy.std()
    table["test_accuracy_ci95"] = _half_widths(spread.clip(lower=grain), count)
    ends = [
        bounded(*pair)
        for pair in zip(table["test_accuracy"], table["test_accuracy_ci95"], strict=True)
    ]
    table["test_accuracy_low"] = [low for low, _ in ends]
    table["test_accuracy_high"] = [high for _, high in ends]
    table["test_accuracy_median"] = accuracy.median()
    for name in (name for name in WITH_INTERVAL if name in done):
        table[name] = groups[name].mean()
        table[f"{name}_ci95"] = _half_widths(groups[name].std(), groups[name].count())
    for name in (name for name in AVERAGED if name in done):
        table[name] = groups[name].mean()
    for name in (name for name in KEPT_COLUMNS if name in done):
        table[name] = first[name]
    context = [key for key in swept if key.startswith(CONTEXT) and key != "student.epochs"]
    context = [key for key in context if key in first]
    table["context"] = [
        str(list(zip(context, values, strict=True)))
        for values in zip(*(first[key] for key in context), strict=True)
    ] or str([])
    return table


def _half_widths(spreads: "pd.Series[float]", counts: "pd.Series[Any]") -> list[float]:
    """Return half the 95 % interval of each mean, by Student's t; nan for fewer than two."""
    return [
        _quantile(int(n) - 1) * spread / math.sqrt(n) if n > 1 else math.nan
        for spread, n in zip(spreads, counts, strict=True)
    ]


def _mark_chosen(
    table: pd.DataFrame, seeds: Mapping[str, SettingSeeds], objective: str
) -> pd.DataFrame:
    """Return `table` with the columns on the choice, sorted.

    Only complete settings are chosen: those whose runs are done with all seeds that are planned
    for every setting of the method. They are compared on these seeds alone. The chosen rows come
    first, the complete ones before the others, and each part is sorted by the objective; rows that
    tie stay in planned order. The rows of a student and data set without validation images come
    last, in planned order.

    Args:
        table: One row per setting, in planned order.
        seeds: The seeds of each setting.
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
            used = common if common and name in candidates else set(seeds[name].done)
            pairs = zip(seeds[name].done, seeds[name].objective, strict=True)
            values = [value for seed, value in pairs if seed in used]
            scores[name] = round(sign * math.fsum(values) / len(values), 12)
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
    seeds: Mapping[str, SettingSeeds],
) -> tuple[set[str], set[str]]:
    """Return the seeds that the settings of a method are compared on, and the settings to compare.

    If no setting is complete, the settings are compared on the seeds that are done for all of
    them. If there are none, those with the most seeds are compared, on all of them.
    """
    done = {name: set(each.done) for name, each in seeds.items()}
    planned = set.intersection(*(each.planned for each in seeds.values()))
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
