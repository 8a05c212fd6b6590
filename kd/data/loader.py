"""Batches of a data set that is held on the device. Each sample carries its index and its view."""

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
    """Some of the samples of an image set. `images` and `labels` hold the full set."""

    images: Tensor  # uint8 [N, H, W, 3]
    labels: Tensor  # int64 [N]
    index: Tensor  # int64 [n], the rows that belong to this split
    mean: Tensor  # float32 [3], for pixels in 0..1
    std: Tensor  # float32 [3], for pixels in 0..1
    # images per epoch, if that is more than the split has: then each is repeated
    length: int | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def targets(self) -> Tensor:
        """Return the labels of this split, in the order of `eval_batches`: int64 [n]."""
        return self.labels[self.index]

    def batches(self, batch_size: int) -> int:
        """Return the number of batches per epoch.

        Only full batches count. Each epoch has another order, so it leaves out other samples.
        """
        return max(1, self.epoch_size // batch_size)

    @property
    def epoch_size(self) -> int:
        """Return the number of images per epoch."""
        return self.length or len(self.index)

    def to(self, device: torch.device) -> "Split":
        """Return this split with its tensors on `device`."""
        return Split(
            self.images.to(device),
            self.labels.to(device),
            self.index.to(device),
            self.mean.to(device),
            self.std.to(device),
            self.length,
        )


def batches(
    split: Split,
    batch_size: int,
    seed: int,
    epoch: int,
    augment: Augment,
    views_each: int = 1,
    shared: RunCache | None = None,
    start: int = 0,
    mixed: bool = False,
) -> Iterator[Batch]:
    """Yield the training batches of one epoch.

    Order and views are pure functions of (seed, epoch, sample index).

    Args:
        split: The training images.
        batch_size: Samples per batch.
        seed: The seed of the run.
        epoch: The epoch, from 0.
        augment: The augmentation.
        views_each: Views per sample. A batch has `batch_size * views_each` rows: first the first
            view of all samples, then the second, and so on.
        shared: Lets interleaved runs with equal data, seed and batch size share each batch.
        start: The number of batches to skip.
        mixed: Whether to blend each image with another one, whose weight is the smaller.

    Yields:
        The batches from the `start`th on.
    """
    count = split.batches(batch_size)
    order, order_views = _order_and_views(split, seed, epoch, augment, views_each)

    def make_batch(step: int) -> Batch:
        chunk = slice(step * batch_size, (step + 1) * batch_size)
        index = order[chunk].repeat(views_each)
        view = order_views[:, chunk].flatten()
        pixels = views.apply_view(split.images, index, view, augment)
        x = views.normalise(pixels, split.mean, split.std)
        if mixed:
            draws = [
                views.mixup_params(seed, epoch, order[chunk], split.index, augment, nth)
                for nth in range(views_each)
            ]
            partner, partner_view, weight = map(torch.cat, zip(*draws, strict=True))
            partner_pixels = views.apply_view(split.images, partner, partner_view, augment)
            partner_x = views.normalise(partner_pixels, split.mean, split.std)
            x = x.lerp(partner_x, weight.view(-1, 1, 1, 1))
        return Batch(x, split.labels[index], index, view, epoch + step / count)

    cache_key = split, batch_size, seed, epoch, augment, views_each, mixed
    for step in range(start, count):
        make = partial(make_batch, step)
        if shared:
            yield shared.get_or_create(f"step/batch/{seed}", (*cache_key, step), make)
        else:
            yield make()


def _order_and_views(
    split: Split, seed: int, epoch: int, augment: Augment, views_each: int
) -> tuple[Tensor, Tensor]:
    """Return the samples in the epoch's order [n], and their views [views_each, n].

    The epoch of a split that is too small for its length consists of several rounds, each with the
    order and the views of an epoch of its own.
    """
    rounds = -(-split.epoch_size // max(1, len(split)))
    orders = []
    order_views = []
    for number in range(epoch * rounds, (epoch + 1) * rounds):
        order = split.index[views.epoch_permutation(seed, number, split.index)]
        drawn = [views.sample_views(seed, number, order, augment, nth) for nth in range(views_each)]
        orders.append(order)
        order_views.append(torch.stack(drawn))
    return torch.cat(orders), torch.cat(order_views, dim=1)


def misalign_batch(
    batch: Batch, split: Split, seed: int, augment: Augment, views_each: int = 1
) -> Batch:
    """Replace every image of a batch by another one, in the view that this epoch has of it.

    The replacement is a pure function of (seed, epoch, sample index). This is the teacher's input
    in scripts that cache its outputs in one shuffled order and read them in another.

    Args:
        batch: The batch of the student.
        split: The training images, from which the others are drawn.
        seed: The seed of the run.
        augment: The augmentation.
        views_each: Views per sample in `batch`.

    Returns:
        A batch of the same size and epoch.
    """
    epoch = int(batch.epoch)
    sample_count = len(batch.index) // views_each
    positions = views.misaligned_indices(seed, epoch, batch.index[:sample_count], len(split.index))
    other = split.index[positions]
    drawn = [views.sample_views(seed, epoch, other, augment, nth) for nth in range(views_each)]
    view = torch.cat(drawn)
    index = other.repeat(views_each)
    pixels = views.apply_view(split.images, index, view, augment)
    x = views.normalise(pixels, split.mean, split.std)
    return Batch(x, split.labels[index], index, view, batch.epoch)


def eval_batches(split: Split, batch_size: int = 500) -> Iterator[Tensor]:
    """Yield the images of a split in its own order, normalised and not augmented: [B, 3, H, W]."""
    for index in split.index.split(batch_size):
        yield views.normalise(split.images[index], split.mean, split.std)
