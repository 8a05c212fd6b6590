"""Compare the settings of a summary with their `standard` baselines, and say what that shows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from kd.report.inference import (
    LEVEL,
    MARGIN,
    MAX_SEEDS,
    MIN_SEEDS,
    Estimate,
    collapsed_seeds,
    compare,
    seeds_needed,
)
from kd.report.sources import claims_over_teachers
from kd.report.summary import finished_runs, with_seed_names
from kd.runs.status import RunState

CLAIMED = (
    "seeds",
    "difference",
    "difference_ci95",
    "difference_ci90",
    "difference_error",
    "difference_df",
    "p",
    "decision",
    "unit",
    "family",
    "seed_correlation",
    "claim",
)


class Part(NamedTuple):
    """Settings of a family that are compared with the baseline in the same way.

    Attributes:
        rows: The rows of these settings.
        unit: What the claims are about, seeds or teachers.
        fresh: Whether only seeds count on which no setting was chosen.
    """

    rows: pd.DataFrame
    unit: str = "seeds"
    fresh: bool = False


def baselines(summary: pd.DataFrame) -> pd.Series:
    """Return the setting of the baseline of each row, or None.

    The baseline is the chosen `standard` setting of the same student and data set.
    """
    standard = summary[(summary["method"] == "standard") & summary["chosen"]]
    setting_by_context = dict(zip(standard["context"], standard["setting"], strict=True))
    settings = summary["context"].map(setting_by_context).astype(object)
    settings[summary["method"] == "standard"] = None
    return settings.where(settings.notna(), None)


def against_standard(
    summary: pd.DataFrame, runs: pd.DataFrame, margin: float = MARGIN, level: float = LEVEL
) -> pd.DataFrame:
    """Return `summary` with its rows compared with their baselines.

    Claims are made only about the chosen settings. Those of one student, data set and budget are
    one family: the error rate of 5 % holds for all of them together. The other rows have a
    difference without an interval. Unstable rows have neither.

    Args:
        summary: One row per setting, as `summarise` returns it.
        runs: One row per run.
        margin: Differences of accuracy up to this count as none.
        level: The error rate of each family.

    Returns:
        A copy with the columns of the comparison, and with the setting of each row's baseline.
    """
    if summary.empty:
        return summary
    summary = summary.copy()
    summary["baseline"] = baselines(summary)
    _mark_budgets(summary)
    runs = runs.assign(block=with_seed_names(runs))
    done = finished_runs(runs)
    unstable = _unstable(summary, runs, done)
    summary["unstable"] = [len(unstable.get(name, ())) for name in summary["setting"]]
    bounds = ["test_accuracy_ci95", "test_accuracy_low", "test_accuracy_high"]
    summary.loc[summary["unstable"] > 0, [name for name in bounds if name in summary]] = math.nan
    by_seed = done.pivot_table(index="block", columns="setting", values="test_accuracy")
    rows: dict[Any, dict[str, Any]] = {index: {} for index in summary.index}
    for baseline, group in summary[summary["baseline"].notna()].groupby("baseline", sort=False):
        base = summary[summary["setting"] == baseline].iloc[0]
        for _, family in group[group["chosen"]].groupby("budget", sort=False):
            rows |= _claims(family, base, by_seed, done, unstable, margin, level)
        for index, row in group[~group["chosen"]].iterrows():
            difference = (by_seed[row["setting"]] - by_seed[baseline]).dropna()
            rows[index] = {"seeds": len(difference), "difference": difference.mean()}
    for name in CLAIMED:
        summary[name] = [rows[index].get(name) for index in summary.index]
    for name in ("p", "seed_correlation", *(name for name in CLAIMED if "difference" in name)):
        summary[name] = summary[name].astype(float)
    summary["seeds"] = [row.get("seeds", 0) for row in rows.values()]
    with_standard = set(summary.loc[summary["method"] == "standard", "context"])
    summary["verdict"] = [
        verdict(row, row["context"] in with_standard) for _, row in summary.iterrows()
    ]
    return summary.drop(columns="claim")


def _mark_budgets(summary: pd.DataFrame) -> None:
    """Add the column `shares_budget`."""
    budget = dict(zip(summary["setting"], summary["budget"], strict=True))
    usual_budget = {
        context: group["budget"].mode().iloc[0] for context, group in summary.groupby("context")
    }
    summary["shares_budget"] = [
        row["budget"] == budget.get(row["baseline"], usual_budget[row["context"]])
        for _, row in summary.iterrows()
    ]


def _unstable(
    summary: pd.DataFrame, runs: pd.DataFrame, done: pd.DataFrame
) -> dict[str, list[Any]]:
    """Return by setting the runs that diverged or collapsed, each named by its seeds.

    The spread that a collapse is measured by is pooled over the settings of one student, data set
    and budget.
    """

    def named(frame: pd.DataFrame) -> "pd.Series[Any]":
        names = frame["block"]
        if "teacher_seed" in frame and frame["teacher_seed"].nunique() > 1:
            teacher = frame["teacher_seed"].astype("Int64").astype(str)
            names = names + (" teacher " + teacher).where(frame["teacher_seed"].notna(), "")
        return names

    done = done.assign(run=named(done))
    diverged = runs[runs["status"] == RunState.DIVERGED]
    diverged = diverged.assign(run=named(diverged))
    failed = {name: list(group["run"]) for name, group in diverged.groupby("setting")}
    unstable: dict[str, list[Any]] = {}
    for _, group in summary.groupby(["context", "budget"], sort=False):
        names = list(group["setting"])
        ours = done[done["setting"].isin(names)]
        accuracy = ours.pivot_table(index="run", columns="setting", values="test_accuracy")
        accuracy.columns = accuracy.columns.map(str)
        unstable |= collapsed_seeds(accuracy, {n: failed[n] for n in names if n in failed})
    return unstable


def _claims(
    family: pd.DataFrame,
    base: pd.Series,
    by_seed: pd.DataFrame,
    done: pd.DataFrame,
    unstable: Mapping[str, Sequence[Any]],
    margin: float,
    level: float,
) -> dict[Any, dict[str, Any]]:
    """Return what the comparison of a family with its baseline shows about each of its rows."""
    baseline = base["setting"]
    rows: dict[Any, dict[str, Any]] = {}
    sound = family[[not (unstable.get(s) or unstable.get(baseline)) for s in family["setting"]]]
    for index, row in family.iterrows():
        if index not in sound.index:
            rows[index] = _unstable_claim(row, baseline, unstable)
    images = base.get("test_samples")
    grain = 0.0 if images is None or pd.isna(images) else 1 / float(images)
    for part in _parts(sound, base, by_seed):
        share = level * len(part.rows) / len(sound)
        names = list(part.rows["setting"])
        correlation = math.nan
        if part.unit == "teachers":
            taught = {name: done[done["setting"] == name] for name in names}
            estimates = claims_over_teachers(
                taught, done[done["setting"] == baseline], share, grain
            )
        else:
            accuracy = by_seed[[baseline, *names]].dropna(how="all")
            if part.fresh:
                used = [seed for row in (base, *_rows(part.rows)) for seed in _choice_seeds(row)]
                accuracy = accuracy[~accuracy.index.isin(used)]
            comparison = compare(accuracy, baseline, {}, grain, share)
            estimates, correlation = comparison.estimates, comparison.seed_correlation
        for index, row in part.rows.iterrows():
            if (estimate := estimates.get(row["setting"])) is None:
                continue
            rows[index] = _claim(row, estimate, part, len(names), margin)
            rows[index]["seed_correlation"] = correlation
    judged = [x for x in rows.values() if not math.isnan(x.get("difference_ci95", math.nan))]
    for columns in judged:
        columns["family"] = len(judged)
    return rows


def _rows(frame: pd.DataFrame) -> list[pd.Series]:
    return [row for _, row in frame.iterrows()]


def _choice_seeds(row: pd.Series) -> list[str]:
    """Return the seeds on which a row was chosen among several settings."""
    tried = row.get("settings_tried", 1)
    return str(row["choice_seeds"]).split(", ") if tried > 1 and row["choice_seeds"] else []


def _parts(family: pd.DataFrame, base: pd.Series, by_seed: pd.DataFrame) -> list[Part]:
    """Divide the rows of a family by how they can be compared.

    Rows with at least three teachers are compared over teachers. Rows that were chosen among
    several settings are compared on fresh seeds if there are enough.
    """
    kinds: dict[tuple[str, bool], list[Any]] = {}
    for index, row in family.iterrows():
        teachers = row.get("teachers")
        if teachers is not None and not pd.isna(teachers) and teachers >= MIN_SEEDS:
            kinds.setdefault(("teachers", False), []).append(index)
            continue
        used = [*_choice_seeds(row), *_choice_seeds(base)]
        shared = by_seed[[base["setting"], row["setting"]]].dropna().index
        fresh = bool(used) and sum(seed not in used for seed in shared) >= MIN_SEEDS
        kinds.setdefault(("seeds", fresh), []).append(index)
    return [Part(family.loc[rows], unit, fresh) for (unit, fresh), rows in kinds.items()]


def _unstable_claim(
    row: pd.Series, baseline: str, unstable: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    name = row["setting"]
    if seeds := unstable.get(name):
        return {"decision": "unstable", "claim": unstable_text(seeds, row["planned"])}
    many = len(unstable[baseline])
    return {"decision": "unstable", "claim": f"{baseline} is unstable ({many} seeds)"}


def unstable_text(seeds: Sequence[Any], planned: int) -> str:
    """Return how many runs diverged or collapsed, and what that says about the rate."""
    low, high = rate_interval(len(seeds), planned)
    noun = "seed" if len(seeds) == 1 else "seeds"
    return (
        f"unstable ({len(seeds)} of {planned}): {noun} {', '.join(map(str, seeds))} diverged or "
        f"collapsed, a rate of {100 * low:.0f} to {100 * high:.0f} %"
    )


def rate_interval(count: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a rate (Clopper and Pearson 1934)."""
    from scipy import stats

    interval = stats.binomtest(count, n).proportion_ci(0.95, method="exact")
    return float(interval.low), float(interval.high)


def _claim(
    row: pd.Series, estimate: Estimate, part: Part, settings: int, margin: float
) -> dict[str, Any]:
    """Return what an estimate shows about a row."""
    decision = estimate.decide(margin)
    claim = _sentence(decision, estimate, row["baseline"], part.unit, margin)
    if decision == "undecided" and not math.isnan(estimate.error):
        needed = seeds_needed(estimate, settings, margin)
        more = needed - estimate.seeds
        about = "more than" if needed >= MAX_SEEDS else "about"
        noun = part.unit if more > 1 else part.unit.removesuffix("s")
        claim += f"; {about} {more} more {noun} would decide"
    columns: dict[str, Any] = {
        "seeds": estimate.seeds,
        "difference": estimate.difference,
        "difference_ci95": estimate.half_width,
        "difference_ci90": estimate.half_width90,
        "difference_error": estimate.error,
        "difference_df": estimate.df,
        "p": estimate.p,
        "decision": decision,
        "unit": part.unit,
        "claim": claim,
    }
    return columns | {"claim": f"{claim} ({', '.join(_conditions(row, estimate, part))})"}


def _sentence(decision: str, estimate: Estimate, baseline: str, unit: str, margin: float) -> str:
    difference = estimate.difference
    points = f"{100 * abs(difference):.2f} points"
    if decision in ("better", "worse"):
        less = ""
        if abs(difference) + estimate.half_width90 < margin:
            less = f", by less than the margin of {100 * margin:g}"
        return f"{points} {decision} than {baseline}{less}"
    if decision == "equal":
        low, high = (100 * (difference + sign * estimate.half_width90) for sign in (-1, 1))
        interval = f"{low:+.2f} to {high:+.2f} with 90 % confidence"
        return f"equal to {baseline} within ± {100 * margin:g} points: {interval}"
    if decision == "undecided":
        low, high = (100 * (difference + sign * estimate.half_width) for sign in (-1, 1))
        return f"undecided: {low:+.2f} to {high:+.2f} points from {baseline}"
    if math.isnan(difference):
        return f"no {unit.removesuffix('s')} in common with {baseline}"
    side = "above" if difference > 0 else "below"
    return f"too few {unit} to tell: {points} {side} {baseline}"


def _conditions(row: pd.Series, estimate: Estimate, part: Part) -> list[str]:
    """Return what a claim holds for: seeds, teacher, images, choice and budget."""
    noun = part.unit if estimate.seeds != 1 else part.unit.removesuffix("s")
    fresh = "fresh " if part.fresh else ""
    conditions = [f"over {estimate.seeds} {fresh}{noun}"]
    if part.unit == "seeds" and isinstance(row.get("teacher"), str):
        several = row.get("teachers")
        many = "" if several is None or pd.isna(several) else f"{several:.0f} "
        conditions.append(f"with these {many}teachers" if many else "with this teacher")
    conditions.append("on these test images")
    if row.get("settings_tried", 1) > 1:
        reused = "" if part.fresh else ", chosen on the same seeds"
        conditions.append(f"best of {row['settings_tried']}{reused}")
    if row["n"] < row["planned"]:
        conditions.append(f"{row['planned'] - row['n']} of {row['planned']} runs are not done")
    if not row["shares_budget"]:
        conditions.append("with another budget")
    return conditions


def verdict(row: pd.Series, has_standard: bool = False) -> str:
    """Return the comparison of one row in words.

    Args:
        row: A row of the summary.
        has_standard: Whether `standard` was run for its student and data set.
    """
    unstable = f"; unstable ({row['unstable']} of {row['planned']})" if row["unstable"] else ""
    if row["method"] == "standard":
        return f"{'baseline' if row['chosen'] else _not_chosen(row)}{unstable}"
    if not row["baseline"] and has_standard:
        return (
            "no baseline: standard has several settings, and no validation images to choose on"
            f"{unstable}"
        )
    if not row["baseline"]:
        return f"no baseline: standard was not run for this student and data{unstable}"
    if not row["chosen"]:
        return f"{_not_chosen(row)}{unstable}"
    if not row["seeds"] and row["decision"] != "unstable":
        return f"no seed in common with {row['baseline']}"
    return str(row["claim"])


def _not_chosen(row: pd.Series) -> str:
    if isinstance(other := row.get("tied_with"), str):
        return f"not chosen: ties on validation with {other}, which was planned first"
    if pd.isna(row.get("choice_value")):
        return "not chosen: there are no validation images to choose on"
    if not row["complete"]:
        return f"not chosen: {row['n']} of {row['planned']} planned runs are done"
    return "not chosen on validation"
