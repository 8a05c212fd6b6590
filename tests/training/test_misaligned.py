"""The misalignment bug as an experiment: chosen by name and deterministic.

It is marked wherever its numbers are shown.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FP32, ON_CPU, run
from helpers import config as reported
from helpers import images, made, tables, trained_teacher

from kd.config.schema import run_dir
from kd.core.interleave import RunCache, run_interleaved
from kd.data.loader import batches, misalign_batch
from kd.report import build
from kd.training.run import TrainingRun
from kd.training.teacher import TeacherForward
from kd.training.teacher_cache import TeacherCache, TeacherCacheSpec


def test_every_image_is_another_of_the_same_epoch(composed: Callable, tmp_path: Path) -> None:
    """The other image is a pure function of (seed, epoch, sample).

    It is shown in the view that the epoch has of it.
    """
    config = composed("method=mlkd")
    found, augment = images(config, tmp_path), config.data.augment
    whole = next(iter(batches(found.train, len(found.train), 0, 3, augment, 2)))
    place = {int(index): row for row, index in enumerate(whole.index[: len(found.train)])}
    for step, batch in enumerate(batches(found.train, 100, 0, 3, augment, 2)):
        other = misalign_batch(batch, found.train, 0, augment, 2)
        same = (other.index == batch.index).float().mean()
        assert same < 0.05
        assert (other.y == batch.y).float().mean() < 0.3
        assert torch.equal(other.index[:100], other.index[100:])
        rows = torch.tensor([place[int(index)] for index in other.index[:100]])
        assert torch.equal(other.x[:100], whole.x[rows])
        assert torch.equal(other.x[100:], whole.x[rows + len(found.train)])
        assert torch.equal(other.y, found.train.labels[other.index])
        if step == 0:
            again = misalign_batch(batch, found.train, 0, augment, 2)
            assert torch.equal(again.x, other.x)
            assert not torch.equal(
                misalign_batch(batch, found.train, 1, augment, 2).index, other.index
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    "gigabytes", [1.0, 0.0002, 0.0], ids=["finite", "an epoch a table", "not kept"]
)
def test_the_tables_of_outputs_stay_right(
    gigabytes: float, composed: Callable, tmp_path: Path
) -> None:
    """A misaligned run reads and completes the tables of other runs, and leaves them right."""
    config = composed("method=logits")
    found, live, augment = (
        images(config, tmp_path),
        TeacherForward(trained_teacher(config), [], FP32),
        config.data.augment,
    )
    place = TeacherCacheSpec(tmp_path / "outputs", gigabytes, False, not ON_CPU)
    for _ in range(2):
        teach = TeacherCache(live, found.train, augment, 0, 1, place)
        for batch in batches(found.train, 128, 0, 0, augment):
            other = misalign_batch(batch, found.train, 0, augment)
            told = teach(other).logits
            assert torch.allclose(told, live(other).logits, rtol=1e-3, atol=1e-3)
            assert (told - live(batch).logits).abs().max() > 0.01
            assert torch.allclose(teach(batch).logits, live(batch).logits, rtol=1e-3, atol=1e-3)


def test_it_is_asked_for_by_name_and_has_a_name_of_its_own(composed: Callable) -> None:
    plain, wrong = (
        composed("method=logits"),
        composed("method=logits", "teacher.outputs=misaligned"),
    )
    assert wrong.run_name().startswith("logits-misaligned-")
    assert wrong.identity() != plain.identity()
    assert wrong.as_teacher().identity() == plain.as_teacher().identity()
    taught_by_none = (
        composed("method=standard"),
        composed("method=standard", "teacher.outputs=misaligned"),
    )
    assert len({config.run_name() for config in taught_by_none}) == 1


@pytest.mark.slow
def test_a_misaligned_run_trains_to_other_numbers_and_says_so(kd: Callable) -> None:
    words = (
        "data=digits method=logits student.epochs=4 teacher.epochs=6 student.scale=4 "
        "tracker.mode=disabled"
    )
    right, wrong = kd(*words.split()), kd(*words.split(), "teacher.outputs=misaligned")
    assert (right.code, wrong.code) == (0, 0), wrong.err
    assert (
        "taught, on purpose, with the teacher's outputs for another image" in wrong.out + wrong.err
    )
    assert "on purpose" not in right.out + right.err
    found = {
        path.parent.name.split("-cnn")[0]: path for path in Path("runs").glob("logits*/result.json")
    }
    assert set(found) == {"logits", "logits-misaligned"}
    said = tables(Path("runs")).runs.set_index("method")["test_accuracy"]
    assert said["logits MISALIGNED"] < said["logits"] - 0.1


@pytest.mark.slow
def test_packed_with_others_it_is_what_it_is_alone(composed: Callable, tmp_path: Path) -> None:
    """Runs of one seed share batches and teacher outputs.

    Runs that see others' outputs, or have few labels, do not.
    """
    words = ["teacher.outputs=aligned", "teacher.outputs=misaligned", "student.label_fraction=0.2"]
    apart, packed = (
        [composed("method=logits", word, f"paths.runs={tmp_path / place}") for word in words]
        for place in ("apart", "packed")
    )
    for config in apart:
        run(config)
    shared = RunCache()
    ends = run_interleaved(
        [TrainingRun(config, cache=shared, packed=len(packed)).steps() for config in packed]
    )
    assert all(isinstance(end, dict) for end in ends), ends
    seen = set()
    for alone, other in zip(apart, packed, strict=True):
        weights = [
            (run_dir(config) / "student.safetensors").read_bytes() for config in (alone, other)
        ]
        assert weights[0] == weights[1], other.run_name()
        seen.add(weights[0])
    assert len(seen) == len(words)


@pytest.mark.slow
def test_it_is_marked_in_every_table(tmp_path: Path) -> None:
    """It is a method of its own in tables and figures.

    It is no setting of `logits`, and no rival of it on validation.
    """
    configs = [reported("standard", seed) for seed in (0, 1)] + [
        reported("logits", seed) for seed in (0, 1)
    ]
    configs += [reported("logits", seed) for seed in (0, 1)]
    for config in configs:
        config.setdefault("teacher", {})["outputs"] = "aligned"
    for config in configs[-2:]:
        config["teacher"] = {**config["teacher"], "outputs": "misaligned"}
    made(tmp_path, configs, [0.8, 0.81, 0.85, 0.86, 0.6, 0.61])
    found = tables(tmp_path)
    assert list(found.summary["setting"]) == ["logits", "standard", "logits MISALIGNED"]
    assert list(found.summary["method"]) == ["logits", "standard", "logits MISALIGNED"]
    assert found.summary["chosen"].all()
    assert "teacher.outputs" not in found.swept
    said = build.write([tmp_path], tmp_path).text
    assert "logits MISALIGNED" in said
    assert "note: MISALIGNED rows: the students were trained, on purpose," in said
    page = (tmp_path / "index.html").read_text()
    assert "logits MISALIGNED" in page
    assert "on purpose" in page
