"""Data sets: one file each. A name in the configuration is the name of a file here."""

from pathlib import Path
from typing import Any

import torch

from kd.core import registry
from kd.data.base import Data, Description, build_data, keep_label_fraction
from kd.data.cache import cached


def find(name: Any) -> Any:
    """The module of that data set. **Raises:** UserError."""
    return registry.module("data", name, "data")


def describe(config: Any) -> Description:
    """What is known of a data set before a pixel is read. **Raises:** UserError for a folder that cannot be used."""
    return find(config.name).describe(config)


def load(config: Any, described: Description, cache: Path, device: torch.device) -> Data:
    """The data set on `device`, decoded once and then read from `cache`. **Raises:** UserError."""
    arrays = cached(
        cache, f"{config.name}-{described.fingerprint}", lambda: find(config.name).read(config)
    )
    return build_data(config, described, arrays, device)


__all__ = ["Data", "Description", "describe", "find", "keep_label_fraction", "load"]
