"""What a training runs on."""

import platform
from typing import Any

import torch

from kd.core.version import __version__
from kd.runs import directory
from kd.training.device import Device


def numerics(device: Device) -> dict[str, Any]:
    """What the last bits of a training depend on, beside its configuration: of a Device, in this process."""
    return {
        "device": device.torch.type,
        "precision": str(device.dtype).removeprefix("torch."),
        "kernels": "torch" if device.kernels is None else "kd",
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def environment(device: Device) -> dict[str, Any]:
    """What the numbers were made on."""
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
