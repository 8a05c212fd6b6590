"""Classifiers of torchvision and timm: their taps, their published weights, and what is refused."""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models as zoo

import kd as package
from kd import models
from kd.core.errors import UserError
from kd.models import weights as store
from kd.models.wrapped import Wrapped

SPLIT = ["model@student=torchvision", "data=digits", "method=logits"]


def build(
    name: str, model: str, pretrained: bool = False, classes: int = 5, size: int = 32
) -> Wrapped:
    settings = models.find(name, "model").Config(name=name, model=model, pretrained=pretrained)
    return models.build(settings, classes, size)


@pytest.mark.slow
def test_taps_are_those_of_a_pass_by_hand() -> None:
    torch.manual_seed(0)
    net = build("torchvision", "resnet18").eval()
    images = torch.randn(2, 3, 32, 32)
    own = copy.deepcopy(net).net
    x = own.relu(own.bn1(own.conv1(images)))
    x = own.layer3(own.layer2(own.layer1(own.maxpool(x))))
    first = own.layer4[0](x)
    inner = own.layer4[1].conv1(first)
    pre = own.layer4[1].bn2(own.layer4[1].conv2(own.layer4[1].bn1(inner).relu())) + first
    pool = pre.relu().mean((2, 3))
    wanted = {
        "layer3": x,
        "layer4.0": first,
        "layer4.1.conv1": inner,
        "layer4.pre": pre,
        "layer4.1.pre": pre,
        "layer4": pre.relu(),
        "avgpool": pool[:, :, None, None],
        "avgpool.pre": pool[:, :, None, None],
        "pool": pool,
        "pool.pre": pool,
        "head": own.fc(pool),
        "head.pre": own.fc(pool),
    }
    for moved in (net, copy.deepcopy(net), net.to(memory_format=torch.channels_last)):
        out = moved.forward_taps(images, wanted)
        assert set(out.taps) == set(wanted)
        for name, value in wanted.items():
            torch.testing.assert_close(out.taps[name], value, msg=name)
        torch.testing.assert_close(out.logits, own(images))
        assert torch.equal(moved.head(out.taps["pool"]), out.logits)
        assert not any(
            module._forward_hooks or module._forward_pre_hooks for module in moved.modules()
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("torchvision", "shufflenet_v2_x0_5"),
        ("torchvision", "squeezenet1_1"),
        ("timm", "test_vit"),
        ("timm", "test_resnet"),
        ("timm", "mobilenetv3_small_050"),
    ],
)
def test_every_parameter_learns(name: str, model: str) -> None:
    if name == "timm":
        pytest.importorskip("timm")
    torch.manual_seed(0)
    net = build(name, model, size=64)
    shapes = net.shapes(64)
    out = net.forward_taps(torch.randn(4, 3, 64, 64), shapes)
    assert {tap: tuple(value.shape[1:]) for tap, value in out.taps.items()} == shapes
    assert list(shapes)[-1] == "head"
    assert list(shapes)[-2] == "pool" or model == "squeezenet1_1"
    F.cross_entropy(out.logits, torch.tensor([0, 1, 2, 3])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert all(module.inplace is False for module in net.modules() if hasattr(module, "inplace"))


class Odd(nn.Module):
    """One module runs twice, one gives two tensors, and one is overwritten.

    No linear layer gives the logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.pair, self.spoiled, self.last = (
            nn.Conv2d(3, 3, 1),
            Pair(),
            nn.Conv2d(3, 3, 1),
            nn.Linear(3, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.pair(self.twice(self.twice(x)))
        z = self.spoiled(x)
        z += y
        return self.last(z.mean((2, 3))) * 2


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x - 1


def test_what_is_no_tap_is_not_offered_and_refused() -> None:
    net = Wrapped(Odd, 8)
    assert list(net.shapes(8)) == ["last", "head"]
    for name, what in (
        ("twice", "runs 2 times"),
        ("pair", "but a tuple"),
        ("spoiled", "overwritten in place"),
    ):
        with pytest.raises(RuntimeError, match=f"tap '{name}' of Odd .*{what}"):
            net.forward_taps(torch.randn(2, 3, 8, 8), [name])
    with pytest.raises(RuntimeError, match="Odd does not end in a linear layer"):
        _ = net.head


def published(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Have torchvision publish weights, of 1000 classes."""
    torch.manual_seed(1)
    weights = zoo.get_model("shufflenet_v2_x0_5", weights=None).state_dict()
    monkeypatch.setattr(zoo.ShuffleNet_V2_X0_5_Weights, "get_state_dict", lambda *_, **__: weights)
    return weights


@pytest.mark.slow
def test_published_weights_but_a_new_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = published(monkeypatch)
    net = build("torchvision", "shufflenet_v2_x0_5", pretrained=True)
    for name, tensor in net.net.state_dict().items():
        assert name.startswith("fc.") or torch.equal(tensor, weights[name]), name
    assert net.head.weight.shape == (5, 1024)
    with torch.device("meta"):
        empty = build("torchvision", "shufflenet_v2_x0_5", pretrained=True)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert empty.shapes(32) == net.shapes(32)


@pytest.mark.slow
def test_a_trained_network_is_loaded_without_the_published_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as there:
        published(there)
        net = build("torchvision", "shufflenet_v2_x0_5", pretrained=True).eval()
    unreachable(monkeypatch)
    said = {"name": "torchvision", "model": "shufflenet_v2_x0_5", "pretrained": True}
    card = store.build_metadata(said, tuple("abcde"), 32, torch.zeros(3), torch.ones(3))
    store.save(net, tmp_path / "student.safetensors", card)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(package.load(tmp_path)(x), net(x))


def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)


BAD = {  # what is typed: what the one line must say
    "near": (
        "torchvision student.model=resnet81",
        "student.model: 'resnet81' is not known; did you mean resnet18 or ",
    ),
    "auxiliary": (
        "torchvision student.model=googlenet",
        "student.model: googlenet has auxiliary classifiers",
    ),
    "offline": (
        "torchvision student.pretrained=true",
        "student.pretrained: cannot load the weights of resnet18 (no route)",
    ),
    "too small": (
        "torchvision student.model=alexnet",
        "student.name: torchvision-alexnet cannot take images of 32 pixels "
        "(Given input size: (256x1x1). ",
    ),
    "tap": (
        "torchvision method=feature method.pairs=[[nose,pool2]]",
        "method.pairs: the student has no tap 'nose'; allowed: "
        "conv1, bn1, relu, maxpool, layer1.0, layer1.1, layer1, ",
    ),
    "near, timm": (
        "timm student.model=resnet81",
        "student.model: 'resnet81' is not known; did you mean resnet18 or ",
    ),
    "weights, timm": (
        "timm student.model=resnet18.b1",
        "student.model: 'resnet18.b1' is not known; did you mean ",
    ),
    "none, timm": (
        "timm student.model=resnet18d_nope",
        "student.model: 'resnet18d_nope' is not known; did you mean resnet18d",
    ),
    "offline, timm": (
        "timm student.pretrained=true",
        "student.pretrained: cannot load the weights of resnet18 (no route)",
    ),
    "patch": (
        "vit_tiny student.patch=3",
        "student.name: vit-tiny cannot take images of 32 pixels (the image size must be a",
    ),
    "heads": (
        "vit_tiny student.heads=5",
        "student: width must be a multiple of heads, got 192 and 5",
    ),
    "depth": (
        "resnet20 student.depth=21",
        "student.depth: should be 8, 14, 20, 32, 44, 56 or 110, got 21",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_and_exit_code_2(
    case: str, kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, expected = BAD[case]
    if words.startswith("timm"):
        timm = pytest.importorskip("timm")
        make = timm.create_model

        def create(name: str, pretrained: bool, **keys: Any) -> nn.Module:
            if pretrained:
                raise OSError("no route")
            return make(name, **keys)

        monkeypatch.setattr(timm, "create_model", create)
    unreachable(monkeypatch)
    model, *rest = words.split()
    said = kd(
        f"model@student={model}",
        "model@teacher=cnn4",
        "data=digits",
        "device=cpu",
        "method=logits",
        *rest,
    )
    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert said.err.startswith(f"kd: {expected}")


def test_timm_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr("kd.models.timm.find_spec", lambda _: None)
    with pytest.raises(
        ValueError, match=r"the package timm is not installed; pip install -e '.\[timm\]'"
    ):
        build("timm", "resnet18")


@pytest.mark.slow
def test_weights_of_another_image_size_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        big = zoo.get_model("vit_b_16", weights=None).state_dict()
    monkeypatch.setattr(zoo.ViT_B_16_Weights, "get_state_dict", lambda *_, **__: big)
    # 86M numbers, drawn for nothing
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, *_, **__: tensor)
    with pytest.raises(
        UserError,
        match="pretrained: the published weights of vit_b_16 do not fit images of this size",
    ):
        build("torchvision", "vit_b_16", pretrained=True)
