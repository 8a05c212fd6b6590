"""Wide residual networks (Zagoruyko and Komodakis 2016, arXiv 1605.07146)."""

from typing import Literal

from pydantic import Field
from torch import nn

from kd.core.settings import Settings
from kd.models.base import Net, Residual, average, he_normal


class WRNConfig(Settings):
    name: Literal["wrn"]
    depth: Literal[10, 16, 22, 28, 34, 40]  # 6n + 4: n blocks a stage
    width: int = Field(ge=1, le=64)
    dropout: float = Field(ge=0, lt=1)


class WRN(Net):
    """Taps on 32 x 32 images: stem [16, 32, 32], stage1 [16w, 32, 32], stage2 [32w, 16, 16], stage3 [64w, 8, 8],
    pool [64w].

    The batch norm and ReLU that open a stage, and feed both its branches, end the stage before it here: the same
    function, and every stage ends in an activation. Only at width 1, where stage1 changes no shape and its first
    shortcut is x itself, does the stem end in its convolution.
    """

    Config = WRNConfig

    def __init__(self, config: WRNConfig, classes: int, size: int):
        channels = [16, *(16 * config.width * times for times in (1, 2, 4))]
        opened = channels[0] != channels[1]

        def stage(place: int) -> nn.Module:
            inputs, outputs = channels[place - 1 : place + 1]
            blocks = [
                _block(
                    inputs if n == 0 else outputs,
                    outputs,
                    2 if n == 0 and place > 1 else 1,
                    config.dropout,
                )
                for n in range((config.depth - 4) // 6)
            ]
            return nn.Sequential(*blocks, nn.BatchNorm2d(outputs), nn.ReLU())

        stem = _conv(3, 16)
        super().__init__(
            stem=nn.Sequential(stem, nn.BatchNorm2d(16), nn.ReLU()) if opened else stem,
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
    """Norm and ReLU come before a convolution. A block that changes the shape reads what is normed already."""
    same = inputs == outputs
    opening = [nn.BatchNorm2d(inputs), nn.ReLU()] if same else []
    middle = [nn.BatchNorm2d(outputs), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
    branch = nn.Sequential(
        *opening, _conv(inputs, outputs, 3, stride), *middle, _conv(outputs, outputs)
    )
    return Residual(branch, nn.Identity() if same else _conv(inputs, outputs, 1, stride))
