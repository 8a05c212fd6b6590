"""Wide residual networks (Zagoruyko and Komodakis 2016, arXiv 1605.07146)."""

from typing import Literal

from pydantic import Field
from torch import nn

from kd.core.settings import Settings
from kd.models.base import Net, Residual, average, he_normal


class WRNConfig(Settings):
    """The keys of wide residual networks."""

    name: Literal["wrn"]
    depth: Literal[10, 16, 22, 28, 34, 40]  # 6n + 4, with n blocks per stage
    width: int = Field(ge=1, le=64)
    dropout: float = Field(ge=0, lt=1)


class WRN(Net):
    """A wide residual network.

    Taps on 32 x 32 images with width w: stem [16, 32, 32], stage1 [16w, 32, 32],
    stage2 [32w, 16, 16], stage3 [64w, 8, 8], pool [64w].

    The batch norm and ReLU that open a stage and feed both of its branches are placed here at the
    end of the stage before it. The function is the same, and every stage ends in an activation.
    The exception is width 1, where stage1 does not change the shape and its first shortcut is the
    identity: there the stem ends in its convolution.
    """

    Config = WRNConfig

    def __init__(self, config: WRNConfig, classes: int, size: int):
        channels = [16, *(16 * config.width * factor for factor in (1, 2, 4))]

        def stage(number: int) -> nn.Module:
            inputs, outputs = channels[number - 1 : number + 1]
            layers: list[nn.Module] = []
            for block in range((config.depth - 4) // 6):
                block_inputs = inputs if block == 0 else outputs
                stride = 2 if block == 0 and number > 1 else 1
                layers.append(_block(block_inputs, outputs, stride, config.dropout))
            return nn.Sequential(*layers, nn.BatchNorm2d(outputs), nn.ReLU())

        stem = _conv(3, 16)
        if channels[0] != channels[1]:
            stem = nn.Sequential(stem, nn.BatchNorm2d(16), nn.ReLU())
        super().__init__(
            stem=stem,
            stage1=stage(1),
            stage2=stage(2),
            stage3=stage(3),
            pool=average(),
            head=nn.Linear(channels[3], classes),
        )
        he_normal(self)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


def _block(inputs: int, outputs: int, stride: int, dropout: float) -> nn.Module:
    """Return a residual block, in which norm and ReLU come before each convolution.

    A block that changes the shape has no norm and ReLU before its first convolution: its input
    already went through them.
    """
    same_shape = inputs == outputs
    opening = [nn.BatchNorm2d(inputs), nn.ReLU()] if same_shape else []
    middle = [nn.BatchNorm2d(outputs), nn.ReLU()]
    if dropout:
        middle.append(nn.Dropout(dropout))
    branch = nn.Sequential(
        *opening, _conv(inputs, outputs, 3, stride), *middle, _conv(outputs, outputs)
    )
    return Residual(branch, nn.Identity() if same_shape else _conv(inputs, outputs, 1, stride))
