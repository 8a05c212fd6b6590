"""Statistics that a reviewer would accept: each setting against the `standard` baseline, paired by seed."""

import math
from typing import NamedTuple

import pandas as pd

from kd.report.tables import finished_runs, half_width

LEVEL = 0.05


class PairedDifference(NamedTuple):
    """A paired comparison: number of pairs, mean difference, half its 95 % interval, two-sided p."""

    pairs: int
    difference: float
    ci95: float
    p: float


def paired_difference(values: pd.Series, baseline: pd.Series) -> PairedDifference:
    """Compare two series indexed by seed, over the seeds they share, by the paired t-test.

    One pair has no interval and no p. Where all differences are equal there is no spread to judge by: p is 1 when
    they are 0, and unknown otherwise.
    """
    from scipy import stats

    difference = (values - baseline).dropna()
    n = len(difference)
    if n == 0:
        return PairedDifference(0, math.nan, math.nan, math.nan)
    mean = float(difference.mean())
    if n == 1:
        return PairedDifference(1, mean, math.nan, math.nan)
    if float(difference.max() - difference.min()) < 1e-12:
        same = abs(mean) < 1e-12
        return PairedDifference(n, mean, 0.0 if same else math.nan, 1.0 if same else math.nan)
    return PairedDifference(
        n, mean, half_width(difference), float(stats.ttest_1samp(difference, 0.0).pvalue)
    )


def holm(p: pd.Series) -> pd.Series:
    """Holm's correction for as many comparisons as there are p values; an unknown p stays unknown and counts not."""
    from statsmodels.stats.multitest import multipletests

    known = p.dropna()
    corrected = multipletests(known, method="holm")[1] if len(known) else []
    return pd.Series(corrected, index=known.index, dtype=float).reindex(p.index)


def baselines(summary: pd.DataFrame) -> pd.Series:
    """For each row the setting of its baseline: the chosen `standard` of the same student and data, or None."""
    plain = summary[(summary["method"] == "standard") & summary["chosen"]]
    of = dict(zip(plain["context"], plain["setting"], strict=True))
    found = summary["context"].map(of).astype(object)
    found[summary["method"] == "standard"] = None
    return found.where(found.notna(), None)


def against_standard(summary: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """`summary` with pairs, difference, difference_ci95, p, p_holm, shares_budget and verdict.

    Only chosen settings are claimed to be anything, so Holm's correction is over those.
    """
    if summary.empty:
        return summary
    summary = summary.copy()
    done = finished_runs(runs)
    accuracy = {
        name: group.set_index("seed")["test_accuracy"] for name, group in done.groupby("setting")
    }
    summary["baseline"] = baselines(summary)
    found = [
        paired_difference(accuracy[row["setting"]], accuracy[row["baseline"]])
        if row["baseline"]
        else PairedDifference(0, *[math.nan] * 3)
        for _, row in summary.iterrows()
    ]
    for name, column in zip(
        ("pairs", "difference", "difference_ci95", "p"), zip(*found, strict=True), strict=True
    ):
        summary[name] = list(column)
    summary["p_holm"] = holm(summary["p"].where(summary["chosen"]))
    budget = dict(zip(summary["setting"], summary["budget"], strict=True))
    common = {
        context: group["budget"].mode().iloc[0] for context, group in summary.groupby("context")
    }
    summary["shares_budget"] = [
        row["budget"] == (budget[row["baseline"]] if row["baseline"] else common[row["context"]])
        for _, row in summary.iterrows()
    ]
    plain = set(summary.loc[summary["method"] == "standard", "context"])
    summary["verdict"] = [verdict(row, row["context"] in plain) for _, row in summary.iterrows()]
    return summary


def verdict(row: pd.Series, has_standard: bool = False) -> str:
    """One row's comparison in words. `has_standard`: `standard` was run for its student and data."""
    if row["method"] == "standard":
        return "baseline" if row["chosen"] else _not_chosen(row)
    if not row["baseline"] and has_standard:
        return "no baseline: standard has several settings, and no validation images to choose on"
    if not row["baseline"]:
        return "no baseline: standard was not run for this student and data"
    if not row["pairs"]:
        return f"no seed in common with {row['baseline']}"
    if not row["chosen"]:
        return _not_chosen(row)
    points = f"{100 * abs(row['difference']):.2f} points"
    if row["pairs"] == 1:
        way = "above" if row["difference"] > 0 else "below"
        return f"{points} {way} {row['baseline']} in one seed: too few to tell"
    if math.isnan(row["p_holm"]):
        by = f"{100 * row['difference']:+.2f} points"
        return f"{by} from {row['baseline']} in every seed: no spread to judge by"
    said = f"p = {row['p_holm']:.2g}" if row["p_holm"] >= 0.001 else "p < 0.001"
    if row["p_holm"] >= LEVEL:
        return f"not distinguishable from {row['baseline']} ({said}, {row['pairs']} seeds)"
    way = "better than" if row["difference"] > 0 else "worse than"
    unequal = "" if row["shares_budget"] else ", with another budget"
    return f"{points} {way} {row['baseline']} ({said}, {row['pairs']} seeds{unequal})"


def _not_chosen(row: pd.Series) -> str:
    if isinstance(other := row.get("tied_with"), str):
        return f"not chosen: ties on validation with {other}, which was planned first"
    if pd.isna(row.get("val_accuracy")):
        return "not chosen: there are no validation images to choose on"
    return "not chosen on validation"
