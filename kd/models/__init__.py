"""Networks: one file a family. A name in the configuration is the name of a file here."""

from typing import Any

from kd.core import registry
from kd.models.base import ModelOutput, Net


def find(name: Any, key: str) -> Any:
    """The Net class of that name. **Raises:** UserError naming `key`."""
    return registry.defined(registry.module("models", name, key), Net)


def build(config: Any, classes: int, size: int) -> Any:
    """A network with fresh weights for `classes` classes and images of size x size, drawn from torch's generator."""
    return find(config.name, "model")(config, classes, size)


def blank(config: Any, classes: int, size: int) -> Any:
    """The same for weights that are to be filled in: none are downloaded."""
    fresh = {"pretrained": False} if getattr(config, "pretrained", False) else {}
    return build(config.model_copy(update=fresh), classes, size)


__all__ = ["ModelOutput", "Net", "blank", "build", "find"]
