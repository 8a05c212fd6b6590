"""CPU kernels (kernels.cpp): batch norm fused with ReLU or ELU, and max pooling.

PyTorch is slow at these on a CPU. The source is compiled once per machine and dtype, which takes a
second and needs g++. Without it PyTorch's own operators are used.
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
    """The functions of kernels.cpp for one dtype. Copies of a network share it."""

    def __init__(self, path: Path, dtype: torch.dtype):
        self.path = path
        self.dtype = dtype
        functions = ctypes.CDLL(str(path))
        self.norm_act = functions.norm_act
        self.norm_act_backward = functions.norm_act_backward
        self.scale_act = functions.scale_act
        self.pool = functions.pool
        self.pool_backward = functions.pool_backward

    def __reduce__(self) -> Any:
        return Library, (self.path, self.dtype)

    def __deepcopy__(self, _: Any) -> "Library":
        return self


@cache
def library(folder: Path, dtype: torch.dtype) -> Library | None:
    """Compile the kernels, or find them compiled in `folder`.

    Args:
        folder: The cache of compiled kernels.
        dtype: torch.bfloat16 or torch.float32.

    Returns:
        The kernels, or None if they cannot be compiled or do not agree with PyTorch.
    """
    compiler = shutil.which("g++")
    if compiler is None or platform.system() != "Linux":
        return None
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
        flags = [*FLAGS, *(["-DFLOAT32"] if dtype is torch.float32 else [])]
        build_inputs = [SOURCE.read_bytes(), version, " ".join(flags).encode(), processor()]
        digest = hashlib.sha256(b"|".join(build_inputs)).hexdigest()[:16]
        path = folder / f"kernels-{digest}.so"
        folder.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock")
        with locks.hold(lock, "waiting for the process that compiles the kernels"):
            if not path.exists():
                with atomic_write(path) as partial_path:
                    command = [compiler, *flags, str(SOURCE), "-o", str(partial_path)]
                    subprocess.run(command, capture_output=True, check=True, timeout=120)
        compiled = Library(path, dtype)
        return compiled if _self_test(compiled) else None
    except (OSError, subprocess.SubprocessError) as error:
        log.debug("using PyTorch's operators; the CPU kernels cannot be compiled (%s)", error)
        return None


def processor() -> bytes:
    """Return what -march=native depends on: the processor's model and flags."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        return b"".join(
            next((line for line in lines if line.startswith(key)), b"")
            for key in (b"model name", b"flags")
        )
    except OSError:
        return platform.processor().encode()


def _self_test(library: Any) -> bool:
    """Return whether the kernels agree with PyTorch."""
    return all(_agrees_with_pytorch(library, activation) for activation in FUSED)


def _agrees_with_pytorch(library: Any, activation: type[nn.Module]) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((8, 16, 10, 10), generator=generator).to(library.dtype)
    dy = torch.randn((8, 16, 5, 5), generator=generator).to(library.dtype)

    def network() -> nn.Module:
        return nn.Sequential(nn.Sequential(nn.BatchNorm2d(16), activation()), nn.MaxPool2d(2))

    reference = network()
    fused = network()
    fuse_modules(fused, library)
    outputs = []
    for net, dtype in ((reference, torch.float32), (fused, library.dtype)):
        leaf = x.to(dtype, memory_format=torch.channels_last).requires_grad_()
        y = net(leaf)
        y.backward(dy.to(dtype))
        with torch.no_grad():
            eval_output = net.eval()(leaf)
        gradients = [p.grad for p in net.parameters()]
        outputs.append([y, leaf.grad, *gradients, *net.buffers(), eval_output])
    tolerance = 0.02 if library.dtype is torch.bfloat16 else 2e-5
    return all(
        torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance)
        for a, b in zip(*outputs, strict=True)
    )


class NormAct(nn.BatchNorm2d):
    """nn.BatchNorm2d and an activation on [B, C, H, W]; weights and names are those of the norm."""

    library: Any = None
    activation: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, H, W] and apply the activation."""
        if not self._is_supported(x):
            y: Tensor = self.activation()(super().forward(x))
            return y
        running_mean = self.running_mean
        running_var = self.running_var
        batches_tracked = self.num_batches_tracked
        assert self.momentum is not None
        assert running_mean is not None
        assert running_var is not None
        assert batches_tracked is not None
        if self.training:
            y, mean, var = _Train.apply(
                x, self.weight, self.bias, self.eps, self._elu, self.library
            )
            rows = x.numel() // x.shape[1]
            with torch.no_grad():
                batches_tracked.add_(1)
                running_mean.lerp_(mean, self.momentum)
                running_var.lerp_(var * (rows / (rows - 1)), self.momentum)
            return y
        scale = self.weight * torch.rsqrt(running_var + self.eps)
        shift = self.bias - running_mean * scale
        y = torch.empty_like(x)
        self.library.scale_act(
            self._elu, *_pointers(x, y), *_rows_and_channels(x), *_pointers(scale, shift)
        )
        return y

    @property
    def _elu(self) -> int:
        return self.activation is nn.ELU

    def _is_supported(self, x: Tensor) -> bool:
        return (
            _has_supported_layout(x, self.library)
            and (self.training or not torch.is_grad_enabled())
            and x.numel() > x.shape[1]
            and self.momentum is not None
            and all(
                t is not None and t.dtype is torch.float32
                for t in (self.weight, self.bias, self.running_mean, self.running_var)
            )
        )


class NormReLU(NormAct):
    """nn.BatchNorm2d and nn.ReLU."""

    activation = nn.ReLU


class NormELU(NormAct):
    """nn.BatchNorm2d and nn.ELU."""

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
            *_rows_and_channels(x),
            *_pointers(weight, bias),
            ctypes.c_float(eps),
            *_pointers(mean, var, scale, shift),
        )
        ctx.save_for_backward(x, mean, var, scale, shift)
        ctx.eps = eps
        ctx.elu = elu
        ctx.library = library
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, mean, var, scale, shift = ctx.saved_tensors
        dy = grads[0].contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x)
        dweight, dbias = torch.empty(2, x.shape[1])
        ctx.library.norm_act_backward(
            ctx.elu,
            *_pointers(dy, x, dx),
            *_rows_and_channels(x),
            ctypes.c_float(ctx.eps),
            *_pointers(mean, var, scale, shift, dweight, dbias),
        )
        return dx, dweight, dbias, None, None, None


class MaxPool2x2(nn.MaxPool2d):
    """nn.MaxPool2d(2), bit-identical: [B, C, H, W] -> [B, C, H / 2, W / 2]."""

    library: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """Pool [B, C, H, W] to [B, C, H / 2, W / 2]."""
        if not _has_supported_layout(x, self.library) or x.shape[2] % 2 or x.shape[3] % 2:
            fallback: Tensor = super().forward(x)
            return fallback
        pooled: Tensor = _Pool.apply(x, self.library)
        return pooled


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, library: Any) -> Any:
        n, c, h, w = x.shape
        channels_last = torch.channels_last
        y = torch.empty(n, c, h // 2, w // 2, dtype=x.dtype, memory_format=channels_last)
        argmax = torch.empty(n, c, h // 2, w // 2, dtype=x.dtype, memory_format=channels_last)
        library.pool(*_pointers(x, y, argmax), ctypes.c_long(n), *map(ctypes.c_int, (h, w, c)))
        ctx.save_for_backward(argmax)
        ctx.library = library
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (argmax,) = ctx.saved_tensors
        dy = grads[0].contiguous(memory_format=torch.channels_last)
        n, c, h, w = argmax.shape
        dx = torch.empty(n, c, 2 * h, 2 * w, dtype=dy.dtype, memory_format=torch.channels_last)
        ctx.library.pool_backward(
            *_pointers(dy, argmax, dx), ctypes.c_long(n), *map(ctypes.c_int, (2 * h, 2 * w, c))
        )
        return dx, None


def _has_supported_layout(x: Tensor, library: Any) -> bool:
    return (
        library is not None
        and (x.device.type, x.dtype, x.ndim) == ("cpu", library.dtype, 4)
        and x.shape[1] % 16 == 0
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(t.data_ptr()) for t in tensors]


def _rows_and_channels(x: Tensor) -> tuple[ctypes.c_long, ctypes.c_int]:
    return ctypes.c_long(x.numel() // x.shape[1]), ctypes.c_int(x.shape[1])


def fuse_modules(net: nn.Module, library: Any) -> None:
    """Replace the modules of `net` for which there are kernels, in place.

    In a Sequential a BatchNorm2d followed by a ReLU or an ELU becomes a NormReLU or a NormELU.
    Every MaxPool2d(2) becomes a MaxPool2x2. Weights keep their names.
    """
    for module in list(net.modules()):
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            for position, (norm, act) in enumerate(itertools.pairwise(list(module)), 1):
                if (
                    type(norm) is nn.BatchNorm2d
                    and type(act) in FUSED
                    and getattr(act, "alpha", 1.0) == 1.0
                ):
                    norm.__class__ = FUSED[type(act)]
                    norm.library = library
                    module[position] = nn.Identity()
        if (
            type(module) is nn.MaxPool2d
            and repr(module) == repr(nn.MaxPool2d(2))
            and not module.return_indices
        ):
            module.__class__ = MaxPool2x2
            module.library = library
