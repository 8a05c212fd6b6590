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
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

LEVEL = 0.05  # familywise error rate of `better` and `worse`, two-sided
MARGIN = 0.005  # differences of accuracy up to this are equal in practice
MIN_SEEDS = 3
COLLAPSE = 0.02  # a seed this far below its setting's median has collapsed, if also
COLLAPSE_SPREADS = 8.0  # this many pooled standard deviations below it
COLLAPSE_UNKNOWN = 0.1  # the same where no standard deviation is known, as with two seeds
MAX_SPREAD_RATIO = 3.0  # of the largest standard deviation to the median, for one error variance
SPREAD_LEVEL = 0.01  # of the Brown-Forsythe test of equal spreads
SMALLEST = 1e-6  # of a standard deviation, where the number of test images is unknown
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
        error: The standard error of the difference.
        df: The degrees of freedom of the error.
    """

    difference: float
    half_width: float
    half_width90: float
    p: float
    seeds: int
    error: float = math.nan
    df: float = math.nan

    def decide(self, margin: float = MARGIN) -> Decision:
        """Return what the interval shows; `margin` is the largest difference that is none."""
        if self.seeds < MIN_SEEDS or math.isnan(self.half_width):
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
        seed_correlation: The mean correlation of two settings over the seeds; nan if unknown.
    """

    estimates: dict[str, Estimate]
    method: Literal["dunnett", "welch"]
    sd: float
    unstable: dict[str, list[Any]]
    seed_correlation: float = math.nan


def compare(
    accuracy: pd.DataFrame,
    baseline: str,
    unstable: Mapping[str, Sequence[Any]] | None = None,
    grain: float = 0.0,
    level: float = LEVEL,
) -> Comparison:
    """Compare settings with a baseline.

    A setting that has fewer than three seeds in common with the baseline is too few to tell, and
    does not take part in the estimate of the others.

    Args:
        accuracy: Test accuracies as fractions, one row per seed, one column per setting; nan where
            a seed was not run.
        baseline: The column to compare with.
        unstable: By setting, the seeds that diverged or collapsed; None looks for collapsed ones.
        grain: The smallest difference of an accuracy, 1 / number of test images. No spread is
            taken to be smaller.
        level: The familywise error rate of `better` and `worse`.
    """
    if unstable is None:
        unstable = collapsed_seeds(accuracy, {})
    bad = {name: list(seeds) for name, seeds in unstable.items()}
    stable = accuracy.drop(columns=[name for name in bad if name in accuracy])
    if baseline not in stable or stable.shape[1] < 2:
        return Comparison({}, "dunnett", math.nan, bad)
    joint = _with_common_seeds(stable, baseline)
    apart = [str(name) for name in stable if name not in joint]
    estimates = {name: _without_interval(stable, name, baseline) for name in apart}
    complete = stable[joint].dropna()
    if len(joint) < 2:
        return Comparison(estimates, "dunnett", math.nan, bad)
    correlation = _seed_correlation(complete)
    if spreads_differ(complete, grain):
        estimates |= _welch(complete, baseline, level, grain)
        return Comparison(estimates, "welch", math.nan, bad, correlation)
    n = len(complete)
    values = complete.to_numpy()
    residuals = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    df = (n - 1) * (values.shape[1] - 1)
    sd = max(math.sqrt((residuals**2).sum() / df), grain, SMALLEST)
    differences = {
        name: float((complete[name] - complete[baseline]).mean())
        for name in joint
        if name != baseline
    }
    estimates |= dunnett(differences, sd * math.sqrt(2 / n), df, n, level)
    return Comparison(estimates, "dunnett", sd, bad, correlation)


def dunnett(
    differences: Mapping[str, float],
    error: float,
    df: int,
    seeds: int,
    level: float = LEVEL,
    correlation: float = 0.5,
) -> dict[str, Estimate]:
    """Return simultaneous intervals of differences that have one standard error.

    Args:
        differences: The differences, as fractions.
        error: Their standard error.
        df: Its degrees of freedom.
        seeds: Number of seeds behind each difference.
        level: The familywise error rate.
        correlation: Of any two differences: 1/2 if they share a baseline, 0 if each has its own.
    """
    k = len(differences)
    return {
        name: Estimate(
            difference,
            error * critical_value(k, df, 1 - level, correlation),
            error * critical_value(1, df, 1 - 2 * LEVEL),
            1 - joint_probability(abs(difference) / error, k, df, correlation),
            seeds,
            error,
            df,
        )
        for name, difference in differences.items()
    }


def _with_common_seeds(accuracy: pd.DataFrame, baseline: str) -> list[str]:
    """Return the settings that are compared together, the baseline first.

    Settings with the fewest seeds are left out until the others have enough in common.
    """
    run = {str(name): accuracy[str(name)].notna().to_numpy() for name in accuracy}
    shared = {name: int((run[baseline] & run[name]).sum()) for name in run if name != baseline}
    others = [name for name, n in shared.items() if n >= MIN_SEEDS]
    while others and sum(np.all([run[name] for name in (baseline, *others)], axis=0)) < MIN_SEEDS:
        others.remove(min(reversed(others), key=shared.__getitem__))
    return [baseline, *others]


def _without_interval(accuracy: pd.DataFrame, name: str, baseline: str) -> Estimate:
    differences = (accuracy[name] - accuracy[baseline]).dropna()
    mean = float(differences.mean()) if len(differences) else math.nan
    return Estimate(mean, math.nan, math.nan, math.nan, len(differences))


def _seed_correlation(accuracy: pd.DataFrame) -> float:
    """Return the mean correlation of two settings over the seeds."""
    varying = accuracy.loc[:, accuracy.std() > 0]
    k = varying.shape[1]
    if k < 2 or len(varying) < MIN_SEEDS:
        return math.nan
    matrix = np.corrcoef(varying.to_numpy().T)
    return float((matrix.sum() - k) / (k * (k - 1)))


def collapsed_seeds(
    accuracy: pd.DataFrame, failed: Mapping[str, Sequence[Any]]
) -> dict[str, list[Any]]:
    """Return the seeds of each setting that diverged, or fell far below the setting's median.

    "Far" is 2 points and 8 times the pooled standard deviation of the seeds that did not; 10 points
    where there is none.
    """
    values = accuracy.to_numpy(float)
    below = np.full_like(values, np.nan)
    squares, df = 0.0, 0
    for column, present in enumerate((~np.isnan(values)).T):
        if present.any():
            below[:, column] = np.median(values[present, column]) - values[:, column]
            sound = values[present & ~(below[:, column] > COLLAPSE), column]
            squares += float(((sound - sound.mean()) ** 2).sum()) if len(sound) else 0.0
            df += max(0, len(sound) - 1)
    limit = COLLAPSE_UNKNOWN
    if df > 0:
        limit = max(COLLAPSE, COLLAPSE_SPREADS * math.sqrt(squares / df))
    columns = {str(name): column for column, name in enumerate(accuracy)}
    seeds: dict[str, list[Any]] = {}
    for name in dict.fromkeys([*columns, *failed]):
        bad = set(failed.get(name, ()))
        if name in columns:
            bad |= set(accuracy.index[below[:, columns[name]] > limit])
        if bad:
            seeds[name] = sorted(bad)
    return seeds


def spreads_differ(accuracy: pd.DataFrame, grain: float = 0.0) -> bool:
    """Return whether the settings' spreads are too different for one error variance."""
    from scipy import stats

    if len(accuracy) < MIN_SEEDS:
        return False
    values = accuracy.to_numpy(float)
    spreads = values.std(axis=0, ddof=1)
    least = max(grain, SMALLEST)
    floored = spreads.clip(min=least)
    if float(floored.max() / np.median(floored)) > MAX_SPREAD_RATIO:
        return True
    if (spreads < least).any():  # the test needs a spread in every setting
        return False
    # Brown and Forsythe: one-way analysis of variance of the distances from the medians
    distances = abs(values - np.median(values, axis=0))
    return bool(stats.f_oneway(*distances.T).pvalue < SPREAD_LEVEL)


def _welch(
    accuracy: pd.DataFrame, baseline: str, level: float, grain: float
) -> dict[str, Estimate]:
    """Compare each setting by Welch's t, with Holm's correction."""
    n = len(accuracy)
    squares = accuracy.var().clip(lower=max(grain, SMALLEST) ** 2) / n
    rows = []
    for name in accuracy:
        if name == baseline:
            continue
        a, b = float(squares[str(name)]), float(squares[baseline])
        df = (a + b) ** 2 * (n - 1) / (a**2 + b**2)
        difference = float(accuracy[name].mean() - accuracy[baseline].mean())
        rows.append(Difference(str(name), difference, math.sqrt(a + b), df, n))
    return holm_intervals(rows, level)


class Difference(NamedTuple):
    """A difference from a baseline, with its standard error and the degrees of freedom of it."""

    name: str
    difference: float
    error: float
    df: float
    seeds: int


def t_interval(
    difference: float, error: float, df: float, level: float
) -> tuple[float, float, float]:
    """Return half of the interval at a level, half of the 90 % interval, and the p-value."""
    from scipy import special

    half_width = -error * float(special.stdtrit(df, level / 2))
    half_width90 = -error * float(special.stdtrit(df, LEVEL))
    p = 2 * float(special.stdtr(df, -abs(difference) / error))
    return half_width, half_width90, p


def holm_intervals(rows: Sequence[Difference], level: float = LEVEL) -> dict[str, Estimate]:
    """Test differences from a baseline with Holm's correction, and give them intervals that agree.

    Each interval has the level at which Holm's procedure tests its setting, or, after the first
    setting that is not rejected, the level of that one. So an interval excludes 0 if and only if
    its setting is rejected.

    Args:
        rows: The differences. One whose error is nan or 0 is not tested and gets no interval.
        level: The familywise error rate.

    Returns:
        The estimates by setting, in the order of `rows`.
    """
    estimates = {
        row.name: Estimate(row.difference, math.nan, math.nan, math.nan, row.seeds) for row in rows
    }
    tests = [
        (row, t_interval(row.difference, row.error, row.df, level)[-1])
        for row in rows
        if row.error > 0
    ]
    tests.sort(key=lambda test: test[1])
    parts = len(tests)  # the level of each test is level / parts
    corrected = 0.0
    for rank, (row, p) in enumerate(tests):
        corrected = max(corrected, min(1.0, p * (len(tests) - rank)))
        wide, narrow, _ = t_interval(row.difference, row.error, row.df, level / parts)
        estimates[row.name] = Estimate(
            row.difference, wide, narrow, corrected, row.seeds, row.error, row.df
        )
        if p < level / parts and parts == len(tests) - rank and parts > 1:
            parts -= 1  # rejected, so the next is one of fewer
    return estimates


def seeds_needed(estimate: Estimate, settings: int, margin: float = MARGIN) -> int:
    """Return how many seeds would decide, if difference and spread stay what they are.

    Args:
        estimate: The present estimate.
        settings: Number of settings that are compared with the baseline.
        margin: The largest difference that is none.

    Returns:
        The number of seeds in all, at most `MAX_SEEDS`.
    """
    sd = estimate.error * math.sqrt(estimate.seeds)  # of one seed's difference
    df_per_seed = estimate.df / (estimate.seeds - 1)
    for n in range(max(MIN_SEEDS, estimate.seeds + 1), MAX_SEEDS):
        df = max(1, round((n - 1) * df_per_seed))
        error = sd / math.sqrt(n)
        wide = error * critical_value(settings, df, 1 - LEVEL)
        narrow = error * critical_value(1, df, 1 - 2 * LEVEL)
        if abs(estimate.difference) > wide or abs(estimate.difference) + narrow < margin:
            return n
    return MAX_SEEDS


@functools.cache
def _nodes() -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights for expectations over a standard normal variable."""
    x, w = np.polynomial.hermite_e.hermegauss(40)
    return x, w / w.sum()


@functools.lru_cache(maxsize=1024)
def _scales(df: int) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights for expectations over sqrt(chi2 / df), to about 1e-5."""
    from scipy import stats

    x, w = np.polynomial.legendre.leggauss(64)
    return np.sqrt(stats.chi2.ppf((x + 1) / 2, df) / df), w / 2


@functools.lru_cache(maxsize=4096)
def joint_probability(t: float, k: int, df: int, correlation: float = 0.5) -> float:
    """Return the probability that k differences are all within t standard errors of 0.

    The differences are Student t with `df` degrees of freedom and a common error. Any two have the
    same correlation: 1/2 if they share a baseline (Dunnett 1955), 0 if each has its own
    (the studentized maximum modulus).
    """
    from scipy import special, stats

    if k == 1:
        return float(1 - 2 * stats.t.sf(t, df))
    z, weights = _nodes()
    scale, scale_weights = _scales(df)
    shift = math.sqrt(correlation / (1 - correlation)) * z
    reach = t * scale[:, None] / math.sqrt(1 - correlation)
    inside = special.ndtr(reach + shift) - special.ndtr(-reach + shift)
    return float(scale_weights @ (inside**k @ weights))


@functools.lru_cache(maxsize=4096)
def critical_value(k: int, df: int, probability: float, correlation: float = 0.5) -> float:
    """Return the t within which k differences lie with this probability; see above."""
    from scipy import optimize

    return float(
        optimize.brentq(
            lambda t: joint_probability(t, k, df, correlation) - probability, 0.0, 1e3, xtol=1e-6
        )
    )
