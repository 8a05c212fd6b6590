"""Tell which seed the accuracy varies with, and compare settings over several teachers.

A run has up to three seeds: the student's, the teacher's and the split's. `variance_by_source`
splits the variance of one setting's accuracy by seed. `claims_over_teachers` compares settings with
a baseline for teachers in general, not for the one at hand: the teacher is the unit, so more
student seeds do not make up for few teachers.

Both treat every seed as a random draw and the effects of seeds as additive. Whatever depends on a
combination of seeds belongs to the rest.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from kd.report.inference import (
    LEVEL,
    MIN_SEEDS,
    Difference,
    Estimate,
    holm_intervals,
    t_interval,
)

SOURCES = ("teacher_seed", "seed", "split_seed")
REST = "rest"
ROUNDING = 1e-20  # variances up to this are those of equal accuracies
COLUMNS = {
    "source": "str",
    "levels": "int64",
    "sd": "float64",
    "share": "float64",
    "low": "float64",
    "high": "float64",
}


def variance_by_source(
    runs: pd.DataFrame, sources: Sequence[str] = SOURCES
) -> tuple[pd.DataFrame, str]:
    """Split the variance of one setting's accuracy by source of randomness.

    The components are those of a main-effects analysis of variance with random effects, found by
    equating mean squares with their expectations (the method of moments). It needs every
    combination of the sources' values equally often. Runs that stand in the way are left out.

    Args:
        runs: The runs of one setting: `test_accuracy` as a fraction, and the seeds. Runs without
            an accuracy are ignored.
        sources: The columns of the seeds. Those that are absent or constant are ignored.

    Returns:
        A table and, if it is empty or does not use all runs, the reason; else "". The table has a
        row for each source that varies and one for the rest, with the columns:

            source: The column of the seed, or `rest`.
            levels: Number of values of the seed; for the rest, number of runs.
            sd: Standard deviation due to the source, as a fraction of accuracy; 0 where the
                estimated variance is negative.
            share: Share of the sum of the variances; nan if all are 0.
            low, high: The 95 % interval of `sd`: exact for a single source and for the rest, else
                Williams's (1962), which holds with at least 90 % and close to 95 %.

        If a single source varies and each value has one run, there is no rest: `sd` is the
        sample's standard deviation.
    """
    measured = runs.dropna(subset=["test_accuracy"])
    varying = [name for name in sources if name in measured and measured[name].nunique() > 1]
    if not varying:
        return _table([]), "no seed has two values"
    used = measured.dropna(subset=varying)
    grid, _ = _grid(used, varying)
    counts = (~np.isnan(grid)).sum(-1)
    complete = _complete_part(counts > 0)
    if min(map(len, complete)) < 2:
        return _table([]), _why_not_crossed(used, varying)
    repeats = int(counts[np.ix_(*complete)].min())
    values = grid[np.ix_(*complete, range(repeats))]
    reason = ""
    if values.size < len(measured):
        reason = (
            f"uses {values.size} of {len(measured)} runs, "
            f"since not every combination of {_join(varying)} was run equally often"
        )
    return _table(variance_components(values, varying)), reason


class Component(NamedTuple):
    """A variance component.

    Attributes:
        source: The column of the seed, or `rest`.
        levels: Number of values of the seed; for the rest, number of runs.
        variance: The estimate, at least 0.
        low: The lower end of its 95 % interval.
        high: The upper end.
    """

    source: str
    levels: int
    variance: float
    low: float
    high: float


def variance_components(values: np.ndarray, sources: Sequence[str]) -> list[Component]:
    """Estimate the variance components of a crossed design, as for `variance_by_source`.

    Args:
        values: Accuracies by levels of each source and, last, by repeat.
        sources: The names of the sources.
    """
    from scipy import stats

    tails = LEVEL / 2, 1 - LEVEL / 2
    squares = _sums_of_squares(values, len(sources))
    dfs = [n - 1 for n in values.shape[: len(sources)]]
    rest_df = values.size - 1 - sum(dfs)
    rest = 0.0
    if rest_df:
        rest = max(0.0, float(((values - values.mean()) ** 2).sum()) - sum(squares)) / rest_df
    components = []
    for source, df, square in zip(sources, dfs, squares, strict=True):
        runs_per_level = values.size / (df + 1)
        # F_q * MS_rest: what the mean square would be in a fraction q of cases without an effect
        chance = [float(stats.f.ppf(q, df, rest_df)) * rest if rest_df else 0.0 for q in tails]
        high, low = (
            max(0.0, square - df * mean_square) / float(stats.chi2.ppf(q, df)) / runs_per_level
            for q, mean_square in zip(tails, chance, strict=True)
        )
        variance = max(0.0, (square / df - rest) / runs_per_level)
        components.append(Component(source, df + 1, variance, low, high))
    if rest_df:
        high, low = (rest * rest_df / float(stats.chi2.ppf(q, rest_df)) for q in tails)
        components.append(Component(REST, values.size, rest, low, high))
    return components


def _sums_of_squares(values: np.ndarray, sources: int) -> list[float]:
    """Return the sum of squares of the main effect along each of the first axes."""
    sums = []
    for axis in range(sources):
        others = tuple(other for other in range(values.ndim) if other != axis)
        deviations = values.mean(others) - values.mean()
        sums.append(float((deviations**2).sum()) * values.size / values.shape[axis])
    return sums


def _table(components: Sequence[Component]) -> pd.DataFrame:
    total = sum(component.variance for component in components)
    rows = [
        (
            component.source,
            component.levels,
            math.sqrt(component.variance),
            component.variance / total if total > ROUNDING else math.nan,
            math.sqrt(component.low),
            math.sqrt(component.high),
        )
        for component in components
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def _why_not_crossed(runs: pd.DataFrame, sources: Sequence[str]) -> str:
    """Say which sources cannot be told apart."""
    for one in sources:
        for other in sources:
            if one != other and (runs.groupby(one)[other].nunique() == 1).all():
                return (
                    f"each {one} was run with only one {other}, so their effects cannot be "
                    "told apart"
                )
    return f"too few combinations of {_join(sources)} were run to tell their effects apart"


def _join(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _grid(runs: pd.DataFrame, sources: Sequence[str]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return accuracies by levels of the sources and by repeat, and the levels.

    Where there is no run, the accuracy is nan.
    """
    levels: list[np.ndarray] = []
    codes: list[np.ndarray] = []
    for source in sources:
        values, code = np.unique(runs[source].to_numpy(), return_inverse=True)
        levels.append(values)
        codes.append(code)
    shape = tuple(map(len, levels))
    cell = pd.Series(np.ravel_multi_index(tuple(codes), shape))
    repeat = cell.groupby(cell).cumcount().to_numpy()
    grid = np.full((*shape, int(repeat.max()) + 1), math.nan)
    grid[(*codes, repeat)] = runs["test_accuracy"].to_numpy(dtype=float)
    return grid, levels


def _complete_part(present: np.ndarray) -> list[list[int]]:
    """Return the levels, by axis, of a part of the grid that has no gaps.

    The level with the largest share of gaps is dropped until none is left. This keeps a large
    part, not always the largest.
    """
    complete = [list(range(n)) for n in present.shape]
    while not (part := present[np.ix_(*complete)]).all():
        worst = (0.0, 0, 0, 0)  # share of gaps, then the longest axis and the last level
        for axis in range(part.ndim):
            others = tuple(other for other in range(part.ndim) if other != axis)
            for level, share in enumerate((~part).mean(others)):
                worst = max(worst, (float(share), part.shape[axis], axis, level))
        _, _, axis, level = worst
        del complete[axis][level]
    return complete


class TeacherClaim(NamedTuple):
    """The difference of one setting's mean accuracy from the baseline's, over teachers.

    Attributes:
        difference: Mean over teachers, as a fraction.
        error: Its standard error; nan for a single teacher or if nothing varies.
        df: Degrees of freedom of the error, by Satterthwaite.
        half_width: Half of the interval at the level that was asked for.
        half_width90: Half of the 90 % interval.
        p: The two-sided p-value, not corrected for other settings.
        teachers: Number of teachers.
        seeds: Number of student seeds.
    """

    difference: float
    error: float
    df: float
    half_width: float
    half_width90: float
    p: float
    teachers: int
    seeds: int


def claim_over_teachers(
    taught: pd.DataFrame, baseline: pd.DataFrame, level: float = LEVEL, grain: float = 0.0
) -> TeacherClaim | None:
    """Compare one setting with the baseline for teachers in general.

    The standard error covers the spread between teachers, the student seeds and the baseline's
    seeds. Student seeds that all teachers share are a source of their own: with T teachers, S
    seeds and the mean squares MS of the two-way analysis of variance,

        error^2 = (MS_teacher + max(0, MS_seed - MS_rest)) / (T S) + s_baseline^2 / S

    If each student seed occurs with one teacher only, the teachers' means are independent, and
    error^2 is their variance / T + s_baseline^2 / S. If teachers share some seeds only, runs are
    left out until all teachers that remain share all seeds that remain.

    Satterthwaite's degrees of freedom are too many where few teachers vary more than many student
    seeds. With three teachers and ten seeds, the 95 % interval covers about 94 %, and the
    familywise error rate of three settings is about 7 %; with five teachers it is about 5 %.

    Args:
        taught: The runs of the setting: `test_accuracy` as a fraction, `teacher_seed`, `seed`.
            Runs without an accuracy are left out, so a setting with diverged runs looks better
            than it is.
        baseline: The runs of the baseline: `test_accuracy` and `seed`.
        level: Significance level of `half_width`: 1 - the confidence level.
        grain: The smallest difference of an accuracy, 1 / number of test images. No spread is
            taken to be smaller.

    Returns:
        The claim, or None if taught and baseline have fewer than two student seeds in common. With
        a single teacher, only the difference is known.
    """
    columns = ["test_accuracy", "seed"]
    control = baseline.dropna(subset=columns).groupby("seed")["test_accuracy"].mean()
    runs = taught.dropna(subset=[*columns, "teacher_seed"])
    runs = runs[runs["seed"].isin(control.index)]
    if runs.empty:
        return None
    grid, (_, seeds) = _grid(runs, ["teacher_seed", "seed"])
    present = ~np.isnan(grid)
    counts = present.sum(-1)
    values = np.where(present, grid, 0.0).sum(-1) / np.where(counts, counts, math.nan)
    crossed = bool((~np.isnan(values)).sum(0).max() > 1)
    if crossed:
        complete = _complete_part(~np.isnan(values))
        values, seeds = values[np.ix_(*complete)], seeds[complete[1]]
    if len(seeds) < 2:
        return None
    return claim_from_arrays(values, control.loc[seeds].to_numpy(), crossed, level, grain)


def claim_from_arrays(
    values: np.ndarray,
    control: np.ndarray,
    crossed: bool = True,
    level: float = LEVEL,
    grain: float = 0.0,
) -> TeacherClaim:
    """Compare one setting with the baseline, as `claim_over_teachers`.

    Args:
        values: Accuracies by teacher and student seed; nan where a teacher has no such seed.
        control: The baseline's accuracies by student seed.
        crossed: Whether all teachers share all student seeds; else none share any.
        level: As for `claim_over_teachers`.
        grain: As for `claim_over_teachers`.
    """
    least = grain**2 / 12
    seeds = len(control)
    terms = _taught_terms(values, crossed, least)
    terms.append((max(float(control.var(ddof=1)), least) / seeds, seeds - 1))
    difference = float(np.nanmean(values, axis=1).mean() - control.mean())
    error, df = _satterthwaite(terms)
    return TeacherClaim(
        difference, error, df, *t_interval(difference, error, df, level), len(values), seeds
    )


def _taught_terms(values: np.ndarray, crossed: bool, least: float) -> list[tuple[float, int]]:
    """Return the terms of the squared error of the mean accuracy, with degrees of freedom.

    Args:
        values: As for `claim_from_arrays`.
        crossed: As for `claim_from_arrays`.
        least: The smallest variance.
    """
    teachers, seeds = values.shape
    if teachers < 2:
        return [(math.nan, 0)]
    if not crossed:
        variance = float(np.nanmean(values, axis=1).var(ddof=1))
        return [(max(variance, least) / teachers, teachers - 1)]
    by_teacher, by_seed = _sums_of_squares(values, 2)
    rest = max(0.0, float(((values - values.mean()) ** 2).sum()) - by_teacher - by_seed)
    rest_df = (teachers - 1) * (seeds - 1)
    terms = [(max(by_teacher / (teachers - 1), least) / values.size, teachers - 1)]
    seed_square, rest_square = by_seed / (seeds - 1), rest / rest_df
    if seed_square > rest_square:
        terms.append((seed_square / values.size, seeds - 1))
        terms.append((-rest_square / values.size, rest_df))
    return terms


def _satterthwaite(terms: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Return the standard error and its degrees of freedom from terms of its square.

    Both are nan if a term is, or if nothing varies.
    """
    square = sum(term for term, _ in terms)
    if not square > ROUNDING:
        return math.nan, math.nan
    return math.sqrt(square), square**2 / sum(term**2 / df for term, df in terms)


def claims_over_teachers(
    taught_by_setting: Mapping[str, pd.DataFrame],
    baseline: pd.DataFrame,
    level: float = LEVEL,
    grain: float = 0.0,
) -> dict[str, Estimate]:
    """Compare several settings with the baseline for teachers in general, by Holm's procedure.

    Args:
        taught_by_setting: By setting, its runs, as for `claim_over_teachers`.
        baseline: The runs of the baseline.
        level: The familywise error rate.
        grain: As for `claim_over_teachers`.

    Returns:
        By setting, the estimate; none where `claim_over_teachers` has none. `seeds` is the number
        of teachers, or, if that is fewer and fewer than `MIN_SEEDS`, of student seeds: either is
        too few for a verdict.
    """
    differences = []
    for name, taught in taught_by_setting.items():
        claim = claim_over_teachers(taught, baseline, grain=grain)
        if claim is not None:
            units = claim.teachers
            if claim.seeds < MIN_SEEDS:
                units = min(units, claim.seeds)
            differences.append(Difference(name, claim.difference, claim.error, claim.df, units))
    return holm_intervals(differences, level)
