"""Every network: its row below says what it must be."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from kd import models
from kd.config.schema import model_name
from kd.core import registry
from kd.models import Net
from kd.models.kernels import NormAct, fuse_modules, library
from kd.training.metrics import size

Shapes = dict[str, tuple[int, ...]]
CONF = Path(__file__).parents[2] / "conf" / "model"


class Row(NamedTuple):
    settings: dict
    params: int  # for `classes` classes and 32 x 32 images
    macs: int
    taps: Shapes
    linear: set[str] = set()  # noqa: RUF012  # stages that end in no activation, beside pool and head
    classes: int = 100


def chosen(name: str) -> dict:
    """What conf/model/<name>.yaml says, with what it builds on."""
    own = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    return {k: v for base in own.pop("defaults", []) for k, v in chosen(base).items()} | own


def cnn_taps(s: int) -> Shapes:
    full, half = (
        {"conv1": (s, 32, 32), "conv2": (s, 32, 32)},
        {"conv3": (2 * s, 16, 16), "conv4": (2 * s, 16, 16)},
    )
    return (
        full
        | {"pool1": (s, 16, 16)}
        | half
        | {"pool2": (2 * s, 8, 8), "hidden": (32 * s,), "head": (10,)}
    )


def maps(stem: int, *channels: int) -> Shapes:
    """A stem and stages, of which the first keeps the size and each other halves it."""
    stages = {f"stage{n}": (c, 64 >> n, 64 >> n) for n, c in enumerate(channels, 1)}
    return {"stem": (stem, 32, 32), **stages, "pool": channels[-1:], "head": (100,)}


def vit(width: int) -> Shapes:
    tokens = dict.fromkeys(("embed", *(f"block{n}" for n in range(1, 13))), (65, width))
    return tokens | {"pool": (width,), "head": (100,)}


VGG = {f"block{n}": (min(512, 32 << n), s, s) for n, s in enumerate((32, 16, 8, 4, 4), 1)}
VGG |= {"pool": (512,), "head": (100,)}
MOBILE: Shapes = {
    "stem": (16, 16, 16),
    "stage1": (12, 16, 16),
    "stage2": (16, 8, 8),
    "stage3": (48, 4, 4),
    "stage4": (160, 2, 2),
    "last": (1280, 2, 2),
    "pool": (1280,),
    "head": (100,),
}
SHUFFLE1: Shapes = {
    "stem": (24, 32, 32),
    "stage1": (240, 16, 16),
    "stage2": (480, 8, 8),
    "stage3": (960, 4, 4),
    "pool": (960,),
    "head": (100,),
}
SHUFFLE2: Shapes = {
    "stem": (24, 32, 32),
    "stage1": (116, 16, 16),
    "stage2": (232, 8, 8),
    "stage3": (464, 4, 4),
    "last": (1024, 4, 4),
    "pool": (1024,),
    "head": (100,),
}
NARROW, WIDE = maps(16, 16, 32, 64), maps(32, 64, 128, 256)
PUBLISHED = {  # a file of conf/model: parameters, multiply-accumulates, taps
    "resnet8": (83_892, 12_507_392, NARROW),
    "resnet14": (181_108, 26_663_168, NARROW),
    "resnet20": (278_324, 40_818_944, NARROW),
    "resnet32": (472_756, 69_130_496, NARROW),
    "resnet44": (667_188, 97_442_048, NARROW),
    "resnet56": (861_620, 125_753_600, NARROW),
    "resnet110": (1_736_564, 253_155_584, NARROW),
    "resnet8x4": (1_233_540, 177_071_104, WIDE),
    "resnet32x4": (7_433_860, 1_083_040_768, WIDE),
    "wrn_16_1": (180_916, 26_663_168, NARROW, {"stem"}),
    "wrn_16_2": (703_284, 101_118_464, maps(16, 32, 64, 128)),
    "wrn_40_1": (569_780, 83_286_272, NARROW, {"stem"}),
    "wrn_40_2": (2_255_156, 327_610_880, maps(16, 32, 64, 128)),
    "vgg8": (3_965_028, 96_192_512, VGG),
    "vgg11": (9_277_284, 209_438_720, VGG),
    "vgg13": (9_462_180, 284_936_192, VGG),
    "vgg16": (14_774_436, 398_182_400, VGG),
    "vgg19": (20_086_692, 511_428_608, VGG),
    "mobilenetv2": (812_836, 6_523_648, MOBILE, {"stage1", "stage2", "stage3", "stage4"}),
    "shufflenetv1": (949_258, 38_691_456, SHUFFLE1),
    "shufflenetv2": (1_355_528, 44_504_448, SHUFFLE2, {"stage1", "stage2", "stage3"}),
    "resnet18": (11_220_132, 555_468_800, maps(64, 64, 128, 256, 512)),
    "resnet34": (21_328_292, 1_159_448_576, maps(64, 64, 128, 256, 512)),
    "resnet50": (23_705_252, 1_298_014_208, maps(64, 256, 512, 1024, 2048)),
    "vit_tiny": (5_380_132, 365_124_864, vit(192), {*vit(192)}),
    "vit_small": (21_376_996, 1_420_343_808, vit(384), {*vit(384)}),
}
TORCHVISION = {
    "conv1": (64, 16, 16),
    "bn1": (64, 16, 16),
    "relu": (64, 16, 16),
    "maxpool": (64, 8, 8),
}
TORCHVISION |= {
    f"layer{n}{at}": (32 << n, 16 >> n, 16 >> n) for n in (1, 2, 3, 4) for at in (".0", ".1", "")
}
POOL: Shapes = {"pool": (512,), "head": (100,)}
CNN = {"name": "cnn", "activation": "relu", "dropout": 0.5}
POOLED = {"pool1", "pool2"}
TABLE = {
    "cnn-16": Row({**CNN, "scale": 16}, 1_070_970, 7_394_304, cnn_taps(16), POOLED, 10),
    "cnn-32": Row({**CNN, "scale": 32}, 4_271_338, 28_682_240, cnn_taps(32), POOLED, 10),
    **{name: Row(chosen(name), *said) for name, said in PUBLISHED.items()},
    "torchvision": Row(
        chosen("torchvision"), 11_227_812, 37_062_656, TORCHVISION | {"avgpool": (512, 1, 1)} | POOL
    ),
    "timm": Row(
        chosen("timm"),
        11_227_812,
        37_062_656,
        {name.replace("relu", "act1"): shape for name, shape in TORCHVISION.items()}
        | {"global_pool": (512,)}
        | POOL,
    ),
}
SMALL = [
    "cnn-16", "resnet8x4", "wrn_16_2", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1",
    "shufflenetv2", "resnet18", "resnet50", "vit_tiny",
]  # fmt: skip


def build(row: Row, image: int = 32) -> Net:
    return models.build(
        models.find(row.settings["name"], "model").Config(**row.settings), row.classes, image
    )


def test_every_model_has_a_row_here() -> None:
    missing = set(registry.choices("models")) - {row.settings["name"] for row in TABLE.values()}
    assert not missing, f"add a row to TABLE in {__file__} for: {', '.join(sorted(missing))}"
    configured = [chosen(path.stem) for path in CONF.glob("*.yaml")]
    assert {row.settings["name"] for row in TABLE.values()} <= {
        settings["name"] for settings in configured
    }


@pytest.mark.slow
@pytest.mark.parametrize("image", [8, 64])
def test_every_choice_builds_and_has_a_name_of_its_own(image: int) -> None:
    names = []
    for path in sorted(CONF.glob("*.yaml")):
        settings = chosen(path.stem)
        config = models.find(settings["name"], "model").Config(**settings)
        names.append(model_name(config))
        with torch.device("meta"):
            net = models.build(config, 7, image)
        assert list(net.shapes(image).values())[-1] == (7,), path
    assert len(set(names)) == len(names)
    assert {"cnn-16", "cnn-32", "resnet8x4", "resnet110", "wrn-40-2", "vgg13", "vit-tiny"} <= set(
        names
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_a_model_is_what_its_row_says(name: str) -> None:
    row = TABLE[name]
    with torch.device("meta"):
        net = build(row)
    assert net.shapes(32) == row.taps
    assert list(net.shapes(32)) == list(row.taps)
    assert size(net, 32) == {"params": row.params, "macs": row.macs}


def test_asking_for_shapes_leaves_the_network_as_it_was() -> None:
    net = build(TABLE["resnet8"])
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.shapes(32)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), "a buffer was moved"
    assert net.training, "the mode was changed"


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_learns(name: str) -> None:
    torch.manual_seed(0)
    net = build(TABLE[name], 16)
    F.cross_entropy(net(torch.randn(4, 3, 16, 16)), torch.tensor([0, 1, 2, 3])).backward()
    for parameter, value in net.named_parameters():
        assert value.grad is not None, parameter
        assert value.grad.isfinite().all(), parameter
        assert value.grad.any(), parameter


@pytest.mark.parametrize("name", SMALL)
def test_taps_are_what_the_next_stage_reads(name: str) -> None:
    torch.manual_seed(0)
    row = TABLE[name]
    net = build(row, 8).eval()
    images = x = torch.randn(2, 3, 8, 8)
    out = net.forward_taps(x, [*net.stages, *(f"{stage}.pre" for stage in net.stages)])
    for stage, module in net.stages.items():
        before, x = x, module(x)
        assert torch.equal(out.taps[stage], x)
        pre = out.taps[f"{stage}.pre"]
        if stage in row.linear | {"pool", "head"}:
            assert torch.equal(pre, x)
            continue
        *inner, activation = module
        for part in inner:
            before = part(before)
        assert torch.equal(pre, before)
        assert torch.equal(activation(pre), x)
        assert pre.min() < 0, "nothing was cut off"
    assert torch.equal(x, out.logits)
    assert torch.equal(net(images), out.logits)
    *_, last = list(net.stages)[:-1]
    assert torch.equal(net.head(out.taps[last]), out.logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in SMALL if name not in ("resnet18", "resnet50", "vit_tiny")]
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_our_kernels_compute_the_same(
    name: str, training: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The logits are as near to those in float64 as PyTorch's own are, or nearly so."""
    if (kernels := library(tmp_path, dtype)) is None:
        pytest.skip("no compiler")
    found, half = [], dtype is torch.bfloat16
    for ours, to in ((False, torch.float64), (False, torch.float32), (True, torch.float32)):
        torch.manual_seed(0)
        net = build(TABLE[name], 16).train(training).to(memory_format=torch.channels_last)
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if ours:
            fuse_modules(net, kernels)
            assert any(isinstance(m, NormAct) for m in net.modules())
        x = torch.randn(8, 3, 16, 16).to(memory_format=torch.channels_last)
        with (
            torch.set_grad_enabled(training),
            torch.autocast("cpu", dtype, enabled=half and to is torch.float32),
        ):
            found.append(net.to(to)(x.to(to)).detach().double())
    exact, theirs, mine = found
    assert (mine - exact).norm() <= 1.5 * (theirs - exact).norm() + (
        0.01 if half else 1e-6
    ) * exact.norm()


@pytest.mark.parametrize("name", ["wrn_16_2", "wrn_16_1"])
def test_a_wide_resnet_is_the_papers(name: str) -> None:
    """The order is norm, ReLU, convolution, as in figure 1.

    Here, however, the norm that opens a stage ends the one before it.
    """
    torch.manual_seed(0)
    net = build(TABLE[name], 8).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(values, 0.5)
    layers = iter(
        [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]
    )

    def block(x: Tensor, shape_changes: bool) -> Tensor:
        norm, conv = next(layers), next(layers)
        inside = conv(normed := norm(x).relu())
        norm, conv = next(layers), next(layers)
        return conv(norm(inside).relu()) + (next(layers)(normed) if shape_changes else x)

    images = torch.randn(2, 3, 8, 8)
    x = next(layers)(images)
    for stage in range(3):
        for n in range(2):
            x = block(x, n == 0 and (stage > 0 or name == "wrn_16_2"))
    x = next(layers)(x).relu().mean((2, 3))
    torch.testing.assert_close(next(layers)(x), net(images))
    assert next(layers, None) is None


def test_patches_must_fit() -> None:
    with pytest.raises(RuntimeError, match="multiple of patch=4"):
        build(TABLE["vit_tiny"], 30)


@pytest.mark.slow
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("act", [nn.ReLU, nn.ELU])
def test_a_tap_before_an_activation(act: Any, ours: bool, inplace: bool, tmp_path: Path) -> None:
    """Also where kd's kernels compute norm and activation in one."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(16)
    nn.init.normal_(norm.bias)
    net = Net(
        first=nn.Sequential(nn.Conv2d(3, 16, 3), norm, act(inplace=inplace)),
        pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        head=nn.Linear(16, 2),
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    pre = norm(net.stages["first"][0](x))
    logits = net(x)
    if ours:
        fuse_modules(net, library(tmp_path, torch.float32))
    out = net.forward_taps(x, ["first.pre", "first", "pool.pre"])
    torch.testing.assert_close(out.taps["first.pre"], pre)
    torch.testing.assert_close(out.taps["first"], act()(pre))
    torch.testing.assert_close(out.taps["pool.pre"], act()(pre).mean((2, 3)))
    torch.testing.assert_close(out.logits, logits)


def test_a_tap_that_is_overwritten_in_place_is_refused() -> None:
    net = Net(first=nn.Linear(4, 4), second=nn.ReLU(inplace=True), head=nn.Linear(4, 2))
    with pytest.raises(RuntimeError, match="'first' was overwritten in place"):
        net.forward_taps(torch.randn(3, 4), ["first"])
