"""Decide what a comparison of settings with a baseline shows.

The verdict is read off the interval that is drawn, so the two cannot disagree:

better, worse   the simultaneous 95 % interval of the difference excludes 0
equal           the setting's own 90 % interval lies within the margin (two one-sided tests at
                5 %, Schuirmann 1987)
undecided       neither; `seeds_needed` says what would decide
unstable        a seed diverged or collapsed; the setting takes no part in the estimate
too few         fewer than three seeds

The model is additive: accuracy = setting + seed + error, with one error variance for all settings
(a two-way analysis of variance without interaction). The intervals of all settings against one
baseline hold together (Dunnett 1955). If the spreads of the settings differ, each is compared by
Welch's t with Holm's correction instead.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

LEVEL = 0.05  # familywise error rate of `better` and `worse`, two-sided
MARGIN = 0.005  # differences of accuracy up to this are equal in practice
MIN_SEEDS = 3
COLLAPSE = 0.02  # a seed this far below its setting's median has collapsed, if also
COLLAPSE_SPREADS = 8.0  # this many pooled standard deviations below it
MAX_SPREAD_RATIO = 3.0  # of the largest standard deviation to the median, for one error variance
SPREAD_LEVEL = 0.01  # of the Brown-Forsythe test of equal spreads
MAX_SEEDS = 100  # more than these are never asked for

Decision = Literal["better", "worse", "equal", "undecided", "unstable", "too few"]


class Estimate(NamedTuple):
    """The difference of a setting's mean accuracy from the baseline's.

    Attributes:
        difference: Mean over the common seeds, as a fraction.
        half_width: Half of the simultaneous 95 % interval.
        half_width90: Half of the setting's own 90 % interval, for two one-sided tests at 5 %.
        p: The p-value, corrected for all settings that are compared.
        seeds: Number of common seeds.
    """

    difference: float
    half_width: float
    half_width90: float
    p: float
    seeds: int

    def decide(self, margin: float = MARGIN) -> Decision:
        """Return what the interval shows; `margin` is the largest difference that is none."""
        if self.seeds < MIN_SEEDS:
            return "too few"
        if abs(self.difference) > self.half_width:
            return "better" if self.difference > 0 else "worse"
        if abs(self.difference) + self.half_width90 < margin:
            return "equal"
        return "undecided"


class Comparison(NamedTuple):
    """The comparison of several settings with one baseline.

    Attributes:
        estimates: By setting; unstable settings have none.
        method: How the intervals were made.
        sd: The standard deviation of the error, as a fraction; nan if spreads differ.
        unstable: By setting, the seeds that diverged or collapsed.
    """

    estimates: dict[str, Estimate]
    method: Literal["dunnett", "welch"]
    sd: float
    unstable: dict[str, list[int]]


def compare(
    accuracy: pd.DataFrame,
    baseline: str,
    failed: Mapping[str, Sequence[int]] | None = None,
    grain: float = 0.0,
) -> Comparison:
    """Compare settings with a baseline.

    Args:
        accuracy: Test accuracies as fractions, one row per seed, one column per setting; nan where
            a seed was not run.
        baseline: The column to compare with.
        failed: By setting, the seeds whose training diverged.
        grain: The smallest difference of an accuracy, 1 / number of test images. No spread is
            taken to be smaller.
    """
    unstable = collapsed_seeds(accuracy, failed or {})
    stable = accuracy.drop(columns=[name for name in unstable if name in accuracy])
    others = [str(name) for name in stable if name != baseline]
    if baseline not in stable or not others:
        return Comparison({}, "dunnett", math.nan, unstable)
    complete = stable.dropna()
    n = len(complete)
    if n < 2:
        alone = {name: _without_interval(stable, name, baseline, n) for name in others}
        return Comparison(alone, "dunnett", math.nan, unstable)
    if spreads_differ(complete, grain):
        return Comparison(_welch(complete, baseline), "welch", math.nan, unstable)
    values = complete.to_numpy()
    residuals = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    df = (n - 1) * (values.shape[1] - 1)
    sd = max(math.sqrt((residuals**2).sum() / df), grain / math.sqrt(12))
    error = sd * math.sqrt(2 / n)
    k = len(others)
    estimates: dict[str, Estimate] = {}
    for name in others:
        difference = float((complete[name] - complete[baseline]).mean())
        estimates[name] = Estimate(
            difference,
            error * critical_value(k, df, 1 - LEVEL),
            error * critical_value(1, df, 1 - 2 * LEVEL),
            1 - joint_probability(abs(difference) / error, k, df),
            n,
        )
    return Comparison(estimates, "dunnett", sd, unstable)


def _without_interval(accuracy: pd.DataFrame, name: str, baseline: str, seeds: int) -> Estimate:
    difference = float((accuracy[name] - accuracy[baseline]).mean())
    return Estimate(difference, math.nan, math.nan, math.nan, seeds)


def collapsed_seeds(
    accuracy: pd.DataFrame, failed: Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    """Return the seeds of each setting that diverged, or fell far below the setting's median.

    "Far" is 2 points and 8 times the pooled standard deviation of the seeds that did not.
    """
    below = accuracy.median() - accuracy
    sound = accuracy.where(~(below > COLLAPSE))
    counts = sound.count()
    df = float((counts - 1).clip(lower=0).sum())
    squares = float(((sound - sound.mean()) ** 2).sum().sum())
    sd = math.sqrt(squares / df) if df > 0 else 0.0
    limit = max(COLLAPSE, COLLAPSE_SPREADS * sd)
    seeds: dict[str, list[int]] = {}
    for name in dict.fromkeys([*accuracy, *failed]):
        bad = set(failed.get(name, ()))
        if name in accuracy:
            bad |= set(accuracy.index[below[name] > limit])
        if bad:
            seeds[str(name)] = sorted(int(seed) for seed in bad)
    return seeds


def spreads_differ(accuracy: pd.DataFrame, grain: float = 0.0) -> bool:
    """Return whether the settings' spreads are too different for one error variance."""
    from scipy import stats

    if len(accuracy) < MIN_SEEDS:
        return False
    spreads = accuracy.std()
    least = max(grain / math.sqrt(12), 1e-12)
    floored = spreads.clip(lower=least)
    if float(floored.max() / floored.median()) > MAX_SPREAD_RATIO:
        return True
    if (spreads < least).any():  # the test needs a spread in every setting
        return False
    columns = [accuracy[name].to_numpy() for name in accuracy]
    return bool(stats.levene(*columns, center="median").pvalue < SPREAD_LEVEL)


def _welch(accuracy: pd.DataFrame, baseline: str) -> dict[str, Estimate]:
    """Compare each setting by Welch's t with Holm's correction.

    Each interval has the level at which Holm's procedure tests its setting, or, after the first
    setting that is not rejected, the level of that one. So an interval excludes 0 if and only if
    its setting is rejected.
    """
    from scipy import stats

    n = len(accuracy)
    control = accuracy[baseline]
    rows = []
    for name in accuracy:
        if name == baseline:
            continue
        test = stats.ttest_ind(accuracy[name], control, equal_var=False)
        variances = accuracy[name].var() / n + control.var() / n
        difference = float(accuracy[name].mean() - control.mean())
        rows.append((str(name), difference, float(variances) ** 0.5, float(test.df), test.pvalue))
    rows.sort(key=lambda row: row[4])
    estimates: dict[str, Estimate] = {}
    parts = len(rows)  # the level of each test is LEVEL / parts
    corrected = 0.0
    for rank, (name, difference, error, df, p) in enumerate(rows):
        if parts == len(rows) - rank + 1 and rows[rank - 1][4] < LEVEL / parts:
            parts -= 1  # the setting before was rejected
        corrected = max(corrected, min(1.0, p * (len(rows) - rank)))
        estimates[name] = Estimate(
            difference,
            error * float(stats.t.ppf(1 - LEVEL / parts / 2, df)),
            error * float(stats.t.ppf(1 - LEVEL, df)),
            corrected,
            n,
        )
    return estimates


def seeds_needed(estimate: Estimate, sd: float, settings: int, margin: float = MARGIN) -> int:
    """Return how many seeds would decide, if difference and spread stay what they are.

    Args:
        estimate: The present estimate.
        sd: The standard deviation of the error.
        settings: Number of settings that are compared with the baseline.
        margin: The largest difference that is none.

    Returns:
        The number of seeds in all, at most `MAX_SEEDS`.
    """
    for n in range(max(MIN_SEEDS, estimate.seeds + 1), MAX_SEEDS):
        df = (n - 1) * settings
        error = sd * math.sqrt(2 / n)
        wide = error * critical_value(settings, df, 1 - LEVEL)
        narrow = error * critical_value(1, df, 1 - 2 * LEVEL)
        if abs(estimate.difference) > wide or abs(estimate.difference) + narrow < margin:
            return n
    return MAX_SEEDS


@functools.cache
def _nodes() -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights for expectations over a standard normal variable."""
    x, w = np.polynomial.hermite_e.hermegauss(60)
    return x, w / w.sum()


@functools.lru_cache(maxsize=4096)
def joint_probability(t: float, k: int, df: int) -> float:
    """Return the probability that k differences from one baseline are all within t of 0.

    The differences are Student t with `df` degrees of freedom and a common error; any two have the
    correlation 1/2, since they share the baseline (Dunnett 1955).
    """
    from scipy import special, stats

    z, weights = _nodes()
    if k == 1:
        return float(1 - 2 * stats.t.sf(t, df))
    # quantiles of the scale s = sqrt(chi2 / df), at the midpoints of 1000 equal probabilities
    quantiles = (np.arange(1000) + 0.5) / 1000
    scale = np.sqrt(stats.chi2.ppf(quantiles, df) / df)
    reach = math.sqrt(2) * t * scale[:, None]
    inside = special.ndtr(reach + z) - special.ndtr(-reach + z)
    return float((inside**k @ weights).mean())


@functools.lru_cache(maxsize=4096)
def critical_value(k: int, df: int, probability: float) -> float:
    """Return the t within which k differences from one baseline lie with this probability."""
    from scipy import optimize

    return float(
        optimize.brentq(lambda t: joint_probability(t, k, df) - probability, 0.0, 1e3, xtol=1e-6)
    )
