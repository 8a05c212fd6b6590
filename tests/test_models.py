"""Every network: its row below says what it must be."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from kd import models, registry
from kd.evaluate import size
from kd.kernels import library, quicken
from kd.models import Net


class Row(NamedTuple):
    settings: dict
    params: int  # for 10 classes and 32 x 32 images
    macs: int
    taps: dict[str, tuple[int, ...]]


def cnn_taps(s: int) -> dict[str, tuple[int, ...]]:
    full, half = {"conv1": (s, 32, 32), "conv2": (s, 32, 32)}, {"conv3": (2 * s, 16, 16), "conv4": (2 * s, 16, 16)}
    return full | {"pool1": (s, 16, 16)} | half | {"pool2": (2 * s, 8, 8), "hidden": (32 * s,), "head": (10,)}


CNN = {"name": "cnn", "activation": "relu", "dropout": 0.5}
TABLE = {
    "cnn-16": Row({**CNN, "scale": 16}, 1_070_970, 7_394_304, cnn_taps(16)),
    "cnn-32": Row({**CNN, "scale": 32}, 4_271_338, 28_682_240, cnn_taps(32)),
}


def build(row: Row) -> Net:
    return models.build(models.find(row.settings["name"], "model").Config(**row.settings), 10, 32)


def test_every_model_has_a_row_here() -> None:
    missing = set(registry.choices("models")) - {row.settings["name"] for row in TABLE.values()}
    assert not missing, f"add a row to TABLE in {__file__} for: {', '.join(sorted(missing))}"


@pytest.mark.parametrize("name", TABLE)
def test_a_model_is_what_its_row_says(name: str) -> None:
    row = TABLE[name]
    net = build(row)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert net.shapes(32) == row.taps
    assert size(net, 32) == {"params": row.params, "macs": row.macs}
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), "asking for shapes moved a buffer"
    assert net.training, "asking for shapes changed the mode"


@pytest.mark.parametrize("name", TABLE)
def test_taps_are_what_the_next_stage_reads(name: str) -> None:
    net = build(TABLE[name]).eval()
    x = torch.randn(2, 3, 32, 32)
    out = net.tapped(x, net.stages)
    assert torch.equal(out.logits, net(x))
    for stage in net.stages.values():
        x = stage(x)
    assert torch.equal(x, out.logits)
    *_, last = list(out.taps)[:-1]
    assert torch.equal(net.head(out.taps[last]), out.logits)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("ours", [False, True])
def test_a_tap_before_an_activation(ours: bool, inplace: bool, tmp_path: Path) -> None:
    """Also where kd's kernels compute norm and ReLU in one."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(16)
    nn.init.normal_(norm.bias)
    net = Net(
        first=nn.Sequential(nn.Conv2d(3, 16, 3), norm, nn.ReLU(inplace)),
        pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        head=nn.Linear(16, 2),
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    pre = norm(net.stages["first"][0](x))
    logits = net(x)
    if ours:
        quicken(net, library(tmp_path))
    out = net.tapped(x, ["first.pre", "first", "pool.pre"])
    torch.testing.assert_close(out.taps["first.pre"], pre)
    torch.testing.assert_close(out.taps["first"], pre.relu())
    torch.testing.assert_close(out.taps["pool.pre"], pre.relu().mean((2, 3)))
    torch.testing.assert_close(out.logits, logits)


def test_a_tap_that_is_overwritten_in_place_is_refused() -> None:
    net = Net(first=nn.Linear(4, 4), second=nn.ReLU(inplace=True), head=nn.Linear(4, 2))
    with pytest.raises(RuntimeError, match="'first' was overwritten in place"):
        net.tapped(torch.randn(3, 4), ["first"])
