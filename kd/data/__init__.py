"""Data sets, one file each. The name of a file is the data set's name in the configuration."""

from pathlib import Path
from typing import Any

import torch

from kd.core import registry
from kd.data.base import Data, Description, build_data, keep_label_fraction
from kd.data.cache import cached


def find(name: Any) -> Any:
    """Return the module of a data set.

    Raises:
        UserError: There is no data set of this name.
    """
    return registry.module("data", name, "data")


def describe(config: Any) -> Description:
    """Return what can be known of a data set before any pixel is read.

    Raises:
        UserError: The data set is an image folder that cannot be used.
    """
    description: Description = find(config.name).describe(config)
    return description


def load(config: Any, description: Description, cache: Path, device: torch.device) -> Data:
    """Load a data set onto `device`. Images are decoded once and later read from `cache`.

    Raises:
        UserError: The images cannot be downloaded or decoded.
    """
    key = f"{config.name}-{description.fingerprint}"
    arrays = cached(cache, key, lambda: find(config.name).read(config))
    return build_data(config, description, arrays, device)


__all__ = ["Data", "Description", "describe", "find", "keep_label_fraction", "load"]
