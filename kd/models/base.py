"""What every network here is: a chain of named stages, whose outputs are the taps that methods may read."""

from collections.abc import Iterable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from kd.kernels import NormReLU
from kd.settings import Settings

ACTIVATIONS = nn.ReLU, nn.ReLU6, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish
PRE = ".pre"


class Out(NamedTuple):
    """What a forward pass gives: logits [B, classes] and the taps that were asked for, by name."""

    logits: Tensor
    taps: dict[str, Tensor]

    def float(self) -> "Out":
        """The same in float32, in which all loss math is done whatever the precision of the networks."""
        return Out(self.logits.float(), {name: tap.float() for name, tap in self.taps.items()})


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

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of normalised images [B, 3, H, W]."""
        return self.tapped(x).logits

    def tapped(self, x: Tensor, taps: Iterable[str] = ()) -> Out:
        """Logits, and the named taps of the same pass."""
        kept: dict[str, Tensor] = {}
        versions: dict[str, int] = {}
        for name, stage in self.stages.items():
            if (pre := name + PRE) in taps:
                x, activation = _before_activation(stage, x)
                kept[pre], versions[pre] = x, 0 if x.is_inference() else x._version
                x = activation(x)
            else:
                x = stage(x)
            if name in taps:
                kept[name], versions[name] = x, 0 if x.is_inference() else x._version
        for name, tap in kept.items():
            if not tap.is_inference() and tap._version != versions[name]:
                raise RuntimeError(f"tap {name!r} was overwritten in place by a later stage of {type(self).__name__}")
        return Out(x, kept)

    def shapes(self, size: int) -> dict[str, tuple[int, ...]]:
        """The shape of every tap for images of size x size, without the batch axis; the head's is (classes,).

        Found by a pass on the meta device of a copy: no arithmetic, no random number, no buffer touched.
        """
        import copy

        net = copy.deepcopy(self).to("meta").eval()
        with torch.no_grad():
            out = net.tapped(torch.empty(1, 3, size, size, device="meta"), net.stages)
        return {name: tuple(tap.shape[1:]) for name, tap in out.taps.items()}


def _before_activation(stage: nn.Module, x: Tensor) -> tuple[Tensor, nn.Module]:
    """What `stage` gives before its last activation, and that activation."""
    if not isinstance(stage, nn.Sequential):
        return stage(x), nn.Identity()
    *first, last = stage
    if isinstance(last, nn.Identity) and first and isinstance(first[-1], NormReLU):  # see kernels.quicken
        for module in first[:-1]:
            x = module(x)
        return nn.BatchNorm2d.forward(first[-1], x), nn.ReLU()
    if not isinstance(last, ACTIVATIONS):
        return stage(x), nn.Identity()
    for module in first:
        x = module(x)
    return x, type(last)() if getattr(last, "inplace", False) else last
