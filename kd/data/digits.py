"""scikit-learn's 1,797 handwritten digits (a copy of UCI's test set), which need no download.

The images are real. They are 8 x 8 and grey, and become 32 x 32 x 3 by repeating pixels. One image
in five, chosen by hash, is in the test set.
"""

from typing import Literal

import torch

from kd.data.base import Arrays, DataSettings, Description, split_validation

TEST_SIZE = 360


class Config(DataSettings):
    """The keys of the digits. `val_size` null holds out 200 images."""

    name: Literal["digits"]


def describe(config: Config) -> Description:
    """Return the description; nothing is read."""
    val = 200 if config.val_size is None else config.val_size
    return Description(tuple("0123456789"), 32, 1797 - TEST_SIZE, val, "scikit-learn-digits-32")


def read(config: Config) -> Arrays:
    """Return all images and labels."""
    from sklearn.datasets import load_digits

    digits, digit_labels = load_digits(return_X_y=True)
    images = torch.from_numpy(digits).reshape(-1, 8, 8).mul(255 / 16).round().to(torch.uint8)
    images = images.repeat_interleave(4, 1).repeat_interleave(4, 2)[..., None].expand(-1, -1, -1, 3)
    labels = torch.from_numpy(digit_labels).long()
    train, test = split_validation(labels, TEST_SIZE, seed=0)
    return Arrays(
        images[train].contiguous(), labels[train], images[test].contiguous(), labels[test]
    )
