"""The promises about training: alignment, equal starts, a frozen teacher.

The parts are trained, and the losses are finite.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, FP32, run
from helpers import images, network, trained_teacher
from torch import Tensor

from kd import methods
from kd.config.schema import Config
from kd.core.errors import DivergedError
from kd.core.rng import named_seed, seeded
from kd.data import Data, loader
from kd.data import augment as views
from kd.methods import Batch, Method, MethodContext, Terms
from kd.models import ModelOutput, Net
from kd.training import run as run_module
from kd.training.loop import Recipe, TrainingState, train
from kd.training.teacher import FrozenCheck, TeacherForward


@dataclass
class Seen:
    """What a method was given in each step."""

    batches: list[Batch] = field(default_factory=list)
    student_saw: list[Tensor] = field(default_factory=list)
    teacher_said: list[Tensor] = field(default_factory=list)


def one_epoch(
    config: Config, found: Data, teacher: Net | None, student: Net, method: Method, epochs: int = 1
) -> list:
    teach = TeacherForward(teacher, method.teacher_taps, FP32) if teacher else None
    state = TrainingState(student, method, config.optimizer)
    recipe = Recipe(epochs, 128, config.seed, config.data.augment, config.schedule)
    rows = train(state, teach, found.train, recipe, FP32)
    return [row for row in rows if row]


def watched(config: Config, found: Data, teacher: Net) -> Seen:
    """Distil for an epoch and keep what was seen."""
    seen = Seen()
    kind = methods.find("logits")

    class Watching(kind):
        def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
            seen.batches.append(batch)
            seen.teacher_said.append(teacher.logits.clone())
            return super().forward(batch, student, teacher)

    student = network(config.student)
    method = Watching(config.method, MethodContext(student.shapes(32), {}, 10, found.samples)).to(
        DEVICE
    )
    tapped = student.forward_taps
    student.forward_taps = lambda x, taps=(): (seen.student_saw.append(x), tapped(x, taps))[1]
    one_epoch(config, found, teacher, student, method)
    return seen


def aligned(config: Config, found: Data, teacher: Net, seen: Seen) -> None:
    """Assert that each teacher output is of exactly the view that the student saw.

    The view is that of exactly the image that (seed, epoch, index) names, found by slow, separate
    means. The output is compared with that of a copy of the teacher in eval mode.
    """
    frozen = copy.deepcopy(teacher).eval().cpu()
    pixels, labels = found.train.images.cpu().numpy(), found.train.labels.cpu()
    mean, std = found.train.mean.cpu().numpy(), found.train.std.cpu().numpy()
    for batch, student_saw, said in zip(
        seen.batches, seen.student_saw, seen.teacher_said, strict=True
    ):
        chosen = views.sample_views(config.seed, 0, batch.index, config.data.augment)
        rows = []
        for index, view in zip(batch.index.tolist(), chosen.tolist(), strict=True):
            dy, dx = divmod(view, 9)  # digits are not mirrored
            padded = np.pad(pixels[index], ((4, 4), (4, 4), (0, 0)))[dy : dy + 32, dx : dx + 32]
            rows.append(((padded / 255.0 - mean) / std).transpose(2, 0, 1))
        x = torch.tensor(np.stack(rows), dtype=torch.float32)
        torch.testing.assert_close(student_saw.cpu(), x, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(said.cpu(), frozen(x), rtol=1e-3, atol=1e-4)
        assert torch.equal(batch.y.cpu(), labels[batch.index.cpu()])


def test_teacher_outputs_belong_to_the_pixels_that_the_student_sees(
    composed: Callable, tmp_path: Path
) -> None:
    config = composed("method=logits")
    found, teacher = images(config, tmp_path), trained_teacher(config)
    aligned(config, found, teacher, watched(config, found, teacher))


@pytest.mark.slow
@pytest.mark.parametrize(
    "harm", ["shuffled", "another augmentation", "train mode", "another epoch's order"]
)
def test_the_alignment_test_can_fail(harm: str, composed: Callable, tmp_path: Path) -> None:
    """The same check must refuse a teacher that is fed, or answers, wrongly."""
    config = composed("method=logits")
    found, teacher = images(config, tmp_path), trained_teacher(config)
    honest = copy.deepcopy(teacher)
    first: list[Tensor] = []

    def tapped(x: Tensor, taps: Any = ()) -> ModelOutput:
        if harm == "shuffled":
            return ModelOutput(honest.forward_taps(x).logits.roll(1, 0), {})
        if harm == "another augmentation":
            return honest.forward_taps(x.roll(1, 3))
        if harm == "train mode":
            return honest.train().forward_taps(x)
        first.append(honest.forward_taps(x).logits)
        return ModelOutput(first[0], {})  # outputs cached by position, of other images

    teacher.forward_taps = tapped
    with pytest.raises(AssertionError):
        aligned(config, found, honest, watched(config, found, teacher))


@pytest.mark.slow
def test_a_method_may_see_several_views_of_each_sample(composed: Callable, tmp_path: Path) -> None:
    """The first is the one that all methods see; teacher and student see the same of each."""
    config = composed("method=logits")
    found, teacher, seen = images(config, tmp_path), trained_teacher(config), []
    kind = methods.find("logits")

    class TwoViews(kind):
        views = 2

        def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
            seen.append((batch, teacher.logits.clone()))
            return super().forward(batch, student, teacher)

    student = network(config.student)
    method = TwoViews(config.method, MethodContext(student.shapes(32), {}, 10, found.samples)).to(
        DEVICE
    )
    one_epoch(config, found, teacher, student, method)
    single = loader.batches(found.train, 128, config.seed, 0, config.data.augment)
    for one, (batch, said) in zip(single, seen, strict=True):
        (x, x2), (index, index2), (view, view2) = (
            t.chunk(2) for t in (batch.x, batch.index, batch.view)
        )
        assert torch.equal(x, one.x)
        assert torch.equal(index, index2)
        assert torch.equal(index, one.index)
        assert (view != view2).float().mean() > 0.9
        assert not torch.equal(x, x2)
        torch.testing.assert_close(said, teacher(batch.x), rtol=1e-4, atol=1e-5)


class StopError(Exception):
    """Raised to end a run once it has begun to train."""


def beginnings(config: Config, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Tensor], Batch]:
    """The student's weights before the first step, and the first batch, of a run of `config`."""
    kept: list[Any] = []

    def stop_at_first_batch(
        state: TrainingState, teach: Any, split: Any, recipe: Recipe, *rest: Any
    ) -> Iterator:
        kept.append({k: v.clone() for k, v in state.student.state_dict().items()})
        batches = loader.batches(split, recipe.batch_size, recipe.seed, 0, recipe.augment)
        kept.append(next(batches))
        raise StopError
        yield

    if config.needs_teacher:
        run(config.as_teacher())
    monkeypatch.setattr(run_module, "train", stop_at_first_batch)
    with pytest.raises(StopError):
        run(config)
    monkeypatch.undo()
    return kept[0], kept[1]


@pytest.mark.slow
def test_methods_under_one_seed_start_equal_and_see_equal_batches(
    composed: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And seed 0 is a seed like any other: the same again, and unlike seed 1."""
    found = {
        (method, seed): beginnings(composed(f"method={method}", f"seed={seed}"), monkeypatch)
        for method in ("standard", "logits", "feature")
        for seed in (0, 1)
    }
    for (_, seed), (weights, batch) in found.items():
        same_weights, same_batch = found["standard", seed]
        assert all(torch.equal(weights[k], same_weights[k]) for k in weights)
        assert torch.equal(batch.index, same_batch.index)
        assert torch.equal(batch.x, same_batch.x)
    (zero, first), (one, other) = found["standard", 0], found["standard", 1]
    assert not torch.equal(zero["stages.head.1.weight"], one["stages.head.1.weight"])
    assert not torch.equal(first.index, other.index)
    torch.manual_seed(12345)  # what was drawn before must not matter
    again, batch = beginnings(composed("method=standard", "seed=0", "rerun=true"), monkeypatch)
    assert all(torch.equal(again[k], zero[k]) for k in zero)
    assert torch.equal(batch.x, first.x)


def test_streams_have_names() -> None:
    assert len({named_seed(s, n) for s in (0, 1, 2) for n in ("student", "method", "order")}) == 9
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with seeded(0, "student"):
        torch.rand(5)
    assert torch.equal(torch.rand(2), expected)


def distilled(
    config: Config, tmp_path: Path, teacher: Net | None, epochs: int = 1
) -> tuple[Net, Method, list]:
    found = images(config, tmp_path)
    student = network(config.student)
    shapes = student.shapes(32), teacher.shapes(32) if teacher else {}
    with seeded(0, "method"):
        method = config.method_class(config.method, MethodContext(*shapes, 10, found.samples)).to(
            DEVICE
        )
    return student, method, one_epoch(config, found, teacher, student, method, epochs)


@pytest.mark.parametrize("name", ["logits", "feature"])
def test_the_teacher_stays_what_it_was(name: str, composed: Callable, tmp_path: Path) -> None:
    config = composed(f"method={name}")
    teacher = trained_teacher(config)
    before, guard = copy.deepcopy(teacher.state_dict()), FrozenCheck(teacher)
    distilled(config, tmp_path, teacher)
    guard.check()
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda t: t.train(), "left in train mode"),
        (lambda t: t.requires_grad_(True), "received gradients"),
        (lambda t: t.stages["conv1"][1].running_mean.add_(1e-3), "weights or buffers changed"),
        (lambda t: t.stages["head"][1].weight.data.mul_(1.001), "weights or buffers changed"),
    ],
    ids=["mode", "gradients", "buffer", "weight"],
)
def test_the_guard_sees_a_changed_teacher(harm: Callable, message: str, composed: Callable) -> None:
    teacher = trained_teacher(composed("method=logits"))
    guard = FrozenCheck(teacher)
    harm(teacher)
    with pytest.raises(RuntimeError, match=message):
        guard.check()


def test_a_methods_own_parts_are_trained_and_are_not_the_students(
    composed: Callable, tmp_path: Path
) -> None:
    config = composed("method=feature")
    teacher = trained_teacher(config)
    with seeded(0, "method"):
        shapes = network(config.student).shapes(32), teacher.shapes(32)
        fresh = config.method_class(config.method, MethodContext(*shapes, 10, 9)).to(DEVICE)
    student, method, _ = distilled(config, tmp_path, teacher)
    for key, value in method.state_dict().items():
        assert not torch.equal(value, fresh.state_dict()[key]), f"{key} was not trained"
    assert list(student.state_dict()) == list(network(config.student).state_dict())


def test_the_student_trains_in_train_mode_in_every_epoch(
    composed: Callable, tmp_path: Path
) -> None:
    config = composed("method=standard")
    found, student = images(config, tmp_path), network(config.student)
    modes = []
    method = config.method_class(
        config.method, MethodContext(student.shapes(32), {}, 10, found.samples)
    )
    student.stages["head"].register_forward_pre_hook(
        lambda module, _: modes.append(module.training)
    )
    state = TrainingState(student, method, config.optimizer)
    recipe = Recipe(2, 256, 0, config.data.augment, config.schedule)
    for row in train(state, None, found.train, recipe, FP32):
        if row:
            student.eval()  # as validation does
    assert modes
    assert all(modes)


def test_a_loss_that_is_not_finite_ends_the_run_and_names_its_term(
    composed: Callable, tmp_path: Path
) -> None:
    config = composed("method=standard", "optimizer.lr=1e30")
    with pytest.raises(
        DivergedError, match=r"epoch 1, step [2-9]: the loss term 'hard' is (nan|inf)"
    ):
        distilled(config, tmp_path, None, epochs=2)


def test_weights_that_are_not_finite_after_the_last_step_end_the_run(composed: Callable) -> None:
    config = composed("method=standard")
    student = network(config.student)
    state = TrainingState(
        student,
        config.method_class(config.method, MethodContext({}, {}, 10, 9)),
        config.optimizer,
    )
    state.step_metrics = {"loss": [torch.tensor(1.0), torch.tensor(3.0)]}
    assert state.means() == {"loss": 2.0}
    with torch.no_grad():
        next(student.parameters())[0] = torch.inf
    with pytest.raises(
        DivergedError, match="epoch 1, step 0: the student's weights are not finite"
    ):
        state.means()


def test_rows_hold_every_term_and_their_weighted_sum(composed: Callable, tmp_path: Path) -> None:
    config = composed("method=feature", "method.alpha=0.2", "method.beta=0.3")
    rows = distilled(config, tmp_path, trained_teacher(config), epochs=2)[2]
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert row["loss"] == pytest.approx(
            0.2 * row["hard"] + 0.3 * row["feature"] + 0.5 * row["soft"], rel=1e-5
        )
