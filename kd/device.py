"""Where training runs and in which precision."""

import contextlib
import ctypes
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from kd.settings import UserError

Module = TypeVar("Module", bound=nn.Module)


class Device(NamedTuple):
    """A torch device and the dtype that convolutions and matrix products run in (loss math is always float32)."""

    torch: torch.device
    dtype: torch.dtype

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.torch.type, self.dtype)

    def place(self, module: Module) -> Module:
        """`module` itself, moved here, its convolution weights in channels_last order."""
        module.to(self.torch).to(memory_format=torch.channels_last)
        return module


def resolve(device: str, precision: str) -> Device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU; and bfloat16 where the hardware multiplies it natively.

    **Raises:** UserError for a device that this machine does not have.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if cuda else "mps" if mps else "cpu"
    kind, _, number = device.partition(":")
    present = {"cuda": torch.cuda.device_count() if cuda else 0, "mps": int(mps), "cpu": 1}
    if int(number or 0) >= present[kind]:
        have = ", ".join(f"{name}:{i}" if name == "cuda" else name for name, n in present.items() for i in range(n))
        raise UserError(f"device: {device} is not on this machine; it has {have}; device=auto chooses")
    if precision == "auto":
        precision = "bf16" if _bf16_pays(kind) else "fp32"
    return Device(torch.device(device), torch.bfloat16 if precision == "bf16" else torch.float32)


def _bf16_pays(kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    return kind == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def settle(threads: int | None) -> None:
    """Once a process: the number of CPU threads, and a C library that keeps freed memory for the next step.

    Without the second, glibc hands every large activation back to the kernel and faults it in again each step.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):  # MMAP_MAX, TRIM_THRESHOLD, TOP_PAD
            libc.mallopt(option, value)
