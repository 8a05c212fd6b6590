"""Where training runs, in which precision, and with whose kernels."""

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
    """A torch device and the dtype that convolutions and matrix products run in (loss math is always float32)."""

    torch: torch.device
    dtype: torch.dtype
    kernels: Any = None  # kd's own, see kd/models/kernels.py
    compile: bool = False

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.torch.type, self.dtype)

    def forward(self, net: Net) -> Callable[..., ModelOutput]:
        """`net.forward_taps`, compiled if that is wanted: on a GPU into CUDA graphs, as small networks wait for launches."""
        if not self.compile:
            return net.forward_taps
        return torch.compile(
            net.forward_taps,
            dynamic=False,
            mode="reduce-overhead" if self.torch.type == "cuda" else None,
        )

    def prepare_module(self, module: Module) -> Module:
        """`module` itself, moved here, its convolution weights in channels_last order."""
        module.to(self.torch).to(memory_format=torch.channels_last)
        if self.kernels is not None:
            kernels.fuse_modules(module, self.kernels)
        return module


def resolve(
    device: str, precision: str, cache: Path, own_kernels: bool = True, compile: bool = False
) -> Device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU; and bfloat16 where it is right and faster.

    **Arguments:** `cache`: the directory in which what was found out about this machine is remembered.
    **Raises:** UserError for a device that this machine does not have.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if cuda else "mps" if mps else "cpu"
    kind, _, number = device.partition(":")
    present = {"cuda": torch.cuda.device_count() if cuda else 0, "mps": int(mps), "cpu": 1}
    if int(number or 0) >= present[kind]:
        have = ", ".join(
            f"{name}:{i}" if name == "cuda" else name
            for name, n in present.items()
            for i in range(n)
        )
        raise UserError(
            f"device: {device} is not on this machine; it has {have}; device=auto chooses"
        )
    if compile and kind == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError(
            "compile: on a CPU torch.compile needs g++, which is not on this machine; use compile=false"
        )
    if precision == "auto":
        precision = "bf16" if _bf16_is_faster(kind, cache) else "fp32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    ours = kernels.library(cache, dtype) if own_kernels and not compile and kind == "cpu" else None
    return Device(torch.device(device), dtype, ours, compile)


def _bf16_is_faster(kind: str, cache: Path) -> bool:
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
        # one process tries, by itself, and all others believe it
        with locks.hold(path.with_suffix(".lock"), "waiting for the process that tries bfloat16"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                return bool(json.loads(path.read_text())["pays"])
            found = try_bf16()
            write_json(path, found)
    except OSError:  # it cannot be remembered
        found = try_bf16()
    return bool(found["pays"])


def try_bf16() -> dict[str, float]:
    """Is a convolution's step in bfloat16 right (some CPUs compute it wrongly), and faster than in float32 (some
    emulate it)? **Returns:** the milliseconds of each, the largest relative error of outputs and gradients, and the
    verdict."""
    draw = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(64, 32, 16, 16, generator=draw),
        torch.randn(32, 32, 3, 3, generator=draw) / 17,
    )

    def step(dtype: torch.dtype) -> list[Tensor]:
        a, b = (
            t.to(dtype, memory_format=torch.channels_last).requires_grad_() for t in (x, weight)
        )
        y = F.conv2d(a, b, padding=1)
        y.backward(y.detach())
        return [t.float() for t in (y.detach(), a.grad, b.grad) if t is not None]

    spent = {}
    for dtype in (torch.float32, torch.bfloat16):
        times = []
        for _ in range(7):
            begun = time.perf_counter()
            step(dtype)
            times.append(1e3 * (time.perf_counter() - begun))
        spent[dtype] = min(times)
    pairs = zip(step(torch.float32), step(torch.bfloat16), strict=True)
    error = max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)
    fp32, bf16 = spent[torch.float32], spent[torch.bfloat16]
    return {"fp32_ms": fp32, "bf16_ms": bf16, "error": error, "pays": error < 0.03 and bf16 < fp32}


def configure_process(threads: int | None) -> None:
    """Once a process: the number of CPU threads, and a C library that keeps freed memory for the next step.

    Without the second, glibc hands every large activation back to the kernel and faults it in again each step.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in (
            (-4, 0),
            (-1, 2**31 - 1),
            (-2, 64 << 20),
        ):  # MMAP_MAX, TRIM_THRESHOLD, TOP_PAD
            libc.mallopt(option, value)
