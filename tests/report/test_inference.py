"""The verdict procedure against closed forms, scipy, and its error rates in simulation."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks.verdicts import accuracies, simulate
from kd.report.inference import (
    LEVEL,
    MARGIN,
    Estimate,
    collapsed_seeds,
    compare,
    critical_value,
    joint_probability,
    seeds_needed,
    spreads_differ,
)


@pytest.mark.parametrize("df", [2, 4, 12, 60])
def test_one_difference_is_students_t(df: int) -> None:
    assert critical_value(1, df, 0.95) == pytest.approx(stats.t.ppf(0.975, df), abs=1e-4)


@pytest.mark.parametrize(
    # Dunnett's two-sided 5 % points, as tabulated since 1964
    ("k", "df", "value"), [(2, 10, 2.57), (3, 20, 2.54), (5, 30, 2.66), (9, 60, 2.77)],
)  # fmt: skip
def test_critical_values_are_dunnetts(k: int, df: int, value: float) -> None:
    assert critical_value(k, df, 0.95) == pytest.approx(value, abs=0.006)


@pytest.mark.parametrize("seed", range(5))
def test_p_values_are_scipys(seed: int) -> None:
    rng = np.random.default_rng(seed)
    *groups, control = rng.normal(size=(4, 5))
    expected = stats.dunnett(*groups, control=control, rng=np.random.default_rng(0)).pvalue
    df = 16
    squares = sum(((x - x.mean()) ** 2).sum() for x in (*groups, control))
    error = math.sqrt(squares / df * 2 / 5)
    found = [1 - joint_probability(abs(x.mean() - control.mean()) / error, 3, df) for x in groups]
    assert found == pytest.approx(expected, abs=2e-3)


def test_one_setting_is_the_paired_t() -> None:
    table = accuracies(np.random.default_rng(0), 1, 5, 0.004)
    difference = table["m0"] - table["standard"]
    found = compare(table, "standard").estimates["m0"]
    assert found.p == pytest.approx(stats.ttest_1samp(difference, 0).pvalue)
    half = stats.t.ppf(0.975, 4) * difference.std() / math.sqrt(5)
    assert (found.difference, found.half_width) == pytest.approx((difference.mean(), half))


def test_the_error_is_that_of_the_additive_model() -> None:
    table = accuracies(np.random.default_rng(1), 3, 4)
    shifted = table.add(pd.Series([0.0, 0.01, -0.02, 0.03]), axis=0)  # good and bad seeds
    ours, theirs = compare(table, "standard"), compare(shifted, "standard")
    assert ours.sd == pytest.approx(theirs.sd)
    assert ours.estimates["m1"].half_width == pytest.approx(theirs.estimates["m1"].half_width)


def test_the_decision_is_read_off_the_interval() -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        for estimate in compare(accuracies(rng, 3, 4, 0.004), "standard").estimates.values():
            excludes = abs(estimate.difference) > estimate.half_width
            assert (estimate.decide() in ("better", "worse")) == excludes
            assert excludes == (estimate.p < LEVEL) or abs(estimate.p - LEVEL) < 1e-3


@pytest.mark.parametrize(
    ("difference", "half", "half90", "expected"),
    [
        (0.002, 0.004, 0.0025, "equal"),  # the 95 % interval leaves the margin, the 90 % does not
        (-0.002, 0.004, 0.0025, "equal"),
        (0.002, 0.004, 0.0035, "undecided"),
        (0.003, 0.002, 0.001, "better"),  # though it is smaller than the margin
        (-0.03, 0.02, 0.01, "worse"),
        (0.03, math.nan, math.nan, "too few"),
    ],
)
def test_what_each_interval_decides(
    difference: float, half: float, half90: float, expected: str
) -> None:
    assert Estimate(difference, half, half90, 0.5, 5).decide(0.005) == expected
    assert Estimate(difference, half, half90, 0.5, 2).decide(0.005) == "too few"


def test_equal_spread_by_chance_is_not_a_spread_of_zero() -> None:
    table = pd.DataFrame({"standard": [0.8, 0.8, 0.8], "m0": [0.8001, 0.8001, 0.8001]})
    found = compare(table, "standard", grain=1e-4).estimates["m0"]
    assert found.half_width > 0
    assert found.decide() != "better"


def test_two_seeds_are_too_few() -> None:
    found = compare(accuracies(np.random.default_rng(3), 2, 2, 0.05), "standard")
    assert {estimate.decide() for estimate in found.estimates.values()} == {"too few"}
    one = compare(accuracies(np.random.default_rng(3), 1, 1), "standard").estimates["m0"]
    assert one.decide() == "too few"
    assert math.isnan(one.half_width)


def test_a_collapsed_or_diverged_seed_makes_its_setting_unstable_alone() -> None:
    table = accuracies(np.random.default_rng(4), 3, 5)
    clean = compare(table.drop(columns="m1"), "standard")
    table.loc[3, "m1"] -= 0.065
    assert collapsed_seeds(table, {}) == {"m1": [3]}
    found = compare(table, "standard", unstable=collapsed_seeds(table, {"m2": [1]}))
    assert found.unstable == {"m1": [3], "m2": [1]}
    assert set(found.estimates) == {"m0"}
    assert compare(table, "standard").estimates["m0"] == clean.estimates["m0"]


def test_welch_where_spreads_differ() -> None:
    rng = np.random.default_rng(5)
    table = accuracies(rng, 3, 8, 0.01)
    table["m1"] = 0.8 + 10 * (table["m1"] - 0.8) / 2
    assert spreads_differ(table)
    found = compare(table, "standard")
    assert found.method == "welch"
    p = {
        name: stats.ttest_ind(table[name], table["standard"], equal_var=False).pvalue
        for name in ("m0", "m1", "m2")
    }
    ordered = sorted(p.values())
    for name, estimate in found.estimates.items():
        rank = ordered.index(p[name])
        holm = max(min(1.0, q * (3 - i)) for i, q in enumerate(ordered[: rank + 1]))
        assert estimate.p == pytest.approx(holm)
        assert (estimate.p < LEVEL) == (abs(estimate.difference) > estimate.half_width)


def test_seeds_needed() -> None:
    """The audit's table: SD of a difference 0.25 points, 0.5 points, one comparison: about 4."""
    estimate = Estimate(0.004, 0.005, 0.004, 0.1, 3, 0.0025 / math.sqrt(3), 2)
    assert 4 <= seeds_needed(estimate, 1) <= 6
    assert seeds_needed(estimate._replace(difference=0.003), 1) > seeds_needed(estimate, 1)
    assert seeds_needed(estimate._replace(difference=MARGIN, error=0.05), 3) == 100


CASES = [(k, n, collapses) for k in (3, 9) for n in (3, 5) for collapses in (0.0, 0.05)]


REPEATS = 500


def limit(rate: float) -> float:
    """Return what a simulated rate stays below if the true one is at most `rate`."""
    return rate + 2.6 * math.sqrt(rate * (1 - rate) / REPEATS)


@pytest.mark.slow
@pytest.mark.parametrize(("k", "n", "collapses"), CASES)
def test_false_claims_are_rare(k: int, n: int, collapses: float) -> None:
    """At most 5 % of families have a false claim, if nothing differs and if one setting does."""
    assert simulate(k, n, 0.0, collapses, REPEATS)["false"] <= limit(LEVEL)
    at_margin = simulate(k, n, MARGIN, collapses, REPEATS)
    assert at_margin["false"] <= limit(LEVEL)
    assert at_margin["equal"] <= limit(LEVEL), "a gain of the margin is not called equal"


@pytest.mark.slow
@pytest.mark.parametrize(
    # true gain in points, seeds: better, equal, undecided, by the audit's simulation
    ("gain", "n", "expected"),
    [
        (0.0, 3, (0.01, 0.70, 0.28)),
        (0.0, 5, (0.01, 0.95, 0.03)),
        (0.25, 5, (0.28, 0.52, 0.19)),
        (0.5, 3, (0.53, 0.04, 0.43)),
        (0.5, 5, (0.88, 0.03, 0.09)),
        (0.75, 5, (1.00, 0.00, 0.00)),
    ],
)
def test_operating_characteristics(gain: float, n: int, expected: tuple[float, ...]) -> None:
    shares = simulate(3, n, gain / 100, 0.0, REPEATS)
    for name, share in zip(("better", "equal", "undecided"), expected, strict=True):
        error = math.sqrt(max(share * (1 - share), 0.01) * 2 / REPEATS)  # both are simulated
        assert shares[name] == pytest.approx(share, abs=2.6 * error + 0.01), name


def test_spreads_are_compared_as_scipy_does() -> None:
    rng = np.random.default_rng(6)
    differ = 0
    for _ in range(60):
        table = pd.DataFrame(rng.normal(0.8, [0.002, 0.003, 0.005], (12, 3)))
        p = stats.levene(*table.to_numpy().T, center="median").pvalue
        ratio = table.std().max() / table.std().median()
        assert spreads_differ(table) == (p < 0.01 or ratio > 3)
        differ += p < 0.01
    assert 5 < differ < 55
