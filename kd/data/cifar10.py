"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), downloaded and verified by torchvision."""

from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field

from kd.core.errors import UserError
from kd.core.settings import PathText, Text
from kd.data.base import Arrays, DataSettings, Description


class Config(DataSettings):
    name: Literal["cifar10"]
    root: PathText
    classes: list[Text] = Field(min_length=2)
    kind: ClassVar[str] = "CIFAR10"


def describe(config: Config) -> Description:
    val = 5000 if config.val_size is None else config.val_size
    return Description(tuple(config.classes), 32, 50_000, val, f"torchvision-{config.kind}")


def read(config: Config) -> Arrays:
    """**Raises:** UserError, saying where it looked and what else can be done, when the data cannot be had."""
    from torchvision import datasets

    root = Path(config.root).expanduser()
    try:
        train, test = (
            getattr(datasets, config.kind)(root, train=t, download=True) for t in (True, False)
        )
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"data.root: {config.kind} is not in {root} and cannot be downloaded ({str(error).splitlines()[0]}); "
            "use data=digits (needs no download) or data=imagefolder data.root=PATH"
        ) from error
    if train.classes != config.classes:
        raise UserError(f"data.classes: the downloaded classes are {', '.join(train.classes)}")
    parts = [p for s in (train, test) for p in (torch.from_numpy(s.data), torch.tensor(s.targets))]
    return Arrays(*parts)
