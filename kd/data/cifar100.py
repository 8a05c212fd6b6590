"""CIFAR-100 (Krizhevsky 2009): like CIFAR-10, with 100 classes."""

from typing import ClassVar, Literal

from kd.data import cifar10
from kd.data.cifar10 import describe, read


class Config(cifar10.Config):
    """The keys of CIFAR-100. `val_size` null holds out 5000 images."""

    name: Literal["cifar100"]  # type: ignore[assignment]
    kind: ClassVar[str] = "CIFAR100"


__all__ = ["Config", "describe", "read"]
