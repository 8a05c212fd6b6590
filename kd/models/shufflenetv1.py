"""ShuffleNet (Zhang et al. 2017, arXiv 1707.01083) with three groups, for small images.

The stem is a 1 x 1 convolution (Tian et al. 2019, arXiv 1910.10699).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from kd.core.settings import Settings
from kd.models.base import Net, Residual, average, conv

GROUPS = 3
STEM = 24


class ShuffleNetV1Config(Settings):
    """The keys of ShuffleNet."""

    name: Literal["shufflenetv1"]


class ShuffleNetV1(Net):
    """ShuffleNet.

    Taps on 32 x 32 images: stem [24, 32, 32], stage1 [240, 16, 16], stage2 [480, 8, 8],
    stage3 [960, 4, 4], pool [960].
    """

    Config = ShuffleNetV1Config

    def __init__(self, config: ShuffleNetV1Config, classes: int, size: int):
        def stage(inputs: int, outputs: int, blocks: int) -> nn.Module:
            layers: list[nn.Module] = [Halving(inputs, outputs), nn.ReLU()]
            for _ in range(blocks - 1):
                layers += [Residual(_branch(outputs, outputs, 1), nn.Identity()), nn.ReLU()]
            return nn.Sequential(*layers)

        super().__init__(
            stem=nn.Sequential(*conv(3, STEM, 1), nn.ReLU()),
            stage1=stage(STEM, 240, 4),
            stage2=stage(240, 480, 8),
            stage3=stage(480, 960, 4),
            pool=average(),
            head=nn.Linear(960, classes),
        )


class Halving(nn.Module):
    """The unit of stride 2: [B, inputs, H, W] -> [B, outputs, H / 2, W / 2].

    The branch's output is concatenated with the 3 x 3 average pool of the input.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.branch = _branch(inputs, outputs - inputs, 2)
        self.shortcut = nn.AvgPool2d(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Halve height and width."""
        return torch.cat([self.branch(x), self.shortcut(x)], dim=1)


def _branch(inputs: int, outputs: int, stride: int) -> nn.Module:
    inner = outputs // 4
    groups = 1 if inputs == STEM else GROUPS
    return nn.Sequential(
        *conv(inputs, inner, 1, groups=groups),
        nn.ReLU(),
        nn.ChannelShuffle(groups),
        *conv(inner, inner, 3, stride, groups=inner),
        nn.ReLU(),
        *conv(inner, outputs, 1, groups=GROUPS),
    )
