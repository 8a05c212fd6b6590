"""Batch norm with its ReLU or ELU, and max pooling, on a CPU (kernels.cpp), where PyTorch is slow.

The source is compiled once a machine and dtype, in a second, where there is g++; elsewhere PyTorch's own operators do
the work.
"""

import ctypes
import hashlib
import itertools
import logging
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd.core import locks
from kd.core.io import atomic_write

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ["-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]


class Library:
    """The functions of kernels.cpp for a dtype. A copy of a network that uses them uses the same."""

    def __init__(self, path: Path, dtype: torch.dtype):
        self.path, self.dtype, found = path, dtype, ctypes.CDLL(str(path))
        self.norm_act, self.norm_act_backward = found.norm_act, found.norm_act_backward
        self.scale_act, self.pool, self.pool_backward = (
            found.scale_act,
            found.pool,
            found.pool_backward,
        )

    def __reduce__(self) -> Any:
        return Library, (self.path, self.dtype)

    def __deepcopy__(self, _: Any) -> "Library":
        return self


@cache
def library(folder: Path, dtype: torch.dtype) -> Library | None:
    """The kernels for bfloat16 or float32, compiled and kept in `folder`, or None where they cannot be made or do not
    compute what they should."""
    compiler = shutil.which("g++")
    if compiler is None or platform.system() != "Linux":
        return None
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
        flags = [*FLAGS, *(["-DFLOAT32"] if dtype is torch.float32 else [])]
        words = [SOURCE.read_bytes(), version, " ".join(flags).encode(), processor()]
        path = folder / f"kernels-{hashlib.sha256(b'|'.join(words)).hexdigest()[:16]}.so"
        folder.mkdir(parents=True, exist_ok=True)
        with locks.hold(
            path.with_suffix(".lock"), "waiting for the process that compiles the kernels"
        ):
            if not path.exists():
                with atomic_write(path) as part:
                    command = [compiler, *flags, str(SOURCE), "-o", str(part)]
                    subprocess.run(command, capture_output=True, check=True, timeout=120)
        found = Library(path, dtype)
        return found if _self_test(found) else None
    except (OSError, subprocess.SubprocessError) as error:
        log.debug("no kernels of our own (%s)", error)
        return None


def processor() -> bytes:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        return b"".join(
            next((x for x in lines if x.startswith(key)), b"") for key in (b"model name", b"flags")
        )
    except OSError:
        return platform.processor().encode()


def _self_test(library: Any) -> bool:
    """Do the kernels agree with PyTorch?"""
    return all(_all_close(library, activation) for activation in FUSED)


def _all_close(library: Any, activation: type[nn.Module]) -> bool:
    draw = torch.Generator().manual_seed(0)
    x, dy = (
        torch.randn(s, generator=draw).to(library.dtype) for s in ((8, 16, 10, 10), (8, 16, 5, 5))
    )
    theirs, ours = (
        nn.Sequential(nn.Sequential(nn.BatchNorm2d(16), activation()), nn.MaxPool2d(2))
        for _ in "ab"
    )
    fuse_modules(ours, library)
    found = []
    for net, to in ((theirs, torch.float32), (ours, library.dtype)):
        leaf = x.to(to, memory_format=torch.channels_last).requires_grad_()
        y = net(leaf)
        y.backward(dy.to(to))
        with torch.no_grad():
            evaluated = net.eval()(leaf)
        found.append([y, leaf.grad, *(p.grad for p in net.parameters()), *net.buffers(), evaluated])
    off = 0.02 if library.dtype is torch.bfloat16 else 2e-5
    return all(
        torch.allclose(a.float(), b.float(), rtol=off, atol=off)
        for a, b in zip(*found, strict=True)
    )


class NormAct(nn.BatchNorm2d):
    """nn.BatchNorm2d and an activation, with the same weights and names: [B, C, H, W] -> [B, C, H, W]."""

    library: Any = None
    activation: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        if not self._fits(x):
            y: Tensor = self.activation()(super().forward(x))
            return y
        running_mean, running_var, seen = (
            self.running_mean,
            self.running_var,
            self.num_batches_tracked,
        )
        assert self.momentum is not None
        assert running_mean is not None
        assert running_var is not None
        assert seen is not None
        if self.training:
            y, mean, var = _Train.apply(
                x, self.weight, self.bias, self.eps, self._elu, self.library
            )
            rows = x.numel() // x.shape[1]
            with torch.no_grad():
                seen.add_(1)
                running_mean.lerp_(mean, self.momentum)
                running_var.lerp_(var * (rows / (rows - 1)), self.momentum)
            return y
        scale = self.weight * torch.rsqrt(running_var + self.eps)
        shift = self.bias - running_mean * scale
        y = torch.empty_like(x)
        self.library.scale_act(self._elu, *_pointers(x, y), *_rows(x), *_pointers(scale, shift))
        return y

    @property
    def _elu(self) -> int:
        return self.activation is nn.ELU

    def _fits(self, x: Tensor) -> bool:
        return (
            _in_rows(x, self.library)
            and (self.training or not torch.is_grad_enabled())
            and x.numel() > x.shape[1]
            and self.momentum is not None
            and all(
                t is not None and t.dtype is torch.float32
                for t in (self.weight, self.bias, self.running_mean, self.running_var)
            )
        )


class NormReLU(NormAct):
    activation = nn.ReLU


class NormELU(NormAct):
    activation = nn.ELU


FUSED: dict[type[nn.Module], type[NormAct]] = {nn.ReLU: NormReLU, nn.ELU: NormELU}


class _Train(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, elu: int, library: Any
    ) -> Any:
        y = torch.empty_like(x)
        mean, var, scale, shift = torch.empty(4, x.shape[1])
        library.norm_act(
            elu,
            *_pointers(x, y),
            *_rows(x),
            *_pointers(weight, bias),
            ctypes.c_float(eps),
            *_pointers(mean, var, scale, shift),
        )
        ctx.save_for_backward(x, mean, var, scale, shift)
        ctx.eps, ctx.elu, ctx.library = eps, elu, library
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, mean, var, scale, shift = ctx.saved_tensors
        dy = grads[0].contiguous(memory_format=torch.channels_last)
        dx, (dweight, dbias) = torch.empty_like(x), torch.empty(2, x.shape[1])
        ctx.library.norm_act_backward(
            ctx.elu,
            *_pointers(dy, x, dx),
            *_rows(x),
            ctypes.c_float(ctx.eps),
            *_pointers(mean, var, scale, shift, dweight, dbias),
        )
        return dx, dweight, dbias, None, None, None


class MaxPool2x2(nn.MaxPool2d):
    """nn.MaxPool2d(2): [B, C, H, W] -> [B, C, H / 2, W / 2], with its very bits."""

    library: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if not _in_rows(x, self.library) or x.shape[2] % 2 or x.shape[3] % 2:
            return super().forward(x)
        return _Pool.apply(x, self.library)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, library: Any) -> Any:
        n, c, h, w = x.shape
        y, which = (
            torch.empty(n, c, h // 2, w // 2, dtype=x.dtype, memory_format=torch.channels_last)
            for _ in "yw"
        )
        library.pool(*_pointers(x, y, which), ctypes.c_long(n), *map(ctypes.c_int, (h, w, c)))
        ctx.save_for_backward(which)
        ctx.library = library
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (which,) = ctx.saved_tensors
        dy = grads[0].contiguous(memory_format=torch.channels_last)
        n, c, h, w = which.shape
        dx = torch.empty(n, c, 2 * h, 2 * w, dtype=dy.dtype, memory_format=torch.channels_last)
        ctx.library.pool_backward(
            *_pointers(dy, which, dx), ctypes.c_long(n), *map(ctypes.c_int, (2 * h, 2 * w, c))
        )
        return dx, None


def _in_rows(x: Tensor, library: Any) -> bool:
    return (
        library is not None
        and (x.device.type, x.dtype, x.ndim) == ("cpu", library.dtype, 4)
        and x.shape[1] % 16 == 0
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(t.data_ptr()) for t in tensors]


def _rows(x: Tensor) -> tuple[ctypes.c_long, ctypes.c_int]:
    return ctypes.c_long(x.numel() // x.shape[1]), ctypes.c_int(x.shape[1])


def fuse_modules(net: nn.Module, library: Any) -> None:
    """In place: every BatchNorm2d that a ReLU or an ELU follows in a Sequential becomes a NormReLU or a NormELU, every
    MaxPool2d(2) a MaxPool2x2. Weights keep their names."""
    for module in list(net.modules()):
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            for place, (norm, act) in enumerate(itertools.pairwise(list(module)), 1):
                if (
                    type(norm) is nn.BatchNorm2d
                    and type(act) in FUSED
                    and getattr(act, "alpha", 1.0) == 1.0
                ):
                    norm.__class__ = FUSED[type(act)]
                    norm.library = library
                    module[place] = nn.Identity()
        if (
            type(module) is nn.MaxPool2d
            and repr(module) == repr(nn.MaxPool2d(2))
            and not module.return_indices
        ):
            module.__class__ = MaxPool2x2
            module.library = library
