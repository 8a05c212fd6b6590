"""scikit-learn's 1,797 handwritten digits (a copy of UCI's test set): real images that come with the package.

8 x 8 grey images are brought to 32 x 32 x 3 by repeating pixels. One image in five, chosen by hash, is the test set.
"""

from typing import Literal

import torch

from kd.data.base import Arrays, DataSettings, Description, split_validation

TEST = 360


class Config(DataSettings):
    name: Literal["digits"]


def describe(config: Config) -> Description:
    val = 200 if config.val_size is None else config.val_size
    return Description(tuple("0123456789"), 32, 1797 - TEST, val, "scikit-learn-digits-32")


def read(config: Config) -> Arrays:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).reshape(-1, 8, 8).mul(255 / 16).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(4, 1).repeat_interleave(4, 2)[..., None].expand(-1, -1, -1, 3)
    y = torch.from_numpy(labels).long()
    train, test = split_validation(y, TEST, seed=0)
    return Arrays(pixels[train].contiguous(), y[train], pixels[test].contiguous(), y[test])
