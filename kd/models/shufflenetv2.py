"""ShuffleNetV2 (Ma et al. 2018, arXiv 1807.11164) for small images.

The stem is a 1 x 1 convolution (Tian et al. 2019, arXiv 1910.10699).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from kd.core.settings import Settings
from kd.models.base import Net, average, conv

# by width: the channels of stage1, stage2, stage3 and last
CHANNELS = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}
STEM = 24


class ShuffleNetV2Config(Settings):
    """The keys of ShuffleNetV2."""

    name: Literal["shufflenetv2"]
    width: Literal[0.5, 1.0, 1.5, 2.0]  # type: ignore[valid-type]


class ShuffleNetV2(Net):
    """ShuffleNetV2.

    Taps on 32 x 32 images at width 1: stem [24, 32, 32], stage1 [116, 16, 16],
    stage2 [232, 8, 8], stage3 [464, 4, 4], last [1024, 4, 4], pool [1024]. The stages end in a
    channel shuffle, not in an activation.
    """

    Config = ShuffleNetV2Config

    def __init__(self, config: ShuffleNetV2Config, classes: int, size: int):
        channels1, channels2, channels3, last_channels = CHANNELS[config.width]

        def stage(inputs: int, outputs: int, blocks: int) -> nn.Module:
            return nn.Sequential(
                Halving(inputs, outputs), *(Plain(outputs) for _ in range(blocks - 1))
            )

        super().__init__(
            stem=nn.Sequential(*conv(3, STEM, 1), nn.ReLU()),
            stage1=stage(STEM, channels1, 4),
            stage2=stage(channels1, channels2, 8),
            stage3=stage(channels2, channels3, 4),
            last=nn.Sequential(*conv(channels3, last_channels, 1), nn.ReLU()),
            pool=average(),
            head=nn.Linear(last_channels, classes),
        )


class Plain(nn.Module):
    """The unit of stride 1, which keeps the shape [B, C, H, W].

    Half of the channels bypass the branch; then all channels are shuffled.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.branch = _branch(channels // 2, channels // 2, 1)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the unit."""
        left, right = x.chunk(2, dim=1)
        shuffled: Tensor = self.shuffle(torch.cat([left, self.branch(right)], dim=1))
        return shuffled


class Halving(nn.Module):
    """The unit of stride 2: [B, inputs, H, W] -> [B, outputs, H / 2, W / 2].

    The outputs of two branches are concatenated and shuffled.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        half = outputs // 2
        self.left = nn.Sequential(
            *conv(inputs, inputs, 3, 2, groups=inputs), *conv(inputs, half, 1), nn.ReLU()
        )
        self.right = _branch(inputs, half, 2)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """Halve height and width."""
        shuffled: Tensor = self.shuffle(torch.cat([self.left(x), self.right(x)], dim=1))
        return shuffled


def _branch(inputs: int, outputs: int, stride: int) -> nn.Module:
    depthwise = conv(outputs, outputs, 3, stride, groups=outputs)
    return nn.Sequential(
        *conv(inputs, outputs, 1), nn.ReLU(), *depthwise, *conv(outputs, outputs, 1), nn.ReLU()
    )
