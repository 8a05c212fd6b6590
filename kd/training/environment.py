"""The hardware and software that a run used."""

import platform
from typing import Any

import torch

from kd.core.version import __version__
from kd.runs import directory
from kd.training.device import Device


def numerics(device: Device) -> dict[str, Any]:
    """Return what, besides the configuration, affects the exact bits of a training run.

    The values describe `device` and the current process.
    """
    return {
        "device": device.torch.type,
        "precision": str(device.dtype).removeprefix("torch."),
        "kernels": "torch" if device.kernels is None else "kd",
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def environment(device: Device) -> dict[str, Any]:
    """Return a description of the machine, the software and the command behind a result."""
    on_gpu = device.torch.type == "cuda"
    return {
        **numerics(device),
        "kd": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": torch.cuda.get_device_name(device.torch) if on_gpu else directory.processor(),
        "command": directory.command(),
        "git": directory.git_state(),
    }
