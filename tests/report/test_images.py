"""Comparisons of runs image by image, and the file they are computed from."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from statsmodels.stats import contingency_tables

from kd.report import images
from kd.report.images import Outputs
from kd.runs.directory import TEST_OUTPUTS

NAMES = ("cat", "dog", "frog")
LABELS = np.array([0, 0, 0, 0, 1, 1, 2, 2], dtype=np.int32)
PREDICTIONS = np.array([0, 0, 1, 1, 1, 2, 2, 2], dtype=np.int32)


def outputs(predictions: Any = PREDICTIONS, labels: Any = LABELS, names: Any = NAMES) -> Outputs:
    return Outputs(np.asarray(labels, np.int32), np.asarray(predictions, np.int32), None, names)


def contents(**changes: Any) -> dict[str, Any]:
    """The tensors of a valid file; None removes one."""
    tensors = {
        "labels": LABELS,
        "predictions": PREDICTIONS,
        "logits": np.eye(3, dtype=np.float16)[PREDICTIONS],
    }
    return {name: value for name, value in (tensors | changes).items() if value is not None}


def write(folder: Path, classes: Any = NAMES, **changes: Any) -> None:
    metadata = {"classes": classes if isinstance(classes, str) else json.dumps(classes)}
    save_file(contents(**changes), folder / TEST_OUTPUTS, metadata)


# ---- the file


def test_outputs_are_read(tmp_path: Path) -> None:
    assert images.load_outputs(tmp_path) == (None, "")
    assert images.load_outputs(tmp_path / "no folder") == (None, "")
    write(tmp_path)
    loaded, problem = images.load_outputs(tmp_path)
    assert loaded is not None
    assert loaded.logits is not None
    assert problem == ""
    for name, array in contents().items():
        np.testing.assert_array_equal(getattr(loaded, name), array)
        assert getattr(loaded, name).dtype == array.dtype
    assert loaded.classes == NAMES
    write(tmp_path, logits=None)
    loaded, problem = images.load_outputs(tmp_path)
    assert loaded is not None
    assert (loaded.logits, problem) == (None, "")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"labels": None}, "labels should have the shape"),
        ({"predictions": None}, "predictions should be I32 [8], got absent"),
        ({"labels": LABELS.astype(np.int64)}, "labels should be I32 [8], got I64 [8]"),
        ({"labels": LABELS.astype(np.float32)}, "labels should be I32 [8], got F32 [8]"),
        ({"labels": LABELS.reshape(2, 4)}, "labels should have the shape"),
        ({"labels": np.array(1, np.int32)}, "labels should have the shape"),
        ({"predictions": PREDICTIONS[:7]}, "predictions should be I32 [8], got I32 [7]"),
        ({"labels": LABELS[:0], "predictions": LABELS[:0]}, "labels should have the shape"),
        ({"labels": LABELS + 1}, "labels should be 0 to 2"),
        ({"predictions": PREDICTIONS - 1}, "predictions should be 0 to 2"),
        ({"predictions": np.full(8, 2**31 - 1, np.int32)}, "predictions should be 0 to 2"),
        ({"logits": np.zeros((8, 3), np.float32)}, "logits should be F16 [8, 3], got F32"),
        ({"logits": np.zeros((8, 2), np.float16)}, "logits should be F16 [8, 3], got F16 [8, 2]"),
        ({"logits": np.full((8, 3), np.nan, np.float16)}, "logits should be finite"),
        ({"other": LABELS}, "other should be absent, got I32 [8]"),
        ({"classes": ["cat", "dog"]}, "logits should be F16 [8, 2]"),
        ({"classes": ["cat", "dog"], "logits": None}, "labels should be 0 to 1"),
        ({"classes": []}, "the metadata should list"),
        ({"classes": [1, 2, 3]}, "the metadata should list"),
        ({"classes": {"a": 1}}, "the metadata should list"),
        ({"classes": "null"}, "the metadata should list"),
        ({"classes": "["}, ""),
        ({"classes": "[" * 100_000}, ""),
    ],
)
def test_a_file_with_other_contents_is_refused(
    changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    write(tmp_path, **changes)
    loaded, problem = images.load_outputs(tmp_path)
    assert loaded is None
    assert problem.startswith(f"{TEST_OUTPUTS} is damaged: {expected}")
    assert "\n" not in problem


def test_a_file_without_metadata_is_refused(tmp_path: Path) -> None:
    save_file(contents(), tmp_path / TEST_OUTPUTS)
    loaded, problem = images.load_outputs(tmp_path)
    assert (loaded, "the metadata should list" in problem) == (None, True)


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(10**10)


@pytest.mark.parametrize(
    ("create", "expected"),
    [
        (Path.mkdir, "it is not a regular file"),
        (os.mkfifo, "it is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is not a regular file"),
        (lambda path: path.symlink_to(path), ""),
        (sparse, "it is larger than 1000 MB"),
        (Path.touch, ""),
        (lambda path: path.write_bytes(b"\xff" * 8), ""),
        (lambda path: path.write_bytes(b"\xff" * 100), ""),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), ""),
        (lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]"), ""),
        (lambda path: path.write_bytes((2).to_bytes(8, "little") + b"{}"), ""),
    ],
)
def test_what_is_no_such_file_is_refused(
    create: Callable[[Path], Any], expected: str, tmp_path: Path
) -> None:
    create(tmp_path / TEST_OUTPUTS)
    loaded, problem = images.load_outputs(tmp_path)
    assert loaded is None
    assert problem.startswith(f"{TEST_OUTPUTS} is damaged: {expected}")


def test_a_file_with_any_damaged_bytes_never_ends_a_report(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / TEST_OUTPUTS
    intact = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(intact[: generator.integers(1, len(intact) + 1)])
        for position in generator.integers(0, len(damaged), 3):
            damaged[position] = generator.integers(256)
        path.write_bytes(damaged)
        loaded, problem = images.load_outputs(tmp_path)
        assert (loaded is None) == bool(problem)


def test_names_that_are_not_unicode_can_be_written(tmp_path: Path) -> None:
    write(tmp_path, classes=["caf\udce9", "漢字", "c"])
    loaded, _ = images.load_outputs(tmp_path)
    assert loaded is not None
    assert loaded.classes == ("caf\\udce9", "漢字", "c")


def test_images_need_no_torch() -> None:
    code = "import sys, kd.report.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- accuracy over images


def test_correctness() -> None:
    expected = [True, True, False, False, True, False, True, True]
    assert images.correctness(outputs()).tolist() == expected
    rows = images.correctness_of_runs([outputs(), outputs(LABELS)])
    assert rows.tolist() == [expected, [True] * 8]


def test_the_interval_of_one_run_is_that_of_a_proportion() -> None:
    correct = np.arange(1000)[None] < 900
    expected = 1.96 * np.sqrt(0.9 * 0.1 / 999)
    assert images.image_interval(correct) == pytest.approx(expected)
    assert images.image_interval(np.repeat(correct, 5, axis=0)) == pytest.approx(expected)


def test_the_interval_of_two_runs() -> None:
    correct = np.array([[1, 1, 0, 0], [1, 0, 1, 0]], dtype=bool)  # means 1, 1/2, 1/2, 0
    assert images.image_interval(correct) == pytest.approx(
        3 / 4
    )  # 1.96 * sqrt(0.5 / 3) / 2 < 3 / 4
    many = np.tile(correct, 100)
    assert images.image_interval(many) == pytest.approx(1.96 * np.sqrt(50 / 399) / 20)


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize(("n", "expected"), [(1000, 0.003), (10, 0.3), (2, 1.0), (1, 1.0)])
def test_the_interval_without_spread_is_the_rule_of_three(
    value: bool, n: int, expected: float
) -> None:
    correct = np.full((3, n), value)
    assert images.image_interval(correct) == pytest.approx(expected)
    difference = images.image_difference(correct, correct[:2])
    assert difference == pytest.approx((0, expected))


def test_one_error_does_not_narrow_the_interval() -> None:
    correct = np.ones((5, 1000), dtype=bool)
    widths = [images.image_interval(correct)]
    for run in range(5):
        correct[run, 7] = False
        widths.append(images.image_interval(correct))
    assert widths == sorted(widths)


def test_the_interval_covers_the_accuracy_on_new_images() -> None:
    """The probability of being classified correctly differs between images, as does their set."""
    generator = np.random.default_rng(0)
    truth, covered, trials = 4 / 5, 0, 4000
    for _ in range(trials):
        difficulty = generator.beta(0.8, 0.2, size=300)
        correct = generator.random((4, 300)) < difficulty
        covered += abs(correct.mean() - truth) <= images.image_interval(correct)
    assert 0.94 <= covered / trials <= 0.96


def test_the_interval_of_a_difference_covers_it() -> None:
    generator = np.random.default_rng(1)
    covered, trials = 0, 4000
    for _ in range(trials):
        difficulty = generator.beta(0.8, 0.2, size=300)
        a = generator.random((3, 300)) < difficulty
        b = generator.random((2, 300)) < 0.95 * difficulty
        difference, half_width = images.image_difference(a, b)
        covered += abs(difference - 0.05 * 4 / 5) <= half_width
    assert 0.94 <= covered / trials <= 0.96


def test_a_difference_is_paired_by_image() -> None:
    generator = np.random.default_rng(2)
    a = generator.random((2, 500)) < 0.9
    b = a & (generator.random(500) < 0.98)
    difference, half_width = images.image_difference(a, b)
    values = a.mean(axis=0) - b.mean(axis=0)
    assert difference == pytest.approx(a.mean() - b.mean())
    assert half_width == pytest.approx(1.96 * np.std(values, ddof=1) / np.sqrt(500))
    assert half_width < images.image_interval(a)
    mirrored = images.image_difference(b, a)
    assert mirrored == pytest.approx((-difference, half_width))
    with pytest.raises(ValueError, match="the numbers of images differ: 500 and 499"):
        images.image_difference(a, b[:, 1:])


def test_only_runs_on_the_same_images_are_compared() -> None:
    a, b = outputs(), outputs(LABELS)
    assert images.compare_outputs([a, a], [b]) == images.image_difference(
        images.correctness_of_runs([a, a]), images.correctness_of_runs([b])
    )
    assert images.compare_outputs([b], [a])[0] == pytest.approx(3 / 8)
    shuffled = outputs(labels=LABELS[::-1])
    fewer = outputs(PREDICTIONS[:7], LABELS[:7])
    renamed = outputs(names=("cat", "dog", "toad"))
    for other, problem in ((shuffled, "images"), (fewer, "images"), (renamed, "classes")):
        for compare in (
            lambda other: images.compare_outputs([a], [other]),
            lambda other: images.compare_outputs([a, other], [b]),
            lambda other: images.correctness_of_runs([a, other]),
            lambda other: images.confusions([a, other]),
        ):
            with pytest.raises(ValueError, match=f"tested on different {problem}"):
                compare(other)
    for one, another in (([], [a]), ([a], [])):
        with pytest.raises(ValueError, match="no outputs"):
            images.compare_outputs(one, another)


@pytest.mark.parametrize("seed", range(20))
def test_mcnemar_is_that_of_statsmodels(seed: int) -> None:
    generator = np.random.default_rng(seed)
    a, b = generator.random((2, 10 * (seed + 1))) < np.array([[0.8], [0.6]])
    table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
    expected = contingency_tables.mcnemar(table, exact=True).pvalue
    found = images.mcnemar(a, b)
    assert (found.only_a, found.only_b) == (table[0][1], table[1][0])
    assert found.p == pytest.approx(expected)
    assert images.mcnemar(b, a).p == pytest.approx(expected)


def test_mcnemar_by_hand() -> None:
    a, b = np.array([1, 1, 1, 1, 1, 1, 0], bool), np.array([0, 0, 0, 0, 0, 1, 0], bool)
    assert images.mcnemar(a, b) == (5, 0, pytest.approx(2 / 2**5))
    assert images.mcnemar(a, a) == (0, 0, 1.0)
    with pytest.raises(ValueError, match="the numbers of images differ"):
        images.mcnemar(a, b[1:])


# ---- classes


def test_accuracy_per_class() -> None:
    table = images.per_class(LABELS, np.full(8, 0.5) + 0.5 * (LABELS == 2), (*NAMES, "none"))
    assert table["class"].tolist() == [*NAMES, "none"]
    assert table["images"].tolist() == [4, 2, 2, 0]
    np.testing.assert_array_equal(table["accuracy"], [0.5, 0.5, 1.0, np.nan])


def test_confusions() -> None:
    second = outputs([0, 0, 0, 1, 2, 2, 2, 2])
    table = images.confusions([outputs(), second])
    assert table.to_dict("split")["data"] == [
        ["dog", "frog", pytest.approx(3 / 4)],  # 1 and 2 of 2
        ["cat", "dog", pytest.approx(3 / 8)],  # 2 and 1 of 4
    ]
    assert images.confusions([outputs(), second], top=1)["true"].tolist() == ["dog"]
    perfect = images.confusions([outputs(LABELS)])
    assert perfect.empty
    assert list(perfect) == ["true", "predicted", "share"]


def test_confusions_agree_with_accuracy_per_class() -> None:
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 100, 2000)
    names = tuple(map(str, range(100)))
    runs = [
        outputs(np.where(generator.random(2000) < 0.5, labels, generator.integers(0, 100, 2000)),
                labels, names)
        for _ in range(3)
    ]  # fmt: skip
    errors = images.confusions(runs, top=10_000).groupby("true")["share"].sum()
    accuracy = images.per_class(labels, images.correctness_of_runs(runs).mean(axis=0), names)
    expected = 1 - accuracy.set_index("class")["accuracy"]
    np.testing.assert_allclose(errors.reindex(expected.index).fillna(0), expected)
    assert images.confusions(runs, top=50)["share"].is_monotonic_decreasing
