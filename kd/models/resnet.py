"""ResNets for small images (He et al. 2015, arXiv 1512.03385, section 4.2).

In the form that the distillation literature compares (Tian et al. 2019, arXiv 1910.10699):
shortcuts that change the shape are 1 x 1 convolutions.
"""

from typing import Literal

from torch import nn

from kd.core.settings import Settings
from kd.models.base import Net, average, basic, conv, he_normal


class ResNetConfig(Settings):
    """The keys of the ResNets for small images."""

    name: Literal["resnet"]
    depth: Literal[8, 14, 20, 32, 44, 56, 110]  # 6n + 2, with n blocks per stage
    width: Literal[1, 4]

    @property
    def title(self) -> str:
        """Return the display name."""
        return f"resnet{self.depth}" if self.width == 1 else f"resnet{self.depth}x{self.width}"


class ResNet(Net):
    """A ResNet for small images.

    Taps on 32 x 32 images: stem [16, 32, 32], stage1 [16, 32, 32], stage2 [32, 16, 16],
    stage3 [64, 8, 8], pool [64]. Width 4 has stem [32, 32, 32] and then 64, 128, 256 channels.
    """

    Config = ResNetConfig

    def __init__(self, config: ResNetConfig, classes: int, size: int):
        stem = 16 if config.width == 1 else 32
        channels = [stem, *(16 * config.width * factor for factor in (1, 2, 4))]

        def stage(number: int) -> nn.Module:
            outputs = channels[number]
            layers: list[nn.Module] = []
            for block in range((config.depth - 2) // 6):
                inputs = channels[number - 1] if block == 0 else outputs
                stride = 2 if block == 0 and number > 1 else 1
                layers += [basic(inputs, outputs, stride), nn.ReLU()]
            return nn.Sequential(*layers)

        super().__init__(
            stem=nn.Sequential(*conv(3, stem, 3), nn.ReLU()),
            stage1=stage(1),
            stage2=stage(2),
            stage3=stage(3),
            pool=average(),
            head=nn.Linear(channels[3], classes),
        )
        he_normal(self)
