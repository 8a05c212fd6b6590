"""What every network here is: a chain of named stages, whose outputs are the taps that methods may read."""

from collections.abc import Iterable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from kd.core.settings import Settings
from kd.models.kernels import NormAct

ACTIVATIONS = nn.ReLU, nn.ReLU6, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish
PRE = ".pre"


class ModelOutput(NamedTuple):
    """What a forward pass gives: logits [B, classes] and the taps that were asked for, by name."""

    logits: Tensor
    taps: dict[str, Tensor]

    def float(self) -> "ModelOutput":
        """The same in float32, in which all loss math is done whatever the precision of the networks."""
        return ModelOutput(
            self.logits.float(), {name: tap.float() for name, tap in self.taps.items()}
        )


class Net(nn.Module):
    """A classifier that is a chain of named stages. Every stage but the last is a tap; the last is the head.

    The tap "stage1.pre" is what the activation that ends stage1 reads (stage1 itself where none does). No hooks: the
    forward pass returns the taps it is asked for. A stage must not write into its input; a tap that was overwritten
    raises RuntimeError at once.
    """

    Config: ClassVar[type[Settings]]

    def __init__(self, **stages: nn.Module):
        super().__init__()
        self.stages = nn.ModuleDict(stages)

    @property
    def head(self) -> nn.Module:
        """The classifier: from the last tap to the logits."""
        return list(self.stages.values())[-1]

    def tap_module(self, tap: str) -> nn.Module:
        """The module whose output the tap is."""
        return self.stages[tap]

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of normalised images [B, 3, H, W]."""
        return self.forward_taps(x).logits

    def forward_taps(self, x: Tensor, taps: Iterable[str] = ()) -> ModelOutput:
        """Logits, and the named taps of the same pass."""
        kept: dict[str, Tensor] = {}
        versions: dict[str, int] = {}
        for name, stage in self.stages.items():
            if (pre := name + PRE) in taps:
                x, activation = _before_activation(stage, x)
                kept[pre], versions[pre] = x, version(x)
                x = activation(x)
            else:
                x = stage(x)
            if name in taps:
                kept[name], versions[name] = x, version(x)
        for name, tap in kept.items():
            if version(tap) != versions[name]:
                raise RuntimeError(
                    f"tap {name!r} was overwritten in place by a later stage of {type(self).__name__}"
                )
        return ModelOutput(x, kept)

    def shapes(self, size: int) -> dict[str, tuple[int, ...]]:
        """The shape of every tap for images of size x size, without the batch axis; the head's is (classes,).

        Found by a pass on the meta device of a copy: no arithmetic, no random number, no buffer touched.
        """
        import copy

        net = copy.deepcopy(self).to("meta").eval()
        with torch.no_grad():
            out = net.forward_taps(torch.empty(1, 3, size, size, device="meta"), net.stages)
        return {name: tuple(tap.shape[1:]) for name, tap in out.taps.items()}


def version(x: Tensor) -> int:
    """How often a tensor was written into, as far as PyTorch counts."""
    return 0 if x.is_inference() else x._version


class Residual(nn.Module):
    """branch(x) + shortcut(x); the activation that may follow is a module of its own."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module):
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.shortcut(x)


def conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """A convolution without bias, padded by half its kernel, and its batch norm."""
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, 1, groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


def projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    """The shortcut of a residual block: x itself, or where its shape changes a 1 x 1 convolution and a batch norm."""
    return (
        nn.Identity()
        if (inputs, stride) == (outputs, 1)
        else nn.Sequential(*conv(inputs, outputs, 1, stride))
    )


def basic(inputs: int, outputs: int, stride: int) -> Residual:
    """The basic residual block (He et al. 2015, arXiv 1512.03385), without its final ReLU."""
    branch = [*conv(inputs, outputs, 3, stride), nn.ReLU(), *conv(outputs, outputs, 3)]
    return Residual(nn.Sequential(*branch), projection(inputs, outputs, stride))


def average() -> nn.Module:
    """Global average pooling: [B, C, H, W] -> [B, C]."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def he_normal(net: nn.Module) -> None:
    """Convolutions as in He et al. 2015 (arXiv 1502.01852), by the fan out; their biases 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _before_activation(stage: nn.Module, x: Tensor) -> tuple[Tensor, nn.Module]:
    """What `stage` gives before its last activation, and that activation."""
    if not isinstance(stage, nn.Sequential):
        return stage(x), nn.Identity()
    *first, last = stage
    if (
        isinstance(last, nn.Identity) and first and isinstance(first[-1], NormAct)
    ):  # see kernels.quicken
        for module in first[:-1]:
            x = module(x)
        return nn.BatchNorm2d.forward(first[-1], x), first[-1].activation()
    if not isinstance(last, ACTIVATIONS):
        return stage(x), nn.Identity()
    for module in first:
        x = module(x)
    return x, type(last)() if getattr(last, "inplace", False) else last
