"""Batches of a data set that lives on the device, each sample carrying its index and its view."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kd.core.interleave import RunCache
from kd.data import augment as views
from kd.data.augment import Augment
from kd.data.batch import Batch


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Some samples of an image set. `images` and `labels` are whole files; `index` names the rows that belong."""

    images: Tensor  # uint8 [N, H, W, 3]
    labels: Tensor  # int64 [N]
    index: Tensor  # int64 [n]
    mean: Tensor  # float32 [3], of pixels in 0..1
    std: Tensor  # float32 [3]
    length: int | None = (
        None  # images an epoch, where these are too few: then each comes several times
    )

    def __len__(self) -> int:
        return len(self.index)

    @property
    def targets(self) -> Tensor:
        """The labels of this split's own samples, in the order of `plain`: int64 [n]."""
        return self.labels[self.index]

    def batches(self, batch_size: int) -> int:
        """Batches an epoch: only full ones. What is left over comes in other epochs, whose order differs."""
        return max(1, self.epoch_size // batch_size)

    @property
    def epoch_size(self) -> int:
        """Images in an epoch."""
        return self.length or len(self.index)

    def to(self, device: torch.device) -> "Split":
        parts = self.images, self.labels, self.index, self.mean, self.std
        images, labels, index, mean, std = (part.to(device) for part in parts)
        return Split(images, labels, index, mean, std, self.length)


def batches(
    data: Split,
    batch_size: int,
    seed: int,
    epoch: int,
    augment: Augment,
    views_each: int = 1,
    shared: RunCache | None = None,
    start: int = 0,
    mixed: bool = False,
) -> Iterator[Batch]:
    """The training batches of one epoch from the `start`th on: order and views are pure functions of (seed, epoch,
    sample index).

    With several views of each sample a batch has that many times as many rows: first all samples' first views.
    `mixed` images are blended with others', whose shares are the smaller ones.
    With `shared`, runs of the same data, seed and batch size that go in step see one and the same batch.
    """
    count = data.batches(batch_size)
    order, chosen = _augmented(data, seed, epoch, augment, views_each)

    def batch(step: int) -> Batch:
        now = slice(step * batch_size, (step + 1) * batch_size)
        index, view = order[now].repeat(views_each), chosen[:, now].flatten()
        x = views.normalise(
            views.apply_view(data.images, index, view, augment), data.mean, data.std
        )
        if mixed:
            each = [
                views.mixup_params(seed, epoch, order[now], data.index, augment, nth)
                for nth in range(views_each)
            ]
            other, seen, share = map(torch.cat, zip(*each, strict=True))
            y = views.normalise(
                views.apply_view(data.images, other, seen, augment), data.mean, data.std
            )
            x = x.lerp(y, share.view(-1, 1, 1, 1))
        return Batch(x, data.labels[index], index, view, epoch + step / count)

    same = data, batch_size, seed, epoch, augment, views_each, mixed
    for step in range(start, count):
        make = partial(batch, step)
        yield shared.get_or_create(f"step/batch/{seed}", (*same, step), make) if shared else make()


def _augmented(
    data: Split, seed: int, epoch: int, augment: Augment, views_each: int
) -> tuple[Tensor, Tensor]:
    """(samples in the epoch's order [n], their views [views_each, n]): as many rounds as its length takes, each with an
    order and views of its own, as an epoch of one round has."""
    rounds = -(-data.epoch_size // max(1, len(data)))
    orders, chosen = [], []
    for turn in range(epoch * rounds, (epoch + 1) * rounds):
        orders.append(order := data.index[views.epoch_permutation(seed, turn, data.index)])
        chosen.append(
            torch.stack(
                [views.sample_views(seed, turn, order, augment, nth) for nth in range(views_each)]
            )
        )
    return torch.cat(orders), torch.cat(chosen, dim=1)


def misalign_batch(
    batch: Batch, data: Split, seed: int, augment: Augment, views_each: int = 1
) -> Batch:
    """The batch in which every image is another one, in the view that this epoch has of it: a pure function as well.

    It is what scripts feed their teacher that keep its outputs in one shuffled order and read them in another.
    """
    epoch, each = int(batch.epoch), len(batch.index) // views_each
    other = data.index[views.misaligned_indices(seed, epoch, batch.index[:each], len(data.index))]
    view = torch.cat(
        [views.sample_views(seed, epoch, other, augment, nth) for nth in range(views_each)]
    )
    index = other.repeat(views_each)
    x = views.normalise(views.apply_view(data.images, index, view, augment), data.mean, data.std)
    return Batch(x, data.labels[index], index, view, batch.epoch)


def eval_batches(data: Split, batch_size: int = 500) -> Iterator[Tensor]:
    """The images of a split in its own order, normalised and not augmented, for evaluation: [B, 3, H, W]."""
    for index in data.index.split(batch_size):
        yield views.normalise(data.images[index], data.mean, data.std)
