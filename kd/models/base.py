"""The base of all networks: a chain of named stages, whose outputs (taps) methods can read."""

from collections.abc import Iterable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from kd.core.settings import Settings
from kd.models.kernels import NormAct

ACTIVATIONS = nn.ReLU, nn.ReLU6, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish
PRE = ".pre"


class ModelOutput(NamedTuple):
    """The result of a forward pass: logits [B, classes] and the requested taps by name."""

    logits: Tensor
    taps: dict[str, Tensor]

    def float(self) -> "ModelOutput":
        """Convert to float32, in which losses are computed whatever the networks' precision."""
        taps = {name: tap.float() for name, tap in self.taps.items()}
        return ModelOutput(self.logits.float(), taps)


class Net(nn.Module):
    """A classifier that is a chain of named stages.

    The output of every stage but the last is a tap; the last stage is the head. The tap
    "stage1.pre" is the input of the activation at the end of stage1, or equal to "stage1" if there
    is none. There are no hooks: the forward pass returns the taps that are requested. A stage must
    not write into its input; a tap that was overwritten raises RuntimeError at once.
    """

    Config: ClassVar[type[Settings]]

    def __init__(self, **stages: nn.Module):
        super().__init__()
        self.stages = nn.ModuleDict(stages)

    @property
    def head(self) -> nn.Module:
        """Return the classifier, which maps the last tap to the logits."""
        return list(self.stages.values())[-1]

    def tap_module(self, tap: str) -> nn.Module:
        """Return the module whose output is the tap."""
        return self.stages[tap]

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits [B, classes] from normalised images [B, 3, H, W]."""
        return self.forward_taps(x).logits

    def forward_taps(self, x: Tensor, taps: Iterable[str] = ()) -> ModelOutput:
        """Compute logits and the named taps in one pass.

        Args:
            x: float32 tensor [B, 3, H, W], normalised images.
            taps: The names of the taps to return.

        Raises:
            RuntimeError: A later stage wrote into a tap.
        """
        outputs: dict[str, Tensor] = {}
        versions: dict[str, int] = {}
        for name, stage in self.stages.items():
            pre_name = name + PRE
            if pre_name in taps:
                x, activation = _before_activation(stage, x)
                outputs[pre_name] = x
                versions[pre_name] = version(x)
                x = activation(x)
            else:
                x = stage(x)
            if name in taps:
                outputs[name] = x
                versions[name] = version(x)
        for name, tap in outputs.items():
            if version(tap) != versions[name]:
                raise RuntimeError(
                    f"tap {name!r} was overwritten in place by a later stage of "
                    f"{type(self).__name__}"
                )
        return ModelOutput(x, outputs)

    def shapes(self, size: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tap, without the batch axis; that of the head is (classes,).

        A copy of the network runs on the meta device: this does no arithmetic, draws no random
        number and changes no buffer.

        Args:
            size: Images are size x size.
        """
        import copy

        net = copy.deepcopy(self).to("meta").eval()
        with torch.no_grad():
            output = net.forward_taps(torch.empty(1, 3, size, size, device="meta"), net.stages)
        return {name: tuple(tap.shape[1:]) for name, tap in output.taps.items()}


def version(x: Tensor) -> int:
    """Return how often a tensor was written into, if PyTorch counts that, else 0."""
    return 0 if x.is_inference() else x._version


class Residual(nn.Module):
    """branch(x) + shortcut(x). An activation that follows is a module of its own."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module):
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return branch(x) + shortcut(x)."""
        out: Tensor = self.branch(x) + self.shortcut(x)
        return out


def conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """Return a convolution without bias, padded by half its kernel, and its batch norm."""
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, 1, groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


def projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Return the shortcut of a residual block.

    It is the identity or, if the shape changes, a 1 x 1 convolution and a batch norm.
    """
    if (inputs, stride) == (outputs, 1):
        return nn.Identity()
    return nn.Sequential(*conv(inputs, outputs, 1, stride))


def basic(inputs: int, outputs: int, stride: int) -> Residual:
    """Return the basic residual block (He et al. 2015, arXiv 1512.03385) without the final ReLU."""
    branch = [*conv(inputs, outputs, 3, stride), nn.ReLU(), *conv(outputs, outputs, 3)]
    return Residual(nn.Sequential(*branch), projection(inputs, outputs, stride))


def average() -> nn.Module:
    """Return global average pooling: [B, C, H, W] -> [B, C]."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def he_normal(net: nn.Module) -> None:
    """Draw convolution weights by fan-out (He et al. 2015, arXiv 1502.01852); set biases to 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _before_activation(stage: nn.Module, x: Tensor) -> tuple[Tensor, nn.Module]:
    """Return the output of `stage` before its last activation, and that activation."""
    if not isinstance(stage, nn.Sequential):
        return stage(x), nn.Identity()
    *first, last = stage
    # kernels.fuse_modules replaces a norm and its activation by a NormAct and an identity
    if isinstance(last, nn.Identity) and first and isinstance(first[-1], NormAct):
        for module in first[:-1]:
            x = module(x)
        return nn.BatchNorm2d.forward(first[-1], x), first[-1].activation()
    if not isinstance(last, ACTIVATIONS):
        return stage(x), nn.Identity()
    for module in first:
        x = module(x)
    # an activation that works in place would overwrite the tap
    return x, type(last)() if getattr(last, "inplace", False) else last
