"""What all data sets share: typed settings, a cheap description, and arrays of pixels."""

from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from kd.core.settings import Seed, Settings
from kd.data.augment import Augment, sample_hashes
from kd.data.loader import Split


class DataSettings(Settings):
    """The keys that all data sets have in common.

    `val_size` images are held out of training; each data set defines what null means.
    """

    val_size: int | None = Field(ge=0)
    split_seed: Seed
    augment: Augment
    mean: list[Annotated[float, Field(ge=0, le=1)]] | None = Field(min_length=3, max_length=3)
    std: list[Annotated[float, Field(ge=1e-3, le=1e3)]] | None = Field(min_length=3, max_length=3)


class Description(NamedTuple):
    """What can be known of a data set before any pixel is read."""

    classes: tuple[str, ...]
    size: int  # images are size x size
    train: int  # number of training images, including those held out for validation
    val: int  # number of validation images, held out of train or in a set of their own
    fingerprint: str  # changes with the content, but not with the location of the files
    own_val: bool = False  # is the validation set separate from train?


class Arrays(NamedTuple):
    """Decoded images: uint8 [N, size, size, 3], and labels: int64 [N]."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    val_images: Tensor | None = None
    val_labels: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Data:
    """A data set on its device, ready to train on."""

    classes: tuple[str, ...]
    size: int
    train: Split
    val: Split | None
    test: Split

    @property
    def samples(self) -> int:
        """Return one more than the largest index of a training sample."""
        return len(self.train.images)


def build_data(
    config: DataSettings, description: Description, arrays: Arrays, device: torch.device
) -> Data:
    """Hold out the validation images, settle mean and std, and move everything to the device."""
    mean = config.mean
    std = config.std
    if mean is None or std is None:
        measured_mean, measured_std = channel_statistics(arrays.train_images)
        mean = mean or measured_mean
        std = std or measured_std
    normalisation = (
        torch.tensor(mean, dtype=torch.float32),
        torch.tensor(std, dtype=torch.float32).clamp(min=1e-3),
    )
    train_images = arrays.train_images.contiguous().to(device)
    train_labels = arrays.train_labels.to(device)

    def full_split(images: Tensor, labels: Tensor) -> Split:
        rows = torch.arange(len(images))
        return Split(images.contiguous(), labels, rows, *normalisation).to(device)

    val: Split | None = None
    train_rows = torch.arange(len(arrays.train_images))
    if arrays.val_images is not None and arrays.val_labels is not None:
        val = full_split(arrays.val_images, arrays.val_labels)
    elif description.val:
        train_rows, val_rows = split_validation(
            arrays.train_labels, description.val, config.split_seed
        )
        val = Split(train_images, train_labels, val_rows, *normalisation).to(device)
    train = Split(train_images, train_labels, train_rows, *normalisation).to(device)
    test = full_split(arrays.test_images, arrays.test_labels)
    return Data(description.classes, description.size, train, val, test)


def keep_label_fraction(data: Data, fraction: float, seed: int, unlabelled: bool) -> Data:
    """Keep the labels of only a fraction of the training images, stratified by class.

    Args:
        data: The data set.
        fraction: The fraction of training images that keep their label.
        seed: Chooses these images.
        unlabelled: If true, the other images stay, with label -1. If false, they are removed and
            an epoch repeats the labelled images until it is as long as before.

    Returns:
        The data set with a new training split.
    """
    train = data.train
    device = train.index.device
    count = round(fraction * len(train))
    other_rows, labelled_rows = split_validation(train.targets.cpu(), count, seed)
    others = train.index[other_rows.to(device)]
    labelled = train.index[labelled_rows.to(device)]
    if unlabelled:
        return replace(data, train=replace(train, labels=train.labels.index_fill(0, others, -1)))
    return replace(data, train=replace(train, index=labelled, length=train.epoch_size))


def split_validation(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out `count` rows, chosen by hash and stratified by class.

    Args:
        labels: int64 tensor [N].
        count: The number of rows to hold out.
        seed: Chooses the rows.

    Returns:
        The rows to train on and the rows held out, both int64 and ascending.
    """
    hashes = sample_hashes(seed, "validation", 0, torch.arange(len(labels)))
    class_sizes = torch.bincount(labels)
    ideal_counts = class_sizes.double() * count / len(labels)
    counts = ideal_counts.floor().long()
    by_remainder = torch.argsort(ideal_counts - counts, descending=True, stable=True)
    missing = count - int(counts.sum())
    counts[by_remainder[:missing]] += 1
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label, class_count in enumerate(counts.tolist()):
        rows = torch.nonzero(labels == label)[:, 0]
        by_hash = torch.argsort(hashes[rows], stable=True)
        held_out[rows[by_hash[:class_count]]] = True
    return torch.nonzero(~held_out)[:, 0], torch.nonzero(held_out)[:, 0]


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Measure the mean and standard deviation of each channel.

    Args:
        images: uint8 tensor [N, H, W, 3].

    Returns:
        Mean and standard deviation, for pixels in 0..1, rounded to 4 decimal places.
    """
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for chunk in images.split(4096):
        pixels = chunk.reshape(-1, 3).double() / 255
        sums += torch.stack([pixels.sum(0), (pixels**2).sum(0)])
    mean, mean_square = sums / (images.shape[0] * images.shape[1] * images.shape[2])
    std = (mean_square - mean**2).sqrt()
    return [round(m, 4) for m in mean.tolist()], [round(s, 4) for s in std.tolist()]
