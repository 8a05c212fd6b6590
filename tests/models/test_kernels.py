"""kd's own kernel, against PyTorch in float64; and what happens where it cannot be had."""

import copy
import json
import pickle
import platform
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import run
from torch import Tensor, nn

from kd.core.errors import UserError
from kd.models import kernels
from kd.training import device

CHANNELS_LAST = torch.channels_last


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    found = kernels.library(tmp_path_factory.mktemp("kernels"), request.param)
    if shutil.which("g++") is None or platform.system() != "Linux":
        pytest.skip("no g++ here: PyTorch's operators are used")
    assert found is not None, "the kernels do not compile, or are wrong"
    return found


ACTS = pytest.mark.parametrize("act", [kernels.NormReLU, kernels.NormELU])


def norms(
    library: Any, channels: int, act: type[kernels.NormAct]
) -> tuple[nn.BatchNorm2d, kernels.NormAct]:
    draw = torch.Generator().manual_seed(1)
    slow, fast = nn.BatchNorm2d(channels).double(), act(channels)
    with torch.no_grad():
        fast.weight.copy_(torch.rand(channels, generator=draw) + 0.5)
        fast.bias.copy_(torch.randn(channels, generator=draw))
    slow.load_state_dict(fast.state_dict())
    fast.library = library
    return slow, fast


def step(norm: nn.Module, x: Tensor, dy: Tensor, after: nn.Module | None = None) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = after(norm(leaf)) if after else norm(leaf)
    y.backward(dy)
    return [
        y.detach(),
        leaf.grad,
        norm.weight.grad,
        norm.bias.grad,
        norm.running_mean,
        norm.running_var,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 16, 9, 7), (3, 32, 1, 1), (2, 64, 32, 32), (1, 48, 5, 5)])
@pytest.mark.parametrize("offset", [0.0, 30.0], ids=["centred", "far from 0"])
@ACTS
def test_values_gradients_and_statistics_are_those_of_float64(
    library: Any, shape: tuple[int, ...], offset: float, act: Any
) -> None:
    draw = torch.Generator().manual_seed(0)
    x, dy = (
        (torch.randn(shape, generator=draw) * s + o).to(library.dtype)
        for s, o in ((3, offset), (1, 0))
    )
    x, dy = x.to(memory_format=CHANNELS_LAST), dy.to(memory_format=CHANNELS_LAST)
    slow, fast = norms(library, shape[1], act)
    after, names = act.activation(), ("y", "dx", "dw", "db", "mean", "var")
    assert fast._is_supported(x)
    near = {torch.bfloat16: {"y": 8e-3, "dx": 8e-3}, torch.float32: dict.fromkeys(names, 2e-5)}[
        library.dtype
    ]
    for right, ours, name in zip(
        step(slow, x.double(), dy.double(), after), step(fast, x, dy), names, strict=True
    ):
        scale = right.abs().max().item()
        assert (right - ours.double()).abs().max().item() <= near.get(name, 2e-3) * scale, name
    slow.eval(), fast.eval()
    with torch.no_grad():
        off = 0.02 if library.dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(
            after(slow(x.double())), fast(x).double(), rtol=off / 2, atol=off
        )


@pytest.mark.parametrize("size", [1e-4, 1.0, 30.0, 1e30])
def test_the_elu_of_small_and_of_large_numbers(library: Any, size: float) -> None:
    """By its own kernel, to the last bits."""
    x = size * torch.linspace(-4, 4, 2048).view(2, 16, 8, 8).to(library.dtype).to(
        memory_format=CHANNELS_LAST
    )
    norm = kernels.NormELU(16, eps=0.0).eval()
    norm.library = library
    with torch.no_grad():
        off = {torch.bfloat16: 2**-8, torch.float32: 2**-21}[library.dtype]
        torch.testing.assert_close(norm(x).double(), F.elu(x.double()), rtol=off, atol=0)


@ACTS
def test_no_number_of_threads_changes_a_bit(library: Any, act: Any) -> None:
    x = (
        torch.randn(32, 16, 16, 16, generator=torch.Generator().manual_seed(0))
        .to(library.dtype)
        .to(memory_format=CHANNELS_LAST)
    )
    found, threads = [], torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append(step(norms(library, 16, act)[1], x, x))
    torch.set_num_threads(threads)
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


@ACTS
def test_what_is_not_a_number_is_not_hidden(library: Any, act: Any) -> None:
    x = torch.zeros(2, 16, 4, 4).to(library.dtype).to(memory_format=CHANNELS_LAST)
    x[0, 3, 1, 1] = torch.nan
    y, dx, *_ = step(norms(library, 16, act)[1], x, torch.ones_like(x))
    assert y[:, 3].isnan().all()
    assert dx[:, 3].isnan().all()
    assert not y[:, :3].isnan().any()


@pytest.mark.parametrize("shape", [(4, 16, 8, 6), (2, 48, 2, 2), (3, 32, 5, 8)])
def test_pooling_is_pytorchs_bit_for_bit(library: Any, shape: tuple[int, ...]) -> None:
    """Ties go to the first, a NaN is the largest."""
    x = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(0)).to(library.dtype)
    x[0, 1, 1, 1] = torch.nan
    x = x.to(memory_format=CHANNELS_LAST)
    slow, fast = nn.MaxPool2d(2), nn.MaxPool2d(2)
    kernels.fuse_modules(fast, library)
    assert type(fast) is kernels.MaxPool2x2
    found = []
    for pool in (slow, fast):
        leaf = x.clone().requires_grad_()
        y = pool(leaf)
        y.backward(
            torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(library.dtype)
        )
        found.append((y, leaf.grad))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(3), nn.MaxPool2d(2, 1), nn.MaxPool2d(2, padding=1)], ids=repr
)
def test_other_pooling_is_left_alone(library: Any, pool: nn.Module) -> None:
    kernels.fuse_modules(pool, library)
    assert type(pool) is nn.MaxPool2d


@pytest.mark.parametrize(
    ("channels", "change"),
    [
        (16, lambda x: x.to(torch.float32 if x.dtype is torch.bfloat16 else torch.bfloat16)),
        (16, lambda x: x.contiguous()),
        (8, lambda x: x),
        (20, lambda x: x),
    ],
    ids=["another dtype", "not channels_last", "8 channels", "20 channels"],
)
@ACTS
def test_what_does_not_fit_is_pytorchs(library: Any, channels: int, change: Any, act: Any) -> None:
    x = change(torch.randn(4, channels, 6, 6).to(library.dtype).to(memory_format=CHANNELS_LAST))
    slow, fast = norms(library, channels, act)
    assert not fast._is_supported(x)
    torch.testing.assert_close(fast(x), act.activation()(slow.float()(x)))


def test_a_quickened_network_keeps_its_names_and_its_values(library: Any) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        names = (nn.ReLU(), nn.GELU(), nn.ELU(), nn.ELU(0.5))
        norms = [module for act in names for module in (nn.BatchNorm2d(16), act)]
        return nn.Sequential(nn.Conv2d(3, 16, 3), *norms)

    plain, quick = network(), network()
    kernels.fuse_modules(quick, library)
    quick = pickle.loads(pickle.dumps(copy.deepcopy(quick)))
    assert list(plain.state_dict()) == list(quick.state_dict())
    found = [type(m).__name__ for m in quick]
    assert (
        " ".join(found)
        == "Conv2d NormReLU Identity BatchNorm2d GELU NormELU Identity BatchNorm2d ELU"
    )
    x = torch.randn(4, 3, 8, 8).to(memory_format=CHANNELS_LAST)
    with torch.autocast("cpu", torch.bfloat16, enabled=library.dtype is torch.bfloat16):
        off = 0.05 if library.dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(plain(x), quick(x), rtol=off, atol=off)


def test_without_a_compiler_or_with_wrong_kernels_there_are_none(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: Any) -> None:
        """Leaves the output as it was."""

    right = {name: value for name, value in vars(library).items() if name != "path"}
    assert kernels._self_test(SimpleNamespace(**right))
    for name in right.keys() - {"dtype"}:
        assert not kernels._self_test(SimpleNamespace(**(right | {name: wrong}))), name
    monkeypatch.setattr(kernels.shutil, "which", lambda _: None)
    assert kernels.library(tmp_path, library.dtype) is None
    monkeypatch.setattr(kernels.shutil, "which", lambda _: "/bin/false")
    assert kernels.library(tmp_path / "other", library.dtype) is None


def test_bf16_is_tried_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    tried = []

    def trial(pays: bool) -> Any:
        return lambda: tried.append(pays) or {"pays": pays}

    monkeypatch.setattr(device, "try_bf16", trial(False))
    assert device.resolve("cpu", "auto", tmp_path).dtype is torch.float32
    monkeypatch.setattr(device, "try_bf16", trial(True))
    assert device.resolve("cpu", "auto", tmp_path).dtype is torch.float32
    (kept,) = tmp_path.glob("bf16-*.json")
    assert json.loads(kept.read_text()) == {"pays": False}
    kept.write_text("{")
    assert device.resolve("cpu", "auto", tmp_path).dtype is torch.bfloat16
    assert tried == [False, True]


def test_compile_without_a_compiler_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"compile: on a CPU .* needs g\+\+"):
        device.resolve("cpu", "fp32", tmp_path, compile=True)


@pytest.mark.slow
def test_bf16_that_is_wrong_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    found = device.try_bf16()
    assert 0 < found["error"] < 0.03
    right = F.conv2d

    def wrong(x: Tensor, weight: Tensor, **keys: Any) -> Tensor:
        y = right(x, weight, **keys)
        return y * 1.1 if x.dtype is torch.bfloat16 else y

    monkeypatch.setattr(device.F, "conv2d", wrong)
    assert not device.try_bf16()["pays"]


@pytest.mark.slow
def test_a_compiled_student_learns_the_same(composed: Any, tmp_path: Path) -> None:
    """With dropout off, whose draws differ there."""
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    counters = torch._dynamo.utils.counters
    counters.clear()
    found = {}
    for compiled in ("true", "false"):
        config = composed(
            "method=standard",
            "student.dropout=0",
            f"compile={compiled}",
            f"paths.runs={tmp_path}/{compiled}",
        )
        found[compiled] = run(config)["metrics"]
        assert counters["stats"]["unique_graphs"] == 1, (
            "all of the network is one graph, and nothing else is compiled"
        )
        assert not counters["graph_break"]
    assert found["true"] == pytest.approx(found["false"], rel=0.02, abs=0.02)
