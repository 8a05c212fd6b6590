"""Figures against the verdicts: the drawn intervals, the margin, and unstable settings."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import config, made, tables
from matplotlib.collections import LineCollection, PathCollection, QuadMesh
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.patches import Rectangle

from kd.report import figures
from kd.report.figures import limits
from kd.report.figures.limits import CARET_DOWN, CARET_UP
from kd.report.inference import compare
from kd.report.summary import bounded, half_width
from kd.report.tables import Tables
from kd.runs.status import RunState

GRAIN = 1 / 10_000
SD = 0.002


@pytest.fixture(autouse=True)
def style() -> Iterator[None]:
    with figures.style() as plt:
        yield
        plt.close("all")


def accuracies(
    rng: np.random.Generator, gains: Sequence[float], n: int = 5, base: float = 0.75
) -> pd.DataFrame:
    """Accuracies of `standard` and of settings with these gains, one row per seed."""
    values = rng.normal(base, SD, (n, 1)) + rng.normal(0, SD, (n, len(gains) + 1))
    values[:, 1:] += gains
    return pd.DataFrame(values, columns=["standard", *(f"m{i}" for i in range(len(gains)))])


def summary_of(accuracy: pd.DataFrame, context: str = "", suffix: str = "") -> pd.DataFrame:
    """The rows of a summary, as the contract has them, with the verdicts of `compare`."""
    found = compare(accuracy, "standard", grain=GRAIN)
    rows = []
    for name in map(str, accuracy):
        values = accuracy[name].dropna()
        bad = len(found.unstable.get(name, ()))
        half = math.nan if bad else half_width(values)
        low, high = bounded(float(values.mean()), half)
        row = {
            "setting": name + suffix,
            "method": name,
            "context": context,
            "chosen": True,
            "n": len(values),
            "planned": len(accuracy),
            "test_accuracy": values.mean(),
            "test_accuracy_low": low,
            "test_accuracy_high": high,
            "test_accuracy_median": values.median(),
            "val_accuracy": values.mean(),
            "teacher": "cnn-8",
            "teacher_test_accuracy": math.nan,
            "unstable": bad,
            "baseline": None if name == "standard" else "standard" + suffix,
            "difference": math.nan,
            "difference_ci95": math.nan,
            "decision": None,
            "seeds": len(values),
        }
        if estimate := found.estimates.get(name):
            row |= {"difference": estimate.difference, "difference_ci95": estimate.half_width}
            row["difference_ci90"] = estimate.half_width90
            row |= {"decision": estimate.decide(), "seeds": estimate.seeds}
        elif name != "standard":
            row["decision"] = "unstable"
        rows.append(row)
    return pd.DataFrame(rows).sort_values("val_accuracy", ascending=False, ignore_index=True)


def runs_of(accuracy: pd.DataFrame, suffix: str = "") -> pd.DataFrame:
    rows = [
        {
            "setting": f"{name}{suffix}",
            "method": name,
            "seed": seed,
            "status": RunState.DONE,
            "test_accuracy": value,
            "val_accuracy": value,
        }
        for name in accuracy
        for seed, value in accuracy[name].dropna().items()
    ]
    return pd.DataFrame(rows).astype({"seed": "Int64"})


def tables_of(accuracy: pd.DataFrame, margin: float = 0.005) -> Tables:
    """Tables made by hand."""
    empty = pd.DataFrame(columns=["setting", "seed", "epoch"])
    found = Tables(runs_of(accuracy), empty, summary_of(accuracy), [], {})
    return found._replace(margin=margin)


def without(found: Tables, setting: str) -> Tables:
    """The same tables without a setting."""
    return found._replace(
        summary=found.summary[found.summary["setting"] != setting].reset_index(drop=True),
        runs=found.runs[found.runs["setting"] != setting],
        history=found.history[found.history["setting"] != setting],
    )


# ---- what is drawn


def names(figure: Any) -> list[str]:
    return [text.get_text().split("  (")[0] for text in figure.axes[0].get_yticklabels()]


def marks(figure: Any) -> dict[str, str]:
    """{setting: what its label says in parentheses}."""
    texts = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    return {text.split("  (")[0]: text.split("  (")[1].removesuffix(")") for text in texts}


def intervals(axis: Any, along: int = 0) -> dict[float, tuple[float, float]]:
    """{position on the other axis: (low, high)} of the error bars; `along`: 0 for x, 1 for y."""
    found = {}
    for box in axis.containers:
        if isinstance(box, ErrorbarContainer):
            for bars in box.lines[2]:
                assert isinstance(bars, LineCollection)
                for ends in map(np.asarray, bars.get_segments()):
                    position = float(ends[0, 1 - along])
                    found[position] = (float(ends[:, along].min()), float(ends[:, along].max()))
    return found


def by_name(figure: Any) -> dict[str, tuple[float, float]]:
    rows = names(figure)
    return {rows[int(y)]: ends for y, ends in intervals(figure.axes[0]).items()}


def means(figure: Any) -> dict[str, tuple[float, str]]:
    """{setting: (x, face colour)} of the markers of means and medians."""
    rows = names(figure)
    return {
        rows[int(one.get_ydata()[0])]: (float(one.get_xdata()[0]), one.get_markerfacecolor())
        for one in figure.axes[0].lines
        if one.get_markersize() == 8
    }


def seeds(figure: Any, name: str) -> list[float]:
    """Where the dots and arrows of a row's seeds are."""
    position = names(figure).index(name)
    points = [
        point
        for one in figure.axes[0].collections
        if isinstance(one, PathCollection)
        for point in np.asarray(one.get_offsets())
    ]
    return sorted(float(x) for x, y in points if y == position)


def decisions(figure: Any) -> dict[str, str]:
    """{setting: the text at the right edge of its row}."""
    rows = names(figure)
    return {
        rows[int(text.xy[1])]: text.get_text()
        for text in figure.axes[0].texts
        if text.xy[0] == 1.0 and text.xycoords == figure.axes[0].get_yaxis_transform()
    }


def far_texts(figure: Any) -> dict[str, str]:
    rows = names(figure)
    edges = figure.axes[0].get_xlim()
    texts = [text for text in figure.axes[0].texts if text.xycoords == "data"]
    assert all(text.xy[0] in edges for text in texts)
    return {rows[int(text.xy[1])]: text.get_text() for text in texts}


def legend(figure: Any) -> list[str]:
    return [text.get_text() for box in figure.legends for text in box.get_texts()]


def band(figure: Any) -> tuple[float, float]:
    [patch] = figure.axes[0].patches
    assert isinstance(patch, Rectangle)
    return patch.get_x(), patch.get_x() + patch.get_width()


# ---- differences


@pytest.mark.parametrize("seed", range(6))
def test_point_g_the_drawn_interval_is_the_one_the_verdict_is_read_off(seed: int) -> None:
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, 8))
    accuracy = accuracies(rng, list(rng.normal(0, 0.005, k)), int(rng.integers(3, 9)))
    if seed % 2:
        accuracy["m0"] += rng.normal(0, 0.02, len(accuracy))  # spreads differ: Welch and Holm
    found = tables_of(accuracy)
    verdicts = compare(accuracy, "standard", grain=GRAIN)
    figure, caption = figures.differences(found)
    drawn, written, centers = by_name(figure), decisions(figure), means(figure)
    assert set(names(figure)) == set(accuracy) - {"standard"}
    assert set(drawn) == set(centers) == set(verdicts.estimates)
    for name, estimate in verdicts.estimates.items():
        low, high = drawn[name]
        assert low == pytest.approx(100 * (estimate.difference - estimate.half_width))
        assert high == pytest.approx(100 * (estimate.difference + estimate.half_width))
        assert centers[name][0] == pytest.approx(100 * estimate.difference)
        assert written[name] == estimate.decide()
        assert (low > 0) == (written[name] == "better")
        assert (high < 0) == (written[name] == "worse")
    assert (
        "simultaneous 95 % intervals over seeds, with this teacher and on these test images: an "
        "interval that excludes 0 is a verdict of better or worse; the band is the margin"
    ) in caption


def test_dots_are_the_differences_of_the_same_seed() -> None:
    accuracy = accuracies(np.random.default_rng(0), [0.004, -0.004])
    accuracy.loc[2, "m0"] = math.nan
    figure, _ = figures.differences(tables_of(accuracy))
    expected = 100 * (accuracy["m0"] - accuracy["standard"]).dropna()
    assert len(expected) == 4
    assert seeds(figure, "m0") == pytest.approx(sorted(expected))


@pytest.mark.parametrize("margin", [0.005, 0.02])
def test_the_band_is_the_margin(margin: float) -> None:
    found = tables_of(accuracies(np.random.default_rng(0), [0.001, -0.001]), margin)
    figure, _ = figures.differences(found)
    assert band(figure) == pytest.approx((-100 * margin, 100 * margin))
    low, high = figure.axes[0].get_xlim()
    assert low < -100 * margin < 100 * margin < high
    zero = [one for one in figure.axes[0].lines if list(one.get_xdata()) == [0, 0]]
    assert len(zero) == 1
    assert legend(figure) == ["baseline: standard", f"equal within ± {100 * margin:g} points"]


def test_the_thick_part_is_what_equality_is_read_off() -> None:
    """Drawn for each row with an interval, in the order of the rows."""
    from matplotlib.collections import LineCollection

    found = tables_of(accuracies(np.random.default_rng(0), [0.001, -0.001, 0.008]))
    figure, _ = figures.differences(found)
    axis = figure.axes[0]
    thick = [one for one in axis.collections if isinstance(one, LineCollection)]
    thick = [one.get_segments()[0] for one in thick if one.get_linewidth()[0] == 8]
    rows = found.summary[found.summary["baseline"].notna() & found.summary["chosen"]]
    assert len(thick) == len(rows) == 3
    by_position = {int(segment[0][1]): (segment[0][0], segment[1][0]) for segment in thick}
    for position, name in enumerate(names(figure)):
        row = rows.set_index("setting").loc[name]
        low, high = by_position[position]
        half = 100 * row["difference_ci90"]
        expected = (100 * row["difference"] - half, 100 * row["difference"] + half)
        assert (low, high) == pytest.approx(expected)
        if row["decision"] in ("equal", "undecided"):
            assert (row["decision"] == "equal") == (low > -0.5 and high < 0.5)


def test_the_axis_covers_the_intervals_zero_and_the_margin() -> None:
    accuracy = accuracies(np.random.default_rng(1), [0.03, 0.032, 0.034])
    figure, caption = figures.differences(tables_of(accuracy))
    low, high = figure.axes[0].get_xlim()
    assert -0.5 - 0.3 < low < -0.5
    ends = by_name(figure)
    assert max(end for _, end in ends.values()) < high < 5
    assert set(names(figure)) == set(ends)
    assert "Outside the axis" not in caption


def collapsed(gains: Sequence[float] = (0.006, -0.006, 0.001)) -> pd.DataFrame:
    """Five seeds of settings, of which one, "m1", has two at chance level."""
    accuracy = accuracies(np.random.default_rng(2), gains)
    accuracy.loc[[1, 3], "m1"] = 0.15
    return accuracy


@pytest.mark.parametrize("kind", ["differences", "accuracy"])
def test_point_e_unstable_rows_do_not_set_the_range(kind: str) -> None:
    found = tables_of(collapsed())
    draw: Callable[[Tables], tuple[Any, str]] = getattr(figures, kind)
    figure, caption = draw(found)
    alone, _ = draw(without(found, "m1"))
    span = figure.axes[0].get_xlim()
    assert span == alone.axes[0].get_xlim()
    assert span[1] - span[0] < 4
    assert marks(figure)["m1"] == "unstable: 2 of 5"
    assert marks(figure)["m0"] == "n = 5"
    assert "m1" not in by_name(figure)
    assert "m0" in by_name(figure)
    assert seeds(figure, "m1")[:2] == [span[0], span[0]], "two arrows at the edge"
    assert len(seeds(figure, "m1")) == 5
    assert "they do not set the range of the axis" in caption


def test_an_unstable_row_has_no_difference() -> None:
    accuracy = collapsed()
    figure, _ = figures.differences(tables_of(accuracy))
    assert "m1" not in means(figure)
    assert decisions(figure)["m1"] == "unstable"
    sound = 100 * (accuracy["m1"] - accuracy["standard"]).drop([1, 3])
    low, high = figure.axes[0].get_xlim()
    assert seeds(figure, "m1")[2:] == pytest.approx(sorted(np.clip(sound, low, high)))


def test_an_unstable_baseline_decides_nothing() -> None:
    accuracy = accuracies(np.random.default_rng(3), [0.006, -0.006])
    accuracy.loc[0, "standard"] = 0.1
    figure, _ = figures.differences(tables_of(accuracy))
    assert not by_name(figure)
    assert not means(figure)
    assert set(marks(figure).values()) == {"baseline unstable"}
    assert set(decisions(figure).values()) == {"unstable"}
    low, high = figure.axes[0].get_xlim()
    assert -1 < low < -0.5 < 0.5 < high < 1


def test_few_seeds_have_a_mean_and_no_interval() -> None:
    accuracy = accuracies(np.random.default_rng(4), [0.006, -0.006], n=2)
    figure, caption = figures.differences(tables_of(accuracy))
    expected = 100 * (accuracy["m0"] - accuracy["standard"]).mean()
    assert means(figure)["m0"][0] == pytest.approx(expected)
    assert not by_name(figure)
    assert set(decisions(figure).values()) == {"too few"}
    assert "Too few: no interval for fewer than three seeds." in caption


def test_a_far_stable_row_is_at_the_edge() -> None:
    accuracy = accuracies(np.random.default_rng(5), [0.006, -0.6, 0.001])
    figure, caption = figures.differences(tables_of(accuracy))
    low, high = figure.axes[0].get_xlim()
    assert high - low < 4
    found = compare(accuracy, "standard", grain=GRAIN).estimates["m1"]
    difference, half = 100 * found.difference, 100 * found.half_width
    text = f"{difference:+.2f} ({difference - half:+.2f} to {difference + half:+.2f})"
    assert far_texts(figure) == {"m1": text.replace("-", "−")}
    assert decisions(figure)["m1"] == "worse"
    assert f"m1 ({difference:+.2f} points)" in caption


def test_rows_are_compared_with_their_own_baseline() -> None:
    rng = np.random.default_rng(6)
    small, large = accuracies(rng, [0.004]), accuracies(rng, [-0.004], base=0.92)
    found = tables_of(small)._replace(
        summary=pd.concat(
            [summary_of(small, "small", " small"), summary_of(large, "large", " large")],
            ignore_index=True,
        ),
        runs=pd.concat([runs_of(small, " small"), runs_of(large, " large")], ignore_index=True),
    )
    figure, _ = figures.differences(found)
    assert set(names(figure)) == {"m0 small", "m0 large"}
    for frame, suffix in ((small, " small"), (large, " large")):
        expected = sorted(100 * (frame["m0"] - frame["standard"]))
        assert seeds(figure, f"m0{suffix}") == pytest.approx(expected)
    assert legend(figure)[0] == "baseline of the row"


def test_fourteen_differences_fit() -> None:
    accuracy = accuracies(np.random.default_rng(7), [0.001 * i for i in range(16)])
    figure, caption = figures.differences(tables_of(accuracy))
    assert len(names(figure)) == len(decisions(figure)) == 14
    assert "14 of 16 methods: those best on validation. Left out: " in caption
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    assert all(a.y0 > b.y1 for a, b in itertools.pairwise(boxes)), "no overlap"
    assert max(box.x1 for box in boxes) <= figure.bbox.width, "in the figure"


def test_only_chosen_settings_with_a_baseline_are_compared() -> None:
    found = tables_of(accuracies(np.random.default_rng(8), [0.004, -0.004]))
    summary = found.summary.copy()
    summary.loc[summary["setting"] == "m0", "chosen"] = False
    figure, _ = figures.differences(found._replace(summary=summary))
    assert names(figure) == ["m1"]
    reason = "no setting that has a baseline was chosen on validation"
    with pytest.raises(figures.FigureNotApplicable, match=reason):
        figures.differences(found._replace(summary=summary.assign(chosen=False)))
    with pytest.raises(figures.FigureNotApplicable, match="no setting has a baseline"):
        figures.differences(found._replace(summary=summary.assign(baseline=None)))


def test_the_caption_says_what_a_verdict_is_about() -> None:
    found = tables_of(accuracies(np.random.default_rng(9), [0.004, -0.004]))
    summary = found.summary.assign(unit="seeds", seeds=3)
    summary.loc[summary["setting"] == "m0", "unit"] = "teachers"
    _, caption = figures.differences(found._replace(summary=summary))
    assert "over seeds, with this teacher (over teachers: m0) and on these test images" in caption
    assert "Verdict on fewer seeds than are drawn: m1 (3 of 5)." in caption


def test_differences_follow_accuracy(tmp_path: Path) -> None:
    found = tables_of(collapsed())
    drawn, _ = figures.draw(found, tmp_path)
    assert [(one.name, one.title) for one in drawn[:2]] == [
        ("accuracy", "Test accuracy"),
        ("differences", "Difference from the baseline"),
    ]


# ---- accuracy


def test_an_unstable_setting_is_at_its_median() -> None:
    accuracy = collapsed()
    figure, caption = figures.accuracy(tables_of(accuracy))
    x, face = means(figure)["m1"]
    assert x == pytest.approx(100 * accuracy["m1"].median())
    assert face == "white"
    assert means(figure)["m0"][1] != "white"
    assert (
        "Unstable settings: median over seeds, no interval; they do not set the range of the axis"
    ) in caption


@pytest.mark.parametrize("gain", [0.2, -0.2])
def test_an_unstable_median_beyond_the_axis_is_written(gain: float) -> None:
    accuracy = collapsed((0.006, gain, 0.001))
    figure, caption = figures.accuracy(tables_of(accuracy))
    text = f"{100 * accuracy['m1'].median():.2f} %"
    assert far_texts(figure) == {"m1": text}
    assert f"m1 ({text})" in caption


def test_only_unstable_settings_still_have_an_axis() -> None:
    accuracy = accuracies(np.random.default_rng(0), [0.002])
    accuracy.loc[0] = 0.1
    figure, _ = figures.accuracy(tables_of(accuracy))
    assert set(marks(figure).values()) == {"unstable: 1 of 5"}
    low, high = figure.axes[0].get_xlim()
    assert all(low < x < high for x, _ in means(figure).values())


def test_accuracies_have_the_intervals_of_the_summary() -> None:
    found = tables_of(accuracies(np.random.default_rng(1), [0.004, -0.004]))
    drawn = by_name(figures.accuracy(found)[0])
    assert len(drawn) == 3
    for _, row in found.summary.iterrows():
        expected = (100 * row["test_accuracy_low"], 100 * row["test_accuracy_high"])
        assert drawn[row["setting"]] == pytest.approx(expected)


# ---- all figures of accuracies


def grid(folder: Path, values: Mapping[tuple[int, int], Sequence[float]]) -> Tables:
    """Tables of `standard` with these accuracies, by the student's scale and its epochs."""
    configs = [
        config("standard", seed, student__scale=scale, student__epochs=epochs)
        for (scale, epochs), seeds in values.items()
        for seed in range(len(seeds))
    ]
    flat = [value for seeds in values.values() for value in seeds]
    made(folder, configs, list(flat), list(flat))
    return tables(folder)


def test_point_f_no_interval_leaves_the_range_of_accuracies(tmp_path: Path) -> None:
    values = {
        (scale, epochs): seeds
        for epochs in (2, 4)
        for scale, seeds in ((4, (0.001, 0.013)), (8, (0.50, 0.51)), (16, (0.988, 1.0)))
    }
    found = grid(tmp_path, values)
    assert not found.summary["unstable"].any()
    naive = found.summary["test_accuracy"] + found.summary["test_accuracy_ci95"]
    assert naive.max() > 1, "the symmetric interval leaves the range"
    drawn = [intervals(figures.accuracy(found)[0].axes[0])]
    for make in (lambda: figures.response(found, "student.scale"), lambda: figures.size(found)):
        drawn += [intervals(axis, 1) for axis in make()[0].axes]
    assert len(drawn) == 7
    for ends in drawn:
        assert len(ends) >= 3
        assert all(0 <= low < high <= 100 for low, high in ends.values())
        assert min(low for low, _ in ends.values()) < 0.7, "not merely cut off"
        assert max(high for _, high in ends.values()) > 99.4


@pytest.mark.parametrize(
    ("mean", "half", "ends"), [(99.0, 3.0, (96.0, 100.0)), (0.5, 2.0, (0.0, 2.5))]
)
def test_clipped_intervals(mean: float, half: float, ends: tuple[float, float]) -> None:
    assert limits.interval(mean, half) == pytest.approx(ends)
    assert limits.arms([mean], [ends]) == [
        [pytest.approx(mean - ends[0])],
        [pytest.approx(ends[1] - mean)],
    ]


UNSTABLE = "standard scale=8 epochs=4"


def one_unstable(folder: Path, drop: float = 0.0) -> Tables:
    """Six settings of four seeds; one seed of one collapsed by 50 points, its median by `drop`."""
    rng = np.random.default_rng(0)
    values = {
        (scale, epochs): list(0.70 + 0.002 * scale + 0.002 * epochs + rng.normal(0, SD, 4))
        for scale in (4, 8, 16)
        for epochs in (2, 4)
    }
    values[8, 4] = [value - drop for value in values[8, 4]]
    values[8, 4][2] = 0.2
    found = grid(folder, values)
    assert list(found.summary["setting"][found.summary["unstable"] == 1]) == [UNSTABLE]
    # chosen, so that all figures show it
    chosen = found.summary["chosen"] | (found.summary["setting"] == UNSTABLE)
    chosen &= found.summary["setting"] != "standard scale=8 epochs=2"
    return found._replace(summary=found.summary.assign(chosen=chosen))


def scattered(found: Tables) -> Tables:
    """The same tables, as of a random search over one key."""
    keys = {name: 1 + i / 7 for i, name in enumerate(sorted(found.summary["setting"]))}
    summary = found.summary.assign(random=found.summary["setting"].map(keys))
    summary["method"] = "standard " + summary["setting"]
    runs = found.runs.assign(method=found.runs["setting"].radd("standard "))
    return found._replace(summary=summary, runs=runs, swept=["random"])


@pytest.fixture
def shaky(tmp_path: Path) -> Tables:
    return one_unstable(tmp_path)


DRAWN = pytest.mark.parametrize(
    "make",
    [
        lambda found: figures.response(found, "student.scale"),
        lambda found: figures.response(scattered(found), "random"),
        figures.size,
        figures.curves,
    ],
    ids=["response", "scatter", "size", "curves"],
)


@DRAWN
@pytest.mark.parametrize("side", ["above", "below"])
def test_unstable_settings_set_no_range(
    side: str, make: Callable[[Tables], tuple[Any, str]], tmp_path: Path
) -> None:
    drops = {"above": -0.04, "below": 0.06}
    if make is figures.curves:  # its axis is wider: it has training views too
        drops = {"above": -0.2, "below": 0.42}
    found = one_unstable(tmp_path, drops[side])
    figure, caption = make(found)
    alone, other_caption = make(without(found, UNSTABLE))
    for axis, other in zip(figure.axes, alone.axes, strict=True):
        assert axis.get_ylim() == pytest.approx(other.get_ylim())
    assert f"{UNSTABLE}; median over seeds, no interval; they do not set the range" in caption
    assert "nstable" not in other_caption
    assert "drawn at its edge" in caption
    low, high = figure.axes[-1].get_ylim()
    marker, edge = (CARET_DOWN, low) if side == "below" else (CARET_UP, high)
    arrows = [one for one in figure.axes[-1].lines if one.get_marker() == marker]
    assert [y for one in arrows for y in np.atleast_1d(one.get_ydata())] == [edge]


@DRAWN
def test_unstable_settings_are_hollow(
    make: Callable[[Tables], tuple[Any, str]], shaky: Tables
) -> None:
    figure, _ = make(shaky)
    median = 100 * shaky.runs[shaky.runs["setting"] == UNSTABLE]["test_accuracy"].median()
    hollow = [
        float(y)
        for one in figure.axes[-1].lines
        if to_hex(one.get_markerfacecolor()) == "#ffffff" and one.get_marker() != "None"
        for y in np.atleast_1d(one.get_ydata())
    ]
    assert hollow
    assert hollow == pytest.approx([median] * len(hollow))


@pytest.mark.parametrize("drop", [-0.04, 0.0, 0.06])
def test_an_unstable_cell_is_dashed_and_sets_no_colours(drop: float, tmp_path: Path) -> None:
    shaky = one_unstable(tmp_path, drop)
    keys = ("student.scale", "student.epochs")
    figure, caption = figures.heat(shaky, *keys)
    alone, _ = figures.heat(without(shaky, UNSTABLE), *keys)

    def colours(figure: Any) -> list[tuple[float, float]]:
        meshes = [c for axis in figure.axes[:2] for c in axis.collections]
        return [mesh.get_clim() for mesh in meshes if isinstance(mesh, QuadMesh)]

    assert colours(figure) == colours(alone)
    for axis in figure.axes[:2]:
        dashed = [patch for patch in axis.patches if patch.get_linestyle() == "--"]
        assert [(int(patch.get_x()), int(patch.get_y())) for patch in dashed] == [(1, 1)]
    assert f"Unstable settings (dashed): {UNSTABLE}; median" in caption
    assert ("Above the colour scale: 2 cells" in caption) == (drop < 0)
    assert ("Below the colour scale: 2 cells" in caption) == (drop > 0)


def test_unstable_settings_are_not_on_the_front(shaky: Tables) -> None:
    figure, _ = figures.size(shaky)
    fronts = [one for one in figure.axes[0].lines if one.get_linestyle() == "--"]
    assert [list(one.get_xdata()) for one in fronts] == [[400, 1600]]
