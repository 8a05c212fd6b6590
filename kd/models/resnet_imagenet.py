"""The ResNets of ImageNet (He et al. 2015, arXiv 1512.03385, table 1) with a stem for small images.

The stem is one 3 x 3 convolution without max pooling.
"""

from typing import Literal

from torch import nn

from kd.core.settings import Settings
from kd.models.base import Net, Residual, average, basic, conv, he_normal, projection

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class ResNetImageNetConfig(Settings):
    """The keys of the ResNets of ImageNet."""

    name: Literal["resnet_imagenet"]
    depth: Literal[18, 34, 50]

    @property
    def title(self) -> str:
        """Return the display name."""
        return f"resnet{self.depth}"


class ResNetImageNet(Net):
    """A ResNet of ImageNet.

    Taps on 32 x 32 images: stem [64, 32, 32], stage1 [64, 32, 32], stage2 [128, 16, 16],
    stage3 [256, 8, 8], stage4 [512, 4, 4], pool [512]. Depth 50 has four times the channels after
    the stem.
    """

    Config = ResNetImageNetConfig

    def __init__(self, config: ResNetImageNetConfig, classes: int, size: int):
        channel_factor, make_block = (4, bottleneck) if config.depth == 50 else (1, basic)
        inputs = 64
        stages: dict[str, nn.Module] = {}
        for stage, blocks in enumerate(BLOCKS[config.depth]):
            outputs = channel_factor * 64 * 2**stage
            layers: list[nn.Module] = []
            for block in range(blocks):
                stride = 2 if block == 0 and stage > 0 else 1
                layers += [make_block(inputs, outputs, stride), nn.ReLU()]
                inputs = outputs
            stages[f"stage{stage + 1}"] = nn.Sequential(*layers)
        stem = nn.Sequential(*conv(3, 64, 3), nn.ReLU())
        super().__init__(stem=stem, **stages, pool=average(), head=nn.Linear(inputs, classes))
        he_normal(self)


def bottleneck(inputs: int, outputs: int, stride: int) -> Residual:
    """Return the block of depth 50, strided in its 3 x 3 convolution, without the final ReLU."""
    inner = outputs // 4
    branch = [
        *conv(inputs, inner, 1),
        nn.ReLU(),
        *conv(inner, inner, 3, stride),
        nn.ReLU(),
        *conv(inner, outputs, 1),
    ]
    return Residual(nn.Sequential(*branch), projection(inputs, outputs, stride))
