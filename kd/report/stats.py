"""Compare each setting with the `standard` baseline, paired by seed."""

import math
from typing import NamedTuple

import pandas as pd

from kd.report.tables import finished_runs, half_width

LEVEL = 0.05  # significance level of the verdicts


class PairedDifference(NamedTuple):
    """A paired comparison.

    Attributes:
        pairs: Number of seeds that both sides share.
        difference: Mean of the paired differences.
        ci95: Half-width of their 95 % confidence interval.
        p: Two-sided p-value of the paired t-test.
    """

    pairs: int
    difference: float
    ci95: float
    p: float


def paired_difference(values: pd.Series, baseline: pd.Series) -> PairedDifference:
    """Compare two series indexed by seed, over the seeds they share, by the paired t-test.

    A single pair has neither an interval nor a p-value. If all differences are equal, there is no
    spread to estimate an error from: p is 1 if they are all 0, and unknown (nan) otherwise.
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
        if abs(mean) < 1e-12:
            return PairedDifference(n, mean, 0.0, 1.0)
        return PairedDifference(n, mean, math.nan, math.nan)
    ci95 = half_width(difference)
    return PairedDifference(n, mean, ci95, float(stats.ttest_1samp(difference, 0.0).pvalue))


def holm(p: pd.Series) -> pd.Series:
    """Apply Holm's correction for multiple comparisons.

    Unknown p-values stay unknown and do not count as comparisons.
    """
    from statsmodels.stats.multitest import multipletests

    known = p.dropna()
    corrected = multipletests(known, method="holm")[1] if len(known) else []
    return pd.Series(corrected, index=known.index, dtype=float).reindex(p.index)


def baselines(summary: pd.DataFrame) -> pd.Series:
    """Return the setting of the baseline of each row, or None.

    The baseline is the chosen `standard` setting of the same student and data set.
    """
    standard = summary[(summary["method"] == "standard") & summary["chosen"]]
    setting_by_context = dict(zip(standard["context"], standard["setting"], strict=True))
    settings = summary["context"].map(setting_by_context).astype(object)
    settings[summary["method"] == "standard"] = None
    return settings.where(settings.notna(), None)


def against_standard(summary: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Return `summary` with its rows compared with their baselines.

    Claims are made only about the chosen settings, so Holm's correction covers only those.

    Args:
        summary: One row per setting, as `summarise` returns it.
        runs: One row per run.

    Returns:
        A copy with the columns pairs, difference, difference_ci95, p, p_holm, shares_budget and
        verdict, and with the setting of each row's baseline.
    """
    if summary.empty:
        return summary
    summary = summary.copy()
    done = finished_runs(runs)
    accuracy = {
        name: group.set_index("seed")["test_accuracy"] for name, group in done.groupby("setting")
    }
    summary["baseline"] = baselines(summary)
    comparisons = [
        paired_difference(accuracy[row["setting"]], accuracy[row["baseline"]])
        if row["baseline"]
        else PairedDifference(0, math.nan, math.nan, math.nan)
        for _, row in summary.iterrows()
    ]
    summary["pairs"] = [comparison.pairs for comparison in comparisons]
    summary["difference"] = [comparison.difference for comparison in comparisons]
    summary["difference_ci95"] = [comparison.ci95 for comparison in comparisons]
    summary["p"] = [comparison.p for comparison in comparisons]
    summary["p_holm"] = holm(summary["p"].where(summary["chosen"]))
    budget = dict(zip(summary["setting"], summary["budget"], strict=True))
    usual_budget = {
        context: group["budget"].mode().iloc[0] for context, group in summary.groupby("context")
    }
    summary["shares_budget"] = [
        row["budget"]
        == (budget[row["baseline"]] if row["baseline"] else usual_budget[row["context"]])
        for _, row in summary.iterrows()
    ]
    with_standard = set(summary.loc[summary["method"] == "standard", "context"])
    summary["verdict"] = [
        verdict(row, row["context"] in with_standard) for _, row in summary.iterrows()
    ]
    return summary


def verdict(row: pd.Series, has_standard: bool = False) -> str:
    """Return the comparison of one row in words.

    Args:
        row: A row of the summary.
        has_standard: Whether `standard` was run for its student and data set.
    """
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
        side = "above" if row["difference"] > 0 else "below"
        return f"{points} {side} {row['baseline']} in one seed: too few to tell"
    if math.isnan(row["p_holm"]):
        signed_points = f"{100 * row['difference']:+.2f} points"
        return f"{signed_points} from {row['baseline']} in every seed: no spread to judge by"
    p_text = f"p = {row['p_holm']:.2g}" if row["p_holm"] >= 0.001 else "p < 0.001"
    if row["p_holm"] >= LEVEL:
        return f"not distinguishable from {row['baseline']} ({p_text}, {row['pairs']} seeds)"
    relation = "better than" if row["difference"] > 0 else "worse than"
    budget_note = "" if row["shares_budget"] else ", with another budget"
    return f"{points} {relation} {row['baseline']} ({p_text}, {row['pairs']} seeds{budget_note})"


def _not_chosen(row: pd.Series) -> str:
    if isinstance(other := row.get("tied_with"), str):
        return f"not chosen: ties on validation with {other}, which was planned first"
    if pd.isna(row.get("val_accuracy")):
        return "not chosen: there are no validation images to choose on"
    return "not chosen on validation"
