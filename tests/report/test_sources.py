"""Variance components and claims over teachers, by hand, by statsmodels and in simulation."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests

from kd.report.inference import LEVEL, Difference, holm_intervals
from kd.report.sources import (
    claim_from_arrays,
    claim_over_teachers,
    claims_over_teachers,
    variance_by_source,
    variance_components,
)

SD = 0.002  # of an accuracy over student seeds, as in the study


def runs_of(values: np.ndarray, *sources: str) -> pd.DataFrame:
    """Turn accuracies by levels of the sources into rows."""
    codes = np.indices(values.shape).reshape(values.ndim, -1)
    return pd.DataFrame({**dict(zip(sources, codes, strict=True)), "test_accuracy": values.ravel()})


def baseline_of(*accuracies: float) -> pd.DataFrame:
    return pd.DataFrame({"seed": range(len(accuracies)), "test_accuracy": accuracies})


def taught_runs(rng: np.random.Generator, teachers: int = 5, seeds: int = 5) -> pd.DataFrame:
    values = rng.normal(0.8, SD, (teachers, seeds)) + rng.normal(0, SD, (teachers, 1))
    return runs_of(values, "teacher_seed", "seed")


def test_one_source_is_the_sample_with_the_chi_square_interval() -> None:
    runs = pd.DataFrame({"seed": [0, 1, 2], "teacher_seed": 7, "test_accuracy": [0.80, 0.82, 0.84]})
    table, reason = variance_by_source(runs)
    assert reason == ""
    assert table["source"].tolist() == ["seed"]
    (row,) = table.to_dict("records")
    assert (row["levels"], row["sd"], row["share"]) == (3, pytest.approx(0.02), 1)
    low, high = (math.sqrt(2 * 0.02**2 / stats.chi2.ppf(q, 2)) for q in (0.975, 0.025))
    assert (row["low"], row["high"]) == pytest.approx((low, high))


def test_two_crossed_sources_by_hand() -> None:
    values = np.array([[1.0, 2.0, 6.0], [5.0, 8.0, 8.0]])
    # means of teachers 3, 7 and of seeds 3, 5, 7; the residuals are all 0 or 1:
    # MS_teacher 24, MS_seed 8, MS_rest (4 * 1) / 2 = 2
    table, reason = variance_by_source(runs_of(values, "teacher_seed", "seed"))
    assert reason == ""
    assert table["source"].tolist() == ["teacher_seed", "seed", "rest"]
    assert table["levels"].tolist() == [2, 3, 6]
    variances = [(24 - 2) / 3, (8 - 2) / 2, 2]
    assert (table["sd"] ** 2).tolist() == pytest.approx(variances)
    assert table["share"].tolist() == pytest.approx([v / sum(variances) for v in variances])
    rest = table.iloc[2]
    assert rest["high"] == pytest.approx(math.sqrt(4 / stats.chi2.ppf(0.025, 2)))
    seed = table.iloc[1]  # Williams: (SS - df F MS_rest) / (chi2 * runs per level)
    low, high = (
        math.sqrt(max(0.0, 16 - 2 * stats.f.ppf(q, 2, 2) * 2) / stats.chi2.ppf(q, 2) / 2)
        for q in (0.975, 0.025)
    )
    assert (seed["low"], seed["high"]) == pytest.approx((low, high))


def test_a_source_that_varies_less_than_chance_has_none_of_the_variance() -> None:
    table, _ = variance_by_source(
        runs_of(np.array([[0.80, 0.82], [0.82, 0.80]]), "teacher_seed", "seed")
    )
    assert table["sd"].tolist()[:2] == [0, 0]
    assert table["share"].tolist() == [0, 0, 1]


def test_equal_accuracies_have_no_shares() -> None:
    table, _ = variance_by_source(runs_of(np.full((3, 7), 0.8131), "teacher_seed", "seed"))
    assert table["sd"].tolist() == pytest.approx([0, 0, 0], abs=1e-12)
    assert table["share"].isna().all()


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_components_are_those_of_statsmodels_mean_squares(seed: int, repeats: int) -> None:
    rng = np.random.default_rng(seed)
    sources = ["teacher_seed", "seed", "split_seed"]
    shape = (3, 4, 2)
    values = rng.normal(0.8, SD, shape) + rng.normal(0, 0.01, (3, 1, 1))
    runs = runs_of(values, *sources)
    if repeats == 2:
        again = runs.assign(test_accuracy=rng.normal(0.8, SD, len(runs)))
        runs = pd.concat([runs, again])
    runs = runs.sample(frac=1, random_state=seed, ignore_index=True)
    table, _ = variance_by_source(runs)
    formula = "test_accuracy ~ " + " + ".join(f"C({source})" for source in sources)
    anova = anova_lm(ols(formula, runs).fit())
    squares = anova["mean_sq"].to_numpy()
    expected = [
        max(0.0, (square - squares[3]) / (len(runs) / levels))
        for square, levels in zip(squares, shape, strict=False)
    ]
    assert (table["sd"] ** 2).tolist() == pytest.approx([*expected, squares[3]])
    rest_df = anova["df"].iloc[3]
    low = math.sqrt(squares[3] * rest_df / stats.chi2.ppf(0.975, rest_df))
    assert table["low"].iloc[3] == pytest.approx(low)


def test_known_components_are_found_and_covered() -> None:
    rng = np.random.default_rng(5)
    truth = np.array([0.004, 0.002, 0.001])
    n = 400
    variances = np.zeros(3)
    covered = np.zeros(3)
    for _ in range(n):
        values = (
            rng.normal(0, truth[0], (5, 1))
            + rng.normal(0, truth[1], (1, 6))
            + rng.normal(0, truth[2], (5, 6))
        )
        found = variance_components(values[..., None], ["teacher_seed", "seed"])
        variances += np.array([each.variance for each in found]) / n
        covered += [each.low <= sd**2 <= each.high for each, sd in zip(found, truth, strict=True)]
    # the relative standard error of a mean of variances on 4, 5 and 20 degrees of freedom is
    # about sqrt(2 / df / n): 0.035, 0.032, 0.016
    assert (np.abs(variances / truth**2 - 1) < 3 * np.array([0.037, 0.035, 0.016])).all()
    assert (covered / n > 0.95 - 2.6 * math.sqrt(0.95 * 0.05 / n)).all()


def test_a_missing_run_costs_its_seed_only() -> None:
    rng = np.random.default_rng(3)
    runs = runs_of(rng.normal(0.8, SD, (3, 5)), "teacher_seed", "seed")
    complete, _ = variance_by_source(runs[runs["seed"] != 2])
    runs.loc[(runs["seed"] == 2) & (runs["teacher_seed"] == 1), "test_accuracy"] = math.nan
    table, reason = variance_by_source(runs)
    pd.testing.assert_frame_equal(table, complete)
    assert "uses 12 of 14 runs" in reason


def test_a_run_done_twice_is_used_once() -> None:
    runs = runs_of(np.random.default_rng(3).normal(0.8, SD, (3, 4)), "teacher_seed", "seed")
    twice = pd.concat([runs, runs.iloc[[5]].assign(test_accuracy=0.1)])
    table, reason = variance_by_source(twice)
    pd.testing.assert_frame_equal(table, variance_by_source(runs)[0])
    assert "uses 12 of 13 runs" in reason


ZIPPED = pd.DataFrame({"teacher_seed": range(4), "seed": range(4)})
NESTED = pd.DataFrame({"teacher_seed": [0, 0, 1, 1], "seed": range(4)})
STAR = pd.DataFrame({"teacher_seed": [0, 0, 0, 1, 2], "seed": [0, 1, 2, 0, 0]})
CONSTANT = pd.DataFrame({"teacher_seed": [0], "seed": [0]})


@pytest.mark.parametrize(
    ("design", "words"),
    [
        (ZIPPED, "each teacher_seed was run with only one seed"),
        (NESTED, "each seed was run with only one teacher_seed"),
        (STAR, "too few combinations of teacher_seed and seed"),
        (CONSTANT, "no seed has two values"),
    ],
)
def test_no_components_without_a_crossed_design(design: pd.DataFrame, words: str) -> None:
    accuracy = np.random.default_rng(0).normal(0.8, SD, len(design))
    table, reason = variance_by_source(design.assign(test_accuracy=accuracy))
    assert table.empty
    assert list(table) == ["source", "levels", "sd", "share", "low", "high"]
    assert words in reason


def test_a_crossed_claim_by_hand() -> None:
    values = np.array([[1.0, 2.0, 6.0], [5.0, 8.0, 8.0]])  # MS 24, 8, 2, as above
    claim = claim_over_teachers(runs_of(values, "teacher_seed", "seed"), baseline_of(1, 2, 3))
    assert claim is not None
    square = (24 + 8 - 2) / 6 + 1 / 3
    df = square**2 / (4**2 / 1 + (8 / 6) ** 2 / 2 + (2 / 6) ** 2 / 2 + (1 / 3) ** 2 / 2)
    assert (claim.difference, claim.error, claim.df) == pytest.approx((3, math.sqrt(square), df))
    assert claim.half_width == pytest.approx(claim.error * stats.t.ppf(0.975, df))
    assert claim.half_width90 == pytest.approx(claim.error * stats.t.ppf(0.95, df))
    assert claim.p == pytest.approx(2 * stats.t.sf(3 / claim.error, df))
    assert (claim.teachers, claim.seeds) == (2, 3)


def test_the_spread_of_teachers_is_never_taken_for_less() -> None:
    """If seeds vary less than the rest, this is Welch's t between teachers' means and baseline."""
    values = np.array([[0.80, 0.83, 0.80], [0.82, 0.79, 0.83], [0.86, 0.86, 0.85]])
    claim = claim_over_teachers(
        runs_of(values, "teacher_seed", "seed"), baseline_of(0.8, 0.81, 0.83)
    )
    assert claim is not None
    welch = stats.ttest_ind(values.mean(1), [0.8, 0.81, 0.83], equal_var=False)
    assert (claim.p, claim.df) == pytest.approx((welch.pvalue, welch.df))


def test_zipped_seeds_are_welchs_t() -> None:
    rng = np.random.default_rng(4)
    taught, control = rng.normal(0.8, SD, 5), rng.normal(0.8, SD, 5)
    seeds = np.arange(5)
    runs = pd.DataFrame({"seed": seeds, "teacher_seed": seeds[::-1], "test_accuracy": taught})
    claim = claim_over_teachers(runs, baseline_of(*control))
    assert claim is not None
    welch = stats.ttest_ind(taught, control, equal_var=False)
    assert (claim.p, claim.df) == pytest.approx((welch.pvalue, welch.df))
    assert (claim.teachers, claim.seeds) == (5, 5)


def test_teachers_count_equally_whatever_their_seeds() -> None:
    runs = pd.DataFrame(
        {
            "teacher_seed": [0, 0, 1, 2],
            "seed": range(4),
            "test_accuracy": [0.80, 0.82, 0.84, 0.88],
        }
    )
    claim = claim_over_teachers(runs, baseline_of(0.7, 0.72, 0.74, 0.76, 9.9))
    assert claim is not None
    means = [0.81, 0.84, 0.88]
    assert claim.difference == pytest.approx(np.mean(means) - 0.73)  # seed 4 is not common
    welch = stats.ttest_ind(means, [0.7, 0.72, 0.74, 0.76], equal_var=False)
    assert claim.p == pytest.approx(welch.pvalue)


def test_a_missing_run_leaves_the_crossed_part() -> None:
    runs = taught_runs(np.random.default_rng(6))
    control = baseline_of(*np.random.default_rng(7).normal(0.8, SD, 5))
    gap = runs[~((runs["teacher_seed"] == 1) & (runs["seed"] == 3))]
    crossed = [runs[runs["seed"] != 3], runs[runs["teacher_seed"] != 1]]
    assert claim_over_teachers(gap, control) in [claim_over_teachers(r, control) for r in crossed]


def test_seeds_that_the_baseline_lacks_are_left_out() -> None:
    runs = taught_runs(np.random.default_rng(6))
    control = baseline_of(0.80, 0.81, 0.805)
    common = claim_over_teachers(runs[runs["seed"] < 3], control)
    assert common is not None
    assert claim_over_teachers(runs, control) == common
    assert claim_over_teachers(runs, control.iloc[:1]) is None
    assert claim_over_teachers(runs.iloc[:0], control) is None


def test_more_student_seeds_do_not_make_up_for_few_teachers() -> None:
    rng = np.random.default_rng(8)
    gains = rng.normal(0, SD, (4, 1))
    few, many = (
        claim_from_arrays(gains + rng.normal(0, 1e-5, (4, n)), rng.normal(0, 1e-5, n))
        for n in (3, 100)
    )
    assert many.error == pytest.approx(few.error, rel=0.02)
    assert many.error == pytest.approx(gains.std(ddof=1) / 2, rel=0.02)


def test_one_teacher_has_no_interval() -> None:
    runs = taught_runs(np.random.default_rng(9), teachers=1)
    control = baseline_of(0.70, 0.71, 0.72, 0.73, 0.74)
    claims = claims_over_teachers({"one": runs, "none": runs.iloc[:0]}, control)
    assert list(claims) == ["one"]
    assert claims["one"].difference == pytest.approx(runs["test_accuracy"].mean() - 0.72)
    assert math.isnan(claims["one"].half_width)
    assert math.isnan(claims["one"].p)
    assert claims["one"].decide() == "too few"


@pytest.mark.parametrize(
    ("teachers", "seeds", "units", "decision"),
    [(2, 5, 2, "too few"), (5, 2, 2, "too few"), (3, 3, 3, "better"), (5, 3, 5, "better")],
)
def test_a_verdict_needs_three_teachers_and_three_seeds(
    teachers: int, seeds: int, units: int, decision: str
) -> None:
    runs = taught_runs(np.random.default_rng(10), teachers, seeds)
    control = baseline_of(*np.random.default_rng(11).normal(0.5, SD, seeds))
    (claim,) = claims_over_teachers({"m": runs}, control).values()
    assert (claim.seeds, claim.decide()) == (units, decision)


def test_equal_accuracies_show_nothing_without_the_grain() -> None:
    runs = runs_of(np.full((3, 7), 0.8131), "teacher_seed", "seed")  # the means are rounded
    control = baseline_of(*[0.81] * 7)
    found = claims_over_teachers({"m": runs}, control)["m"]
    assert math.isnan(found.half_width)
    assert found.decide() not in {"better", "worse", "equal"}
    grain = 1e-4
    claim = claim_over_teachers(runs, control, grain=grain)
    assert claim is not None
    assert claim.error == pytest.approx(math.sqrt(grain**2 / 12 * (1 / 21 + 1 / 7)))


def test_holm_agrees_with_statsmodels_and_with_the_intervals() -> None:
    rng = np.random.default_rng(12)
    outcomes = set()
    for repetition in range(100):
        rows = [
            Difference(f"m{i}", rng.normal(0.006, 0.006), rng.uniform(0.001, 0.004), df, 5)
            for i, df in enumerate(rng.uniform(2, 20, 4))
        ]
        found = holm_intervals(rows)
        assert list(found) == [row.name for row in rows]
        corrected = [each.p for each in found.values()]
        outside = [abs(each.difference) > each.half_width for each in found.values()]
        assert outside == [p < LEVEL for p in corrected]
        outcomes.add(sum(outside))
        if repetition < 5:  # it takes 0.2 s
            p = [2 * stats.t.sf(abs(row.difference) / row.error, row.df) for row in rows]
            assert corrected == pytest.approx(list(multipletests(p, method="holm")[1]))
            own = [row.error * stats.t.ppf(0.95, row.df) for row in rows]
            assert [each.half_width90 for each in found.values()] == pytest.approx(own)
    assert outcomes == {0, 1, 2, 3, 4}


def test_an_untested_contrast_does_not_widen_the_others() -> None:
    row = Difference("m", 0.01, 0.003, 6, 5)
    alone = holm_intervals([row])
    assert alone["m"].half_width == pytest.approx(0.003 * stats.t.ppf(0.975, 6))
    both = holm_intervals([Difference("one", 0.02, math.nan, math.nan, 1), row])
    assert both["m"] == alone["m"]


def decisions(values: np.ndarray, control: np.ndarray) -> list[str]:
    """Decide on settings from their accuracies by teacher and student seed."""
    claims = [claim_from_arrays(each, control) for each in values]
    found = holm_intervals(
        [
            Difference(str(i), claim.difference, claim.error, claim.df, claim.teachers)
            for i, claim in enumerate(claims)
        ]
    )
    return [each.decide() for each in found.values()]


@pytest.mark.parametrize(("teacher_sd", "power"), [(0.001, 0.75), (0.002, 0.6)])
def test_few_claims_are_false_and_a_true_gain_is_found(teacher_sd: float, power: float) -> None:
    rng = np.random.default_rng(13)
    n, teachers, seeds = 1000, 5, 5
    control = rng.normal(0.8, SD, (n, seeds))
    # half of the variance over student seeds is common to all teachers
    values = (
        rng.normal(0.8, teacher_sd, (n, 3, teachers, 1))
        + rng.normal(0, SD / math.sqrt(2), (n, 3, 1, seeds))
        + rng.normal(0, SD / math.sqrt(2), (n, 3, teachers, seeds))
    )
    gain = np.array([0.005, 0, 0])[:, None, None]
    null = [decisions(*each) for each in zip(values, control, strict=True)]
    gained = [decisions(*each) for each in zip(values + gain, control, strict=True)]
    false = sum("better" in each or "worse" in each for each in null) / n
    limit = LEVEL + 2.6 * math.sqrt(LEVEL * (1 - LEVEL) / n)
    assert 0 < false <= limit
    assert sum(each[0] == "better" for each in gained) / n > power
    # runs are no units: a single setting is then falsely claimed too often
    runs = values[:, 0].reshape(n, -1)
    assert (stats.ttest_ind(runs, control, axis=1).pvalue < LEVEL).mean() > limit
