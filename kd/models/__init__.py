"""Networks, one file per family. The name of a file is the model's name in the configuration."""

from typing import Any

from kd.core import registry
from kd.models.base import ModelOutput, Net


def find(name: Any, key: str) -> Any:
    """Return the Net class of a model.

    Args:
        name: The name of the model.
        key: The configuration key for error messages.

    Raises:
        UserError: There is no model of this name; the message names `key`.
    """
    return registry.defined(registry.module("models", name, key), Net)


def build(config: Any, classes: int, size: int) -> Any:
    """Build a network with random weights, drawn from torch's default generator.

    Args:
        config: The settings of the model.
        classes: The number of classes.
        size: Images are size x size.
    """
    return find(config.name, "model")(config, classes, size)


def blank(config: Any, classes: int, size: int) -> Any:
    """Build a network whose weights will be replaced; pretrained weights are not downloaded."""
    changes = {"pretrained": False} if getattr(config, "pretrained", False) else {}
    return build(config.model_copy(update=changes), classes, size)


__all__ = ["ModelOutput", "Net", "blank", "build", "find"]
