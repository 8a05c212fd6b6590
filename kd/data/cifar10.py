"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), downloaded and verified by torchvision."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from kd.core.errors import UserError
from kd.core.settings import Effect, PathText, Text
from kd.data.base import Arrays, DataSettings, Description


class Config(DataSettings):
    """The keys of CIFAR-10. `val_size` null holds out 5000 images."""

    name: Literal["cifar10"]
    root: Annotated[PathText, Effect.NONE]  # the content identifies the data
    classes: list[Text] = Field(min_length=2)
    kind: ClassVar[str] = "CIFAR10"  # the class in torchvision.datasets


def describe(config: Config) -> Description:
    """Return the description; nothing is downloaded."""
    val = 5000 if config.val_size is None else config.val_size
    return Description(tuple(config.classes), 32, 50_000, val, f"torchvision-{config.kind}")


def read(config: Config) -> Arrays:
    """Return all images and labels, and download them first if necessary.

    Raises:
        UserError: The data set is not in `config.root` and cannot be downloaded, or its classes
            are not those of the configuration.
    """
    from torchvision import datasets

    root = Path(config.root).expanduser()
    try:
        dataset_class = getattr(datasets, config.kind)
        train = dataset_class(root, train=True, download=True)
        test = dataset_class(root, train=False, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"data.root: {config.kind} is not in {root} and cannot be downloaded "
            f"({str(error).splitlines()[0]}); "
            "use data=digits (needs no download) or data=imagefolder data.root=PATH"
        ) from error
    if train.classes != config.classes:
        raise UserError(
            f"data.classes: not the classes of {config.kind}; allowed: {', '.join(train.classes)}"
        )
    return Arrays(
        torch.from_numpy(train.data),
        torch.tensor(train.targets),
        torch.from_numpy(test.data),
        torch.tensor(test.targets),
    )
