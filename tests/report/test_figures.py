"""Figures: what they leave out, validation before test, axes for the sound rows, fitting labels."""

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import config, made, tables
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer

from kd.report import figures
from kd.report.tables import Tables

NINE = ["standard", "logits", "feature", "hint", "rkd", "crd", "dkd", "nkd", "at"]


@pytest.fixture(autouse=True)
def style() -> Iterator[None]:
    with figures.style() as plt:
        yield
        plt.close("all")


def sweep(
    folder: Path,
    configs: Sequence[dict],
    test: Sequence[float],
    val: Sequence[float] | None = None,
    **edits: Any,
) -> Tables:
    """Tables of a sweep with these results; val=() has no validation.

    `edits`: for each key, its values in the result files, one for each run.
    """
    jobs = made(folder, list(configs), list(test), list(val) if val else None)
    for number, job in enumerate(jobs):
        path = Path(job["folder"]) / "result.json"
        result = json.loads(path.read_text()) | {
            key: values[number] for key, values in edits.items()
        }
        if val == ():
            del result["metrics"]["val_accuracy"]
        path.write_text(json.dumps(result))
    return tables(folder)


def nine(folder: Path, means: Sequence[float], spread: float = 0.002, **more: Any) -> Tables:
    """Nine methods of three seeds each."""
    accuracies = [min(1.0, max(0.0, mean + spread * step)) for mean in means for step in (-1, 0, 1)]
    return sweep(
        folder, [config(method, seed) for method in NINE for seed in range(3)], accuracies, **more
    )


def legend(figure: Any) -> dict[str, Any]:
    """{label: handle} of a figure's legends."""
    boxes = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]
    return {
        text.get_text(): handle
        for box in boxes
        for text, handle in zip(box.get_texts(), box.legend_handles, strict=True)
    }


def rows(figure: Any) -> list[str]:
    """The settings that the figure of accuracies names."""
    return [text.get_text().split("  (")[0] for text in figure.axes[0].get_yticklabels()]


def bars(axis: Any) -> np.ndarray:
    """The ends of all error bars of an axis, as points."""
    lines = [
        c for box in axis.containers if isinstance(box, ErrorbarContainer) for c in box.lines[2]
    ]
    lines += [c for c in axis.collections if isinstance(c, LineCollection)]
    return np.concatenate(
        [np.asarray(segment) for line in lines for segment in line.get_segments() if len(segment)]
    )


def line(axis: Any, look: Any) -> Any:
    """The longest line of an axis in the colour and marker of a legend's handle."""
    alike = [
        one
        for one in axis.lines
        if one.get_marker() == look.get_marker()
        and to_hex(one.get_color()) == to_hex(look.get_color())
    ]
    return max(alike, key=lambda one: len(one.get_xdata()))


# ---- what is left out


@pytest.mark.parametrize("name", ["curves", "reliability"])
def test_the_best_on_validation_are_drawn(name: str, tmp_path: Path) -> None:
    """The best are typed last, and are the worst on test."""
    val = [0.70 + 0.01 * i for i in range(9) for _ in range(3)]
    found = nine(tmp_path, [0.9 - 0.01 * i for i in range(9)], val=val)
    figure, caption = getattr(figures, name)(found)
    assert [label for label in legend(figure) if label in NINE] == NINE[:2:-1]
    assert (
        "6 of 9 methods: those best on validation. Left out: feature, logits, standard." in caption
    )


def test_without_validation_the_first_are_drawn(tmp_path: Path) -> None:
    """The best on test are typed last: taking them would be a choice on test."""
    found = nine(tmp_path, [0.7 + 0.01 * i for i in range(9)], val=())
    figure, caption = figures.curves(found)
    assert [label for label in legend(figure) if label in NINE] == NINE[:6]
    assert (
        "6 of 9 methods: the first in the sweep, because there are no validation images" in caption
    )


def test_accuracy_keeps_the_best_of_thirty(tmp_path: Path) -> None:
    names = [f"m{i:02}" for i in range(30)]
    val = [0.7 + 0.001 * (7 * i % 30) for i in range(30)]
    figure, caption = figures.accuracy(
        sweep(tmp_path, [config(name, 0) for name in names], [0.8] * 30, val)
    )
    best = sorted(names, key=lambda name: -val[names.index(name)])
    assert rows(figure) == best[:14]
    left_out = f"Left out: {', '.join(best[14:22])} and 8 more."
    assert f"14 of 30 methods: those best on validation. {left_out}" in caption


def test_of_many_settings_the_best_are_drawn(tmp_path: Path) -> None:
    """The chosen setting of each method first, then the best of the others."""
    configs = [config("logits", 0, method__T=float(t)) for t in range(1, 41)] + [
        config("standard", 0)
    ]
    val = [0.7 + 0.001 * (t if t % 2 else -t) for t in range(1, 41)] + [0.5]
    figure, caption = figures.accuracy(sweep(tmp_path, configs, [0.8] * 41, val))
    assert (
        rows(figure)
        == ["logits T=39", "standard", *(f"logits T={t}" for t in range(37, 13, -2))][:14]
    )
    assert "14 of 41 settings: those best on validation, the chosen ones first." in caption


def test_settings_of_no_drawn_method_are_named(tmp_path: Path) -> None:
    names = [f"m{i:02}" for i in range(20)]
    configs = [config(name, 0, student__epochs=e) for name in names for e in (2, 4)]
    val = [0.9 - 0.01 * (i // 2) + 0.001 * (i % 2) for i in range(40)]
    _, caption = figures.accuracy(sweep(tmp_path, configs, val, val))
    assert "14 of 40 settings" in caption
    assert "Methods without a setting shown: m14, m15, m16, m17, m18, m19." in caption


def test_several_data_sets_all_have_curves(tmp_path: Path) -> None:
    """The easy data set does not crowd out the other."""
    configs = [config(m, 0, data__name=d) for d in ("easy", "hard") for m in NINE[:5]]
    val = [0.95, 0.94, 0.93, 0.92, 0.91, 0.55, 0.54, 0.53, 0.52, 0.51]
    figure, caption = figures.curves(sweep(tmp_path, configs, val, val))
    drawn = [label for label in legend(figure) if "data=" in label]
    assert drawn == [f"{m} data={d}" for m in NINE[:3] for d in ("easy", "hard")]
    assert "6 of 10 settings: those best on validation for each student and data set." in caption


def test_responses_and_maps_keep_the_best_methods(tmp_path: Path) -> None:
    names = [f"m{i:02}" for i in range(12)]
    configs = [
        config(name, 0, student__epochs=e, batch_size=b)
        for name in names
        for e in (2, 4)
        for b in (32, 64)
    ]
    val = [0.6 + 0.01 * (i // 4) + 0.001 * (i % 4) for i in range(48)]
    found = sweep(tmp_path, configs, val[::-1], val)
    figure, caption = figures.response(found, "student.epochs")
    assert set(legend(figure)) == set(names[4:])
    assert "8 of 12 methods: those best on validation. Left out: m03, m02, m01, m00." in caption
    figure, caption = figures.heat(found, "student.epochs", "batch_size")
    assert [axis.get_title() for axis in figure.axes if axis.get_title()][::2] == [
        "m11",
        "m10",
        "m09",
    ]
    assert "3 of 12 methods: those best on validation. Left out: m08," in caption


def test_a_response_names_the_methods_with_one_value(tmp_path: Path) -> None:
    """As pairs of values leave them; the best method may be one."""
    configs = [
        config("logits", 0, method__T=t, method__alpha=a) for t, a in ((1.0, 0.5), (4.0, 0.1))
    ]
    configs += [config("feature", 0, method__T=t) for t in (1.0, 2.0, 4.0)]
    figure, caption = figures.response(
        sweep(tmp_path, configs, [0.9, 0.99, 0.7, 0.71, 0.72]), "method.T"
    )
    assert set(legend(figure)) == {"feature"}
    reason = "only one value of T at the fixed values of the other keys"
    assert f"Not drawn: logits ({reason})." in caption


@pytest.mark.parametrize("case", ["large", "sparse"])
def test_a_heat_map_names_the_grids_without_one(case: str, tmp_path: Path) -> None:
    small = [
        config("feature", 0, method__T=t, method__alpha=a) for t in (1.0, 2.0) for a in (0.1, 0.2)
    ]
    if case == "large":
        others = [
            config("logits", 0, method__T=float(t), method__alpha=a)
            for t in range(1, 42)
            for a in (0.1, 0.2)
        ]
    else:
        others = [
            config("logits", 0, method__T=float(t), method__alpha=t / 10) for t in range(1, 8)
        ]
    found = sweep(tmp_path, [*small, *others], [*[0.7] * 4, *[0.9] * len(others)])
    _, caption = figures.heat(found, "method.T", "method.alpha")
    note = {
        "large": "No heat map for: logits (82 cells are too many).",
        "sparse": "No heat map for: logits (only 7 of 49 cells were run).",
    }[case]
    assert note in caption


def test_teachers_of_one_name_are_all_drawn(tmp_path: Path) -> None:
    """As on two data sets or after other epochs; the Pareto front is of one data set's students."""
    configs = [
        config("logits", 0, data__name=d, student__scale=k)
        for d in ("easy", "hard")
        for k in (4, 8)
    ]
    accuracies = (0.95, 0.95, 0.75, 0.75)
    teachers = [
        {"name": "cnn-8", "params": 800, "macs": 8000, "metrics": {"test_accuracy": a}}
        for a in accuracies
    ]
    figure, _ = figures.size(sweep(tmp_path, configs, [0.90, 0.92, 0.6, 0.7], teacher=teachers))
    stars = [line for line in figure.axes[2].lines if line.get_marker() == "*"]
    assert sorted(line.get_ydata()[0] for line in stars) == [75, 95]
    fronts = [
        list(line.get_ydata()) for line in figure.axes[2].lines if line.get_linestyle() == "--"
    ]
    assert sorted(fronts) == [[60, 70], [90, 92]]


def test_every_teacher_is_drawn(tmp_path: Path) -> None:
    scales = [4, 8, 16, 32, 64]
    teachers = [
        {"name": f"cnn-{k}", "params": k, "macs": k, "metrics": {"test_accuracy": 0.80 + 0.005 * i}}
        for i, k in enumerate(scales)
    ]
    configs = [config("logits", 0, teacher__scale=k) for k in scales]
    figure, _ = figures.accuracy(
        sweep(tmp_path, configs, [0.77, 0.78, 0.785, 0.79, 0.8], teacher=teachers)
    )
    ticks = [one for one in figure.axes[0].lines if one.get_marker() == "|"]
    assert [float(tick.get_xdata()[0]) for tick in ticks] == pytest.approx(
        [82.0, 81.5, 81.0, 80.5, 80.0]
    ), "best row first"


def test_looks_never_repeat() -> None:
    looks = figures.looks([str(i) for i in range(120)])
    assert len({(to_hex(look["color"]), look["marker"]) for look in looks.values()}) == 120
    triples = {
        (to_hex(k["color"]), k["marker"], str(k["ls"]))
        for k in figures.looks(list(map(str, range(900)))).values()
    }
    assert len(triples) == 900


def test_a_method_has_one_look_in_all_figures(tmp_path: Path) -> None:
    names = [f"m{i:02}" for i in range(14)]
    configs = [
        config(name, 0, student__scale=k, student__epochs=3) for name in names for k in (4, 8)
    ]
    val = [0.7 + 0.01 * (i // 2) + 0.001 * (i % 2) for i in range(28)]
    found = sweep(tmp_path, configs, val, val)
    drawn = [
        figures.response(found, "student.scale")[0],
        figures.size(found)[0],
        figures.accuracy(found)[0],
    ]
    looks: dict[str, set] = {}
    for name in names:
        for figure in drawn[:2]:
            if name in (entries := legend(figure)):
                looks.setdefault(name, set()).add(
                    (to_hex(entries[name].get_color()), entries[name].get_marker())
                )
    ticks = rows(drawn[2])
    for one in drawn[2].axes[0].lines:
        position = float(np.atleast_1d(one.get_ydata())[0])
        if one.get_markersize() == 8 and position in range(len(ticks)):
            looks[ticks[int(position)].split()[0]].add((to_hex(one.get_color()), one.get_marker()))
    assert all(len(look) == 1 for look in looks.values()), looks
    assert len({look for one in looks.values() for look in one}) == 14


# ---- validation first


GRID = [
    config("logits", s, method__T=t, method__alpha=a)
    for t in (1.0, 4.0)
    for a in (0.1, 0.5)
    for s in (0, 1)
]
GRID_TEST = [0.70, 0.72, 0.80, 0.82, 0.76, 0.78, 0.74, 0.76]
GRID_VAL = [0.77, 0.79, 0.71, 0.73, 0.69, 0.71, 0.75, 0.77]


def test_a_heat_map_shows_validation_first(tmp_path: Path) -> None:
    figure, caption = figures.heat(
        sweep(tmp_path, GRID, GRID_TEST, GRID_VAL), "method.T", "method.alpha"
    )
    meshes = [
        c
        for axis in figure.axes
        for c in axis.collections
        if isinstance(c, QuadMesh) and axis.get_xlabel()
    ]
    # T = 1 first
    assert np.asarray(meshes[0].get_array()).ravel() == pytest.approx([78, 72, 70, 76])
    assert np.asarray(meshes[1].get_array()).ravel() == pytest.approx([71, 81, 77, 75])
    assert meshes[0].get_clim() == meshes[1].get_clim(), "one scale of colours"
    titles = [axis.get_ylabel() for axis in figure.axes if "accuracy" in axis.get_ylabel()]
    assert titles == ["validation accuracy, %", "test accuracy, %"]
    frames = [(p.get_x(), p.get_y()) for axis in figure.axes[:2] for p in axis.patches]
    assert frames == [(0, 0), (0, 0)], "T=1, alpha=0.1 is best on validation, the worst on test"
    assert "Left: validation accuracy, used to choose settings. Right: test accuracy" in caption


def test_a_response_shows_validation_first(tmp_path: Path) -> None:
    figure, caption = figures.response(sweep(tmp_path, GRID, GRID_TEST, GRID_VAL), "method.T")
    look = legend(figure)["logits"]
    left, right = figure.axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("validation accuracy, %", "test accuracy, %")
    assert list(line(left, look).get_ydata()) == pytest.approx([78, 70])
    assert list(line(right, look).get_ydata()) == pytest.approx([71, 77])
    assert left.get_ylim() == right.get_ylim()
    assert "Fixed for logits: alpha = 0.1 (best on validation)." in caption
    assert "Left: validation accuracy, used to choose settings." in caption


def test_without_validation_only_test_is_shown_and_nothing_chosen(tmp_path: Path) -> None:
    """The best alpha on test is 0.5: it must not be what is held."""
    found = sweep(tmp_path, GRID, GRID_TEST, val=())
    figure, caption = figures.response(found, "method.T")
    assert [axis.get_ylabel() for axis in figure.axes] == ["test accuracy, %"]
    assert list(line(figure.axes[0], legend(figure)["logits"]).get_ydata()) == pytest.approx(
        [71, 77]
    )
    assert "There are no validation images: this is test accuracy" in caption
    assert "Fixed for logits: alpha = 0.1 (first in the sweep)." in caption
    figure, caption = figures.heat(found, "method.T", "method.alpha")
    assert [axis.get_ylabel() for axis in figure.axes if "accuracy" in axis.get_ylabel()] == [
        "test accuracy, %"
    ]
    assert "There are no validation images: this is test accuracy" in caption
    assert not figure.axes[0].patches


def test_a_scatter_shows_validation_first(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    configs = [
        config("logits", 0, method__T=float(t), method__alpha=float(a))
        for t, a in chance.random((30, 2))
    ]
    val = [float(0.7 + 0.1 * x) for x in chance.random(30)]
    figure, _ = figures.response(sweep(tmp_path, configs, [1 - v for v in val], val), "method.T")
    left, right = figure.axes
    ringed = [
        [y for p in axis.lines if p.get_markersize() == 11 for y in p.get_ydata()]
        for axis in (left, right)
    ]
    assert ringed[0] == pytest.approx([100 * max(val)])
    assert ringed[1] == pytest.approx([100 * (1 - max(val))]), (
        "the chosen one, not the best on test"
    )
    assert left.get_ylabel() == "validation accuracy, %"


def test_the_pareto_front_is_of_validation(tmp_path: Path) -> None:
    """The student of scale 8 is beaten by the smaller one on validation, though not on test."""
    configs = [config("standard", 0, student__scale=k) for k in (4, 8, 16)]
    found = sweep(tmp_path, configs, [0.70, 0.90, 0.80], [0.72, 0.71, 0.75])
    figure, caption = figures.size(found)
    fronts = [
        one
        for axis in figure.axes
        for one in axis.lines
        if one.get_ls() == "--" and len(one.get_xdata()) > 1
    ]
    assert [list(one.get_xdata()) for one in fronts] == [
        [400, 1600],
        [4000, 16000],
        [400, 1600],
        [4000, 16000],
    ]
    assert list(fronts[0].get_ydata()) == pytest.approx([72, 75])
    assert list(fronts[2].get_ydata()) == pytest.approx([70, 80])
    assert [axis.get_ylabel() for axis in figure.axes] == ["validation accuracy, %"] * 2 + [
        "test accuracy, %"
    ] * 2
    assert "students that no other of the same or smaller size beats on validation" in caption


def test_rows_that_validation_did_not_choose_are_hollow(tmp_path: Path) -> None:
    figure, caption = figures.accuracy(sweep(tmp_path, GRID, GRID_TEST, GRID_VAL))
    faces = {
        rows(figure)[int(one.get_ydata()[0])]: one.get_markerfacecolor()
        for one in figure.axes[0].lines
        if one.get_markersize() == 8
    }
    assert [name for name, face in faces.items() if face != "white"] == ["logits T=1 alpha=0.1"]
    assert "Hollow markers: settings that were not chosen on validation." in caption


# ---- axes and intervals


def test_intervals_stay_within_what_an_accuracy_can_be(tmp_path: Path) -> None:
    configs = [config("standard", s, student__scale=k) for k in (4, 8, 16) for s in (0, 1)]
    accuracies = [0.001, 0.013, 0.5, 0.51, 0.988, 1.0]
    found = sweep(tmp_path, configs, accuracies, accuracies)
    assert not found.summary["unstable"].any()
    ends = [bars(figures.accuracy(found)[0].axes[0])[:, 0]]
    ends += [bars(axis)[:, 1] for axis in figures.response(found, "student.scale")[0].axes]
    ends += [bars(axis)[:, 1] for axis in figures.size(found)[0].axes]
    for one in ends:
        assert 0 <= one.min() < 0.1, "the lowest mean is 0.7"
        assert 99.9 < one.max() <= 100, "the highest mean is 99.4"
    axis = figures.curves(found)[0].axes[1]
    bands = np.concatenate(
        [path.vertices[:, 1] for c in axis.collections for path in c.get_paths()]
    )
    assert bands.min() == pytest.approx(0)
    assert bands.max() == pytest.approx(100)


COLLAPSED = {
    "one": ([0.78, 0.785, 0.79, 0.795, 0.1, 0.80, 0.805, 0.81, 0.815], {"rkd"}),
    "two": ([0.78, 0.785, 0.79, 0.1, 0.1, 0.80, 0.805, 0.81, 0.815], {"hint", "rkd"}),
    "most": (
        [0.1, 0.1, 0.79, 0.1, 0.1, 0.80, 0.1, 0.1, 0.815],
        {"standard", "logits", "hint", "rkd", "dkd", "nkd"},
    ),
    "all but one": ([0.1, 0.101, 0.102, 0.099, 0.8, 0.1, 0.1, 0.1, 0.098], set(NINE) - {"rkd"}),
    "of a hundred classes": ([0.4, 0.41, 0.42, 0.43, 0.01, 0.44, 0.45, 0.43, 0.41], {"rkd"}),
    "of two classes": ([0.95, 0.951, 0.952, 0.949, 0.5, 0.95, 0.953, 0.951, 0.95], {"rkd"}),
    "a seed of one": ([0.78, 0.785, 0.79, 0.795, 0.57, 0.80, 0.805, 0.81, 0.815], {"rkd"}),
    "none": ([0.60, 0.62, 0.65, 0.58, 0.55, 0.68, 0.70, 0.72, 0.74], set()),
    "none, evenly": ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], set()),
    "all": ([0.1, 0.101, 0.102, 0.099, 0.1, 0.1, 0.1, 0.1, 0.098], set()),
    "all equal": ([0.8] * 9, set()),
    "all perfect": ([1.0] * 9, set()),
    "all wrong": ([0.0] * 9, set()),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", COLLAPSED)
@pytest.mark.parametrize("seeds", [1, 3])
def test_the_sound_rows_choose_the_axis(case: str, seeds: int, tmp_path: Path) -> None:
    means, collapsed = COLLAPSED[case]
    steps = [0.001 * step for step in (-1, 0, 1)][:seeds] if seeds > 1 else [0.0]
    accuracies = [min(1.0, max(0.0, mean + step)) for mean in means for step in steps]
    configs = [config(method, seed) for method in NINE for seed in range(seeds)]
    figure, caption = figures.accuracy(sweep(tmp_path, configs, accuracies))
    axis, names = figure.axes[0], rows(figure)
    low, high = axis.get_xlim()
    sound = [100 * mean for mean, name in zip(means, NINE, strict=True) if name not in collapsed]
    assert 0 <= low <= min(sound) <= max(sound) <= high <= 100
    assert high - low <= max(6.0, 4.5 * (max(sound) - min(sound)) + 6), (
        "no more than the sound rows need"
    )
    assert high - low >= 1, "differences of nothing are not blown up"
    for name in NINE:
        mean = 100 * means[NINE.index(name)]
        at = {
            float(np.atleast_1d(one.get_xdata())[0])
            for one in axis.lines
            if list(np.atleast_1d(one.get_ydata())) == [names.index(name)]
        }
        if name in collapsed:
            assert at == {low}, "drawn at the edge"
            written = [text.get_text() for text in axis.texts if text.xy[1] == names.index(name)]
            assert [text.split(" %")[0] for text in written] == [f"{mean:.2f}"]
            assert f"{name} ({mean:.2f} %)" in caption
        else:
            assert any(value == pytest.approx(mean, abs=0.11) for value in at)
    assert ("drawn at its edge" in caption) == bool(collapsed or "teacher" in caption)


def test_responses_maps_and_sizes_leave_collapsed_runs_aside(tmp_path: Path) -> None:
    configs = [
        config("standard", s, student__scale=k, student__epochs=e)
        for k in (4, 8, 16)
        for e in (2, 4)
        for s in (0, 1)
    ]
    accuracies = [0.80, 0.805, 0.81, 0.815, 0.82, 0.825, 0.83, 0.835, 0.1, 0.1, 0.1, 0.1]
    found = sweep(tmp_path, configs, accuracies, accuracies)
    figure, caption = figures.response(found, "student.scale")
    for axis in figure.axes:
        low, high = axis.get_ylim()
        assert 70 < low < 80.5 < high < 100
        assert [text.get_text() for text in axis.texts] == ["10.0"]
    figure, caption = figures.heat(found, "student.scale", "student.epochs")
    mesh = next(c for c in figure.axes[0].collections if isinstance(c, QuadMesh))
    assert mesh.get_clim()[0] > 70
    assert "Below the colour scale: 4 cells of standard." in caption


def test_a_collapsed_end_of_a_response_is_at_its_edge(tmp_path: Path) -> None:
    configs = [config("logits", s, method__T=t) for t in (1.0, 2.0, 4.0, 8.0) for s in (0, 1)]
    accuracies = [0.80, 0.805, 0.81, 0.815, 0.82, 0.825, 0.1, 0.1]
    figure, caption = figures.response(sweep(tmp_path, configs, accuracies, accuracies), "method.T")
    for axis in figure.axes:
        low, high = axis.get_ylim()
        assert 70 < low < 80.25 < 82.25 < high <= 100
        assert [(text.get_text(), text.xy) for text in axis.texts] == [("10.0", (8.0, low))]
    assert "drawn at its edge: logits at T = 8 (val 10.00 %, test 10.00 %)." in caption


def test_a_collapsed_student_does_not_choose_the_axis_of_sizes(tmp_path: Path) -> None:
    configs = [config("standard", 0, student__scale=k) for k in (2, 4, 8, 16, 32)]
    accuracies = [0.80, 0.81, 0.1, 0.82, 0.83]
    figure, caption = figures.size(sweep(tmp_path, configs, accuracies, accuracies))
    assert all(70 < axis.get_ylim()[0] < 80 for axis in figure.axes)
    assert "drawn at its edge: standard student.scale=8 (val 10.00 %, test 10.00 %)." in caption


def test_a_far_teacher_is_at_the_edge(tmp_path: Path) -> None:
    """The students' differences stay visible, and the teacher's value can be read."""
    found = nine(tmp_path, [0.300 + 0.001 * i for i in range(9)], spread=0.0001)
    figure, caption = figures.accuracy(found)
    low, high = figure.axes[0].get_xlim()
    assert low < 30 < 30.8 < high < 40
    assert "teacher cnn-8: 90.00 %" in legend(figure)
    assert "teacher cnn-8 (90.00 %)" in caption


def test_points_without_an_interval_have_none(tmp_path: Path) -> None:
    """One seed of T=4, two of the others: bars where there are two; the caption has both counts."""
    configs = [
        config("logits", s, method__T=t)
        for t, s in ((1.0, 0), (1.0, 1), (2.0, 0), (2.0, 1), (4.0, 0))
    ]
    accuracies = [0.80, 0.81, 0.81, 0.82, 0.83]
    figure, caption = figures.response(sweep(tmp_path, configs, accuracies, accuracies), "method.T")
    assert sorted(set(bars(figure.axes[0])[:, 0])) == [1.0, 2.0]
    assert "(n = 1 to 2)" in caption


def test_validation_that_some_runs_lack(tmp_path: Path) -> None:
    """Two sweeps in one report, one of them without validation images.

    Nothing is chosen, nothing is lost.
    """
    found = sweep(tmp_path, GRID, GRID_TEST, GRID_VAL)
    found.summary.loc[0, "val_accuracy"] = float("nan")
    found.summary["chosen"] = False
    figure, _ = figures.response(found, "method.T")
    assert [axis.get_ylabel() for axis in figure.axes] == [
        "validation accuracy, %",
        "test accuracy, %",
    ]
    assert len(rows(figures.accuracy(found)[0])) == 4
    for figure, caption in (figures.curves(found), figures.heat(found, "method.T", "method.alpha")):
        assert "chosen" not in caption
        figure.draw_without_rendering()


# ---- curves


def test_a_setting_without_a_history_is_named(tmp_path: Path) -> None:
    found = sweep(tmp_path, [config("standard", 0), config("logits", 0)], [0.7, 0.8])
    Path(found.runs["folder"][1], "history.csv").unlink()
    figure, caption = figures.curves(tables(tmp_path))
    assert "logits" not in legend(figure)
    assert "No history for: logits." in caption


def histories(folder: Path, found: Tables, columns: dict[str, Any], epochs: int) -> Tables:
    """Give each run of a sweep a history: {column: (method, epoch) -> value}."""
    for _, run in found.runs.iterrows():
        lines = [",".join(["epoch", *columns])]
        for epoch in range(1, epochs + 1):
            lines.append(
                ",".join(
                    [str(epoch), *(str(make(run["method"], epoch)) for make in columns.values())]
                )
            )
        Path(run["folder"], "history.csv").write_text("\n".join(lines) + "\n")
    return tables(folder)


def test_one_diverged_run_does_not_choose_the_axes_of_curves(tmp_path: Path) -> None:
    def loss(method: str, epoch: int) -> float:
        return 1e9 if method == "feature" and epoch > 100 else 2.0 * 0.99**epoch

    found = nine(tmp_path, [0.8, 0.81, 0.82, *[0.1] * 6])
    columns = {
        "hard": loss,
        "val_nll": loss,
        "val_accuracy": lambda m, e: 0.1 if m == "hint" else 0.7 + e / 4000,
    }
    figure, caption = figures.curves(histories(tmp_path, found, columns, 300))
    left, right = figure.axes
    assert left.get_yscale() == "log"
    assert left.get_ylim()[1] < 100
    assert left.get_ylim()[0] < 2.0 * 0.99**300 * 1.2
    assert "feature (training loss 1e+09, validation loss 1e+09)" in caption
    assert 60 < right.get_ylim()[0] < 70.1
    assert "hint (10.00 %)" in caption
    curve = line(left, legend(figure)["standard"])
    assert len(curve.get_xdata()) == 300
    assert curve.get_markevery() >= 20, "no marker on each of 300 epochs"


@pytest.mark.slow
@pytest.mark.parametrize("last", [0.0, 1e-12])
def test_a_loss_of_zero_is_drawn(last: float, tmp_path: Path) -> None:
    found = nine(tmp_path, [0.8] * 9)
    columns = {"hard": lambda m, e: last if e > 3 else 1.0 / e}
    left = figures.curves(histories(tmp_path, found, columns, 6))[0].axes[0]
    assert 0 < left.get_ylim()[0] < 1 / 3
    columns = {"hard": lambda m, e: 0.0}
    figure, caption = figures.curves(histories(tmp_path, found, columns, 6))
    figure.savefig(tmp_path / "figure.png")
    assert "All losses are 0." in caption


def test_unfinished_runs_are_not_in_the_means(tmp_path: Path) -> None:
    """A run that stopped half way would bend the mean where it stops."""
    made(tmp_path, [config("standard", s, student__epochs=4) for s in range(3)], [0.8, 0.8, None])
    for number, epochs in enumerate((4, 4, 2)):
        lines = [f"{e},{0.5 if number < 2 else 0.1}" for e in range(1, epochs + 1)]
        (tmp_path / "runs" / f"r{number}" / "history.csv").write_text(
            "\n".join(["epoch,val_accuracy", *lines]) + "\n"
        )
    figure, caption = figures.curves(tables(tmp_path))
    assert list(line(figure.axes[0], legend(figure)["standard"]).get_ydata()) == pytest.approx(
        [50] * 4
    )
    assert "1 unfinished run of these settings is left out." in caption


# ---- labels


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph")
def test_long_and_odd_names_fit(tmp_path: Path) -> None:
    long = ",".join(f"{{name: layer{i}, weight: 0.5, kind: hint}}" for i in range(5))
    configs = [config("logits", 0, method__parts=long + str(i)) for i in range(3)]
    odd = ["蒸留の方法" * 8, "$\\frac$", "_hidden", "a\x07b\nc", "b" * 300]
    configs += [config(name, 0) for name in odd]
    found = sweep(tmp_path, configs, [0.8 + 0.001 * i for i in range(8)])
    figure, _ = figures.accuracy(found)
    figure.draw_without_rendering()
    assert figure.axes[0].get_position().width * figure.get_size_inches()[0] > 2, (
        "inches that the axis keeps"
    )
    assert figure.get_size_inches()[0] < 12
    names = rows(figure)
    assert len(set(names)) == len(names) == 8, "shortened names stay distinct"
    assert max(map(len, names)) < 50
    assert found.runs["full_setting"].str.count("layer4").sum() == 3, "in full in the table"
    drawn, left = figures.draw(found, tmp_path / "figures")
    assert not [one for one in left if "drawing failed" in one.reason]
    for one in drawn:
        text = "".join(ET.parse(tmp_path / "figures" / f"{one.name}.svg").getroot().itertext())
        assert "\\frac" in text or one.name != "accuracy"
    figure, _ = figures.reliability(found)
    assert "_hidden" in [label.strip() for label in legend(figure)]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 20])
def test_any_number_of_methods_can_be_drawn(count: int, tmp_path: Path) -> None:
    """All figures, and one of them on paper: nothing may warn."""
    names = [f"method {i:02}" for i in range(count)]
    configs = [
        config(name, 0, student__scale=k, student__epochs=e)
        for name in names
        for k in (4, 8)
        for e in (2, 3)
    ]
    found = sweep(tmp_path, configs, [0.7 + 0.001 * (7 * i % 100) for i in range(len(configs))])
    keys = ("student.scale", "student.epochs")
    drawn = [
        figures.accuracy(found),
        figures.curves(found),
        figures.size(found),
        figures.reliability(found),
    ]
    drawn += [figures.response(found, key) for key in keys] + [figures.heat(found, *keys)]
    for figure, _ in drawn:
        width, height = figure.get_size_inches()
        assert 0.5 < width / height < 5
    drawn[2][0].draw_without_rendering()
    assert drawn[2][0].axes[0].get_position().height * drawn[2][0].get_size_inches()[1] > 2, (
        "beside its legend"
    )


@pytest.mark.slow
def test_four_hundred_settings_have_a_map(tmp_path: Path) -> None:
    configs = [
        config("logits", 0, method__T=float(t), method__alpha=a / 20)
        for t in range(1, 21)
        for a in range(20)
    ]
    val = [0.7 + 0.0001 * (i * 37 % 400) for i in range(400)]
    figure, _ = figures.heat(sweep(tmp_path, configs, val[::-1], val), "method.T", "method.alpha")
    meshes = [
        c
        for axis in figure.axes
        for c in axis.collections
        if isinstance(c, QuadMesh) and axis.get_xlabel()
    ]
    assert [np.asarray(mesh.get_array()).size for mesh in meshes] == [400, 400]
    assert np.asarray(meshes[0].get_array()).max() == pytest.approx(100 * max(val))


# ---- a search


@pytest.mark.slow
def test_every_search_of_a_report_is_drawn(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    from kd.runs.optuna_storage import open_storage

    found = sweep(tmp_path, [config("standard", 0)], [0.7])
    place = str(tmp_path / "search.journal")
    for name in ("one", "two"):
        study = optuna.create_study(storage=open_storage(place), study_name=name)
        for t in (0.1, 0.2, 0.3, 0.4):
            distributions = {"T": optuna.distributions.FloatDistribution(0, 1)}
            study.add_trial(
                optuna.create_trial(params={"T": t}, distributions=distributions, value=t)
            )
    studies = [({"study": name, "storage": place}, "") for name in ("one", "two")]
    drawn, left = figures.draw(
        found, tmp_path / "figures", [*studies, (None, "study.json is damaged")]
    )
    named = {one.name: one.title for one in drawn if one.name.startswith("search-history")}
    assert named == {
        "search-history-1": "Search history: one",
        "search-history-2": "Search history: two",
    }
    assert ("Search history: study 3", "study.json is damaged") in left


@pytest.mark.parametrize(("direction", "bad"), [("maximize", 0.1), ("minimize", 1e6)])
def test_a_failed_trial_does_not_choose_the_axis_of_a_search(
    direction: str, bad: float, tmp_path: Path
) -> None:
    optuna = pytest.importorskip("optuna")
    from kd.runs.optuna_storage import open_storage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    place = str(tmp_path / "search.journal")
    study = optuna.create_study(storage=open_storage(place), study_name="x", direction=direction)
    for number in range(20):
        value = bad if number in (7, 11) else 0.80 + 0.002 * number
        distribution = optuna.distributions.FloatDistribution(0, 1)
        study.add_trial(
            optuna.create_trial(
                params={"T": number / 20}, distributions={"T": distribution}, value=value
            )
        )
    figure, caption = figures.search({"study": "x", "storage": place}, "history")
    low, high = figure.axes[0].get_ylim()
    assert 0.7 < low < 0.80 < 0.838 < high < 0.95
    assert "drawn at its edge: 2 of 20 trials." in caption
