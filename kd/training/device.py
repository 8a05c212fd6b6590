"""The device, precision and kernels used for training."""

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.core import locks
from kd.core.errors import UserError
from kd.core.io import write_json
from kd.models import kernels
from kd.models.base import ModelOutput, Net

Module = TypeVar("Module", bound=nn.Module)


class Device(NamedTuple):
    """A torch device, and how networks run on it.

    `dtype` applies to convolutions and matrix products; losses are always computed in float32.
    """

    torch: torch.device
    dtype: torch.dtype
    kernels: Any = None  # the library of kd's own CPU kernels, see kd/models/kernels.py
    compile: bool = False

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context manager that runs operations in `dtype`."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.torch.type, self.dtype)

    def forward(self, net: Net) -> Callable[..., ModelOutput]:
        """Return `net.forward_taps`, compiled if `compile` is set.

        On a GPU it is compiled into CUDA graphs, because kernel launches limit the speed of small
        networks.
        """
        if not self.compile:
            return net.forward_taps
        return torch.compile(
            net.forward_taps,
            dynamic=False,
            mode="reduce-overhead" if self.torch.type == "cuda" else None,
        )

    def prepare_module(self, module: Module) -> Module:
        """Move a module to the device in place, convert it to channels_last, and return it.

        Operations for which there are kernels are replaced by them.
        """
        module.to(self.torch).to(memory_format=torch.channels_last)
        if self.kernels is not None:
            kernels.fuse_modules(module, self.kernels)
        return module


def resolve(
    device: str, precision: str, cache: Path, own_kernels: bool = True, compile: bool = False
) -> Device:
    """Choose the device and precision that the configuration describes.

    Args:
        device: Name of a torch device. `auto` selects CUDA, then Apple's MPS, then the CPU.
        precision: `fp32`, `bf16` or `auto`, which selects bfloat16 where it is correct and faster.
        cache: Directory for measurements of this machine and for compiled kernels.
        own_kernels: Use kd's own kernels on a CPU, unless `compile` is set.
        compile: Compile the student with torch.compile.

    Raises:
        UserError: This machine does not have the device, or has no compiler for torch.compile.
    """
    cuda = torch.cuda.is_available()
    mps = torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if cuda else "mps" if mps else "cpu"
    kind, _, number = device.partition(":")
    counts = {"cuda": torch.cuda.device_count() if cuda else 0, "mps": int(mps), "cpu": 1}
    if int(number or 0) >= counts[kind]:
        available = ["auto"]
        for name, count in counts.items():
            available += [f"{name}:{i}" if name == "cuda" else name for i in range(count)]
        raise UserError(
            f"device: {device} is not available on this machine; allowed: {', '.join(available)}"
        )
    if compile and kind == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError(
            "compile: on a CPU torch.compile needs g++, which was not found; set compile=false"
        )
    if precision == "auto":
        precision = "bf16" if _bf16_is_faster(kind, cache) else "fp32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    use_own_kernels = own_kernels and not compile and kind == "cpu"
    library = kernels.library(cache, dtype) if use_own_kernels else None
    return Device(torch.device(device), dtype, library, compile)


def _bf16_is_faster(kind: str, cache: Path) -> bool:
    """Return whether to use bfloat16 on a device type; on a CPU, measure it once per machine."""
    if kind == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    if kind != "cpu" or not (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    ):
        return False
    machine = f"{kernels.processor()!r} {torch.__version__}"
    path = cache / f"bf16-{hashlib.sha256(machine.encode()).hexdigest()[:12]}.json"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # one process measures without competition, and the others use its verdict
        with locks.hold(path.with_suffix(".lock"), "waiting for the process that tests bfloat16"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                return bool(json.loads(path.read_text())["pays"])
            measurement = try_bf16()
            write_json(path, measurement)
    except OSError:  # the measurement cannot be stored
        measurement = try_bf16()
    return bool(measurement["pays"])


def try_bf16() -> dict[str, float]:
    """Test whether a training step of a convolution in bfloat16 is correct and faster than float32.

    Some CPUs compute bfloat16 incorrectly, and some emulate it.

    Returns:
        `fp32_ms` and `bf16_ms` (milliseconds per step), `error` (the largest relative error of the
        output and the gradients) and `pays` (whether to use bfloat16).
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, 16, 16, generator=generator)
    weight = torch.randn(32, 32, 3, 3, generator=generator) / 17

    def step(dtype: torch.dtype) -> list[Tensor]:
        a, b = (
            t.to(dtype, memory_format=torch.channels_last).requires_grad_() for t in (x, weight)
        )
        y = F.conv2d(a, b, padding=1)
        y.backward(y.detach())
        return [t.float() for t in (y.detach(), a.grad, b.grad) if t is not None]

    milliseconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        times = []
        for _ in range(7):
            start = time.perf_counter()
            step(dtype)
            times.append(1e3 * (time.perf_counter() - start))
        milliseconds[dtype] = min(times)
    pairs = zip(step(torch.float32), step(torch.bfloat16), strict=True)
    error = max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)
    fp32 = milliseconds[torch.float32]
    bf16 = milliseconds[torch.bfloat16]
    return {"fp32_ms": fp32, "bf16_ms": bf16, "error": error, "pays": error < 0.03 and bf16 < fp32}


def set_threads() -> None:
    """Set the number of CPU threads to OMP_NUM_THREADS, which torch reads only at its import."""
    number = os.environ.get("OMP_NUM_THREADS", "")
    if number.isdecimal() and int(number) > 0:
        torch.set_num_threads(int(number))


def configure_process(threads: int | None) -> None:
    """Set the number of CPU threads, and make the C library keep freed memory for the next step.

    Call this once per process. By default glibc returns every large activation to the kernel, so
    that each step has to fault it in again.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):
            libc.mallopt(option, value)
