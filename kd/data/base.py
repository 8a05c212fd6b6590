"""What every data set here is: typed settings, a description that costs nothing, and arrays of pixels."""

from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from kd.core.settings import Seed, Settings
from kd.data import augment as views
from kd.data.augment import Augment
from kd.data.loader import Split


class DataSettings(Settings):
    """Keys that every data set has. `val_size` images are held out of training (null: see the data set)."""

    val_size: int | None = Field(ge=0)
    split_seed: Seed
    augment: Augment
    mean: list[Annotated[float, Field(ge=0, le=1)]] | None = Field(min_length=3, max_length=3)
    std: list[Annotated[float, Field(ge=1e-3, le=1e3)]] | None = Field(min_length=3, max_length=3)


class Description(NamedTuple):
    """What can be known of a data set before any pixel is read."""

    classes: tuple[str, ...]
    size: int  # images are size x size
    train: int  # images, those held out for validation included
    val: int  # images held out of train, or in a validation set of their own
    fingerprint: str  # changes when the content does; does not know where the files lie
    own_val: bool = False


class Arrays(NamedTuple):
    """Decoded images: uint8 [N, size, size, 3] and int64 [N] labels."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    val_images: Tensor | None = None
    val_labels: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Data:
    """A data set ready to train on, on its device."""

    classes: tuple[str, ...]
    size: int
    train: Split
    val: Split | None
    test: Split

    @property
    def samples(self) -> int:
        """One more than the largest index of a training sample."""
        return len(self.train.images)


def build_data(
    config: DataSettings, described: Description, arrays: Arrays, device: torch.device
) -> Data:
    """Split off the validation images, settle mean and std, and move everything to the device."""
    mean, std = config.mean, config.std
    if mean is None or std is None:
        found = channel_statistics(arrays.train_images)
        mean, std = mean or found[0], std or found[1]
    mean_std = (
        torch.tensor(mean, dtype=torch.float32),
        torch.tensor(std, dtype=torch.float32).clamp(min=1e-3),
    )
    images, labels = arrays.train_images.contiguous().to(device), arrays.train_labels.to(device)

    def whole(images: Tensor, labels: Tensor) -> Split:
        return Split(images.contiguous(), labels, torch.arange(len(images)), *mean_std).to(device)

    val: Split | None = None
    rows = torch.arange(len(arrays.train_images))
    if arrays.val_images is not None and arrays.val_labels is not None:
        val = whole(arrays.val_images, arrays.val_labels)
    elif described.val:
        rows, held_out = split_validation(arrays.train_labels, described.val, config.split_seed)
        val = Split(images, labels, held_out, *mean_std).to(device)
    train = Split(images, labels, rows, *mean_std).to(device)
    return Data(
        described.classes, described.size, train, val, whole(arrays.test_images, arrays.test_labels)
    )


def keep_label_fraction(data: Data, part: float, seed: int, unlabelled: bool) -> Data:
    """`data` of whose training images only this part, chosen by `seed`, has its label; each class in its proportion.

    **Arguments:** `unlabelled`: the others are there with the label -1. Otherwise they are not, and an epoch goes round
    those with a label until it is as long as before.
    """
    train = data.train
    rest, some = split_validation(train.targets.cpu(), round(part * len(train)), seed)
    rest, some = train.index[rest.to(train.index.device)], train.index[some.to(train.index.device)]
    if unlabelled:
        return replace(data, train=replace(train, labels=train.labels.index_fill(0, rest, -1)))
    return replace(data, train=replace(train, index=some, length=train.epoch_size))


def split_validation(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(rows to train on, rows held out): `count` rows chosen by hash, each class in its proportion."""
    hashes = views.random_floats(seed, "validation", 0, torch.arange(len(labels)))
    sizes = torch.bincount(labels)
    ideal = sizes.double() * count / len(labels)
    share = ideal.floor().long()
    largest = torch.argsort(ideal - share, descending=True, stable=True)
    share[largest[: count - int(share.sum())]] += 1
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label, n in enumerate(share.tolist()):
        rows = torch.nonzero(labels == label)[:, 0]
        held[rows[torch.argsort(hashes[rows], stable=True)[:n]]] = True
    return torch.nonzero(~held)[:, 0], torch.nonzero(held)[:, 0]


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, in units of 0..1, rounded to 4 places."""
    total = torch.zeros(2, 3, dtype=torch.float64)
    for part in images.split(4096):
        pixels = part.reshape(-1, 3).double() / 255
        total += torch.stack([pixels.sum(0), (pixels**2).sum(0)])
    mean, square = total / (images.shape[0] * images.shape[1] * images.shape[2])
    return [round(m, 4) for m in mean.tolist()], [
        round(s, 4) for s in (square - mean**2).sqrt().tolist()
    ]
