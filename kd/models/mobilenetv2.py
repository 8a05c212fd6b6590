"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381) for small images.

As in Tian et al. 2019 (arXiv 1910.10699), a stride of 1 in the second group of blocks reduces five
halvings to four, and ReLU replaces ReLU6.
"""

from typing import Literal

from pydantic import Field
from torch import nn

from kd.core.settings import Settings
from kd.models.base import Net, Residual, average, conv, he_normal

# Groups of blocks: (channels at width 1, number of blocks, stride of the first block).
# All groups but the first expand their channels.
STAGES = {
    "stage1": [(16, 1, 1), (24, 2, 1)],
    "stage2": [(32, 3, 2)],
    "stage3": [(64, 4, 2), (96, 3, 1)],
    "stage4": [(160, 3, 2), (320, 1, 1)],
}


class MobileNetV2Config(Settings):
    """The keys of MobileNetV2."""

    name: Literal["mobilenetv2"]
    width: float = Field(ge=0.1, le=10)
    expansion: int = Field(ge=1, le=32)


class MobileNetV2(Net):
    """MobileNetV2.

    Taps on 32 x 32 images at width w: stem [32w, 16, 16], stage1 [24w, 16, 16],
    stage2 [32w, 8, 8], stage3 [96w, 4, 4], stage4 [320w, 2, 2], last [1280 max(1, w), 2, 2],
    pool [1280 max(1, w)]. The stages do not end in an activation.
    """

    Config = MobileNetV2Config

    def __init__(self, config: MobileNetV2Config, classes: int, size: int):
        stem_channels = int(32 * config.width)
        inputs = stem_channels
        expansion = 1
        stages: dict[str, nn.Module] = {}
        for name, groups in STAGES.items():
            layers: list[nn.Module] = []
            for channels, blocks, first_stride in groups:
                outputs = int(channels * config.width)
                for block in range(blocks):
                    stride = first_stride if block == 0 else 1
                    layers.append(_block(inputs, outputs, stride, expansion))
                    inputs = outputs
                expansion = config.expansion
            stages[name] = nn.Sequential(*layers)
        last_channels = int(1280 * max(1, config.width))
        super().__init__(
            stem=nn.Sequential(*conv(3, stem_channels, 3, 2), nn.ReLU()),
            **stages,
            last=nn.Sequential(*conv(inputs, last_channels, 1), nn.ReLU()),
            pool=average(),
            head=nn.Linear(last_channels, classes),
        )
        he_normal(self)
        nn.init.normal_(self.head.weight, std=0.01)  # type: ignore[arg-type]
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]


def _block(inputs: int, outputs: int, stride: int, expansion: int) -> nn.Module:
    """Return an inverted residual block, which is wide inside and ends linearly."""
    inner = inputs * expansion
    depthwise = conv(inner, inner, 3, stride, groups=inner)
    branch = nn.Sequential(
        *conv(inputs, inner, 1), nn.ReLU(), *depthwise, nn.ReLU(), *conv(inner, outputs, 1)
    )
    return Residual(branch, nn.Identity()) if (inputs, stride) == (outputs, 1) else branch
