"""Few labels: who gets them, what an epoch is, and that no other label reaches the student."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import images

from kd.data import keep_label_fraction
from kd.data.loader import batches
from kd.methods import Batch
from kd.methods.base import cross_entropy
from kd.models import ModelOutput


def test_the_given_labels_are_the_same_for_every_method(composed: Callable, tmp_path: Path) -> None:
    """A part of each class has labels, chosen by seed.

    Without a teacher the other images are not there; with one they have no label.
    """
    found = images(composed(), tmp_path)
    count = round(0.1 * len(found.train))
    alone, taught = (
        keep_label_fraction(found, 0.1, 5, unlabelled).train for unlabelled in (False, True)
    )
    assert len(alone) == count
    assert len(taught) == len(found.train)
    known = taught.index[taught.targets >= 0]
    assert torch.equal(known.sort().values, alone.index.sort().values)
    assert torch.equal(alone.targets, found.train.labels[alone.index])
    sizes = torch.bincount(alone.targets) / torch.bincount(found.train.targets)
    assert (sizes - 0.1).abs().max() < 0.01
    assert set(known.tolist()) != set(
        keep_label_fraction(found, 0.1, 6, False).train.index.tolist()
    )
    assert (found.train.targets >= 0).all()  # what it was made from is as it was
    assert keep_label_fraction(found, 0.1, 5, True).val is found.val


def test_an_epoch_goes_round_the_labelled_images_until_it_is_as_long(
    composed: Callable, tmp_path: Path
) -> None:
    """Each as often as any other, in other orders and views; as many steps as with all labels."""
    config = composed()
    found, augment = images(config, tmp_path), config.data.augment
    few = keep_label_fraction(found, 0.1, 0, unlabelled=False).train
    assert few.batches(64) == found.train.batches(64)
    seen = list(batches(few, 64, 0, 2, augment))
    assert len(seen) == few.batches(64)
    index, view = torch.cat([b.index for b in seen]), torch.cat([b.view for b in seen])
    n = len(few)
    times = torch.bincount(index, minlength=len(few.images))[few.index]
    assert times.max() - times.min() <= 1
    for turn in range(2):  # a round is a whole one
        assert torch.equal(index[turn * n : (turn + 1) * n].sort().values, few.index.sort().values)
    assert not torch.equal(index[:n], index[n : 2 * n])
    first, second = (
        dict(zip(index[i * n :][:n].tolist(), view[i * n :][:n].tolist(), strict=True))
        for i in (0, 1)
    )
    assert sum(first[i] == second[i] for i in first) < 0.1 * n
    after = next(iter(batches(few, 64, 0, 3, augment)))
    assert not any(torch.equal(after.index, b.index) for b in seen)


def test_an_image_without_a_label_counts_nothing_in_the_mean_of_the_hard_loss() -> None:
    torch.manual_seed(0)
    z, y = torch.randn(6, 4, requires_grad=True), torch.tensor([1, -1, 3, -1, -1, 0])

    def loss(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(Batch(z, y, y, y, 0.0), ModelOutput(z, {}))

    value = loss(z, y)
    known = y >= 0
    assert value.item() == pytest.approx(
        torch.nn.functional.cross_entropy(z[known], y[known], reduction="sum").item() / 6
    )
    value.backward()
    assert z.grad is not None
    assert (z.grad[y < 0] == 0).all()
    assert (z.grad[y >= 0] != 0).all()
    none = loss(z, torch.full((6,), -1))
    none.backward()
    assert none.item() == 0
    assert z.grad.isfinite().all()


def test_all_labels_are_a_run_of_the_name_it_had(composed: Callable) -> None:
    plain, few = composed("method=logits"), composed("method=logits", "student.label_fraction=0.5")
    assert (
        composed("method=logits", "student.label_fraction=1.0").identity()
        == plain.identity()
        != few.identity()
    )
    # The teacher has all labels.
    assert few.as_teacher().identity() == plain.as_teacher().identity()
    assert few.as_standard().student.label_fraction == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["logits", "standard", "function_matching", "feature"])
def test_runs_with_few_labels(method: str, kd: Callable) -> None:
    words = (
        f"method={method} student.label_fraction=0.1 student.epochs=2 teacher.epochs=1 "
        "student.scale=1 teacher.scale=2"
    )
    said = kd(*words.split(), "device=cpu", "tracker.mode=disabled", "data=digits")
    assert said.code == 0, said.err
    history = next(Path("runs").glob(f"{method}-cnn-1-s0*/history.csv")).read_text().splitlines()
    column = history[0].split(",").index("accuracy")
    assert 0 <= float(history[-1].split(",")[column]) <= 1
