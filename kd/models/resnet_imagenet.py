"""The ResNets of ImageNet (He et al. 2015, arXiv 1512.03385, table 1) with the stem for small images: one 3 x 3
convolution, no max pooling."""

from typing import Literal

from torch import nn

from kd.core.settings import Settings
from kd.models.base import Net, Residual, average, basic, conv, he_normal, projection

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class ResNetImageNetConfig(Settings):
    name: Literal["resnet_imagenet"]
    depth: Literal[18, 34, 50]

    @property
    def title(self) -> str:
        return f"resnet{self.depth}"


class ResNetImageNet(Net):
    """Taps on 32 x 32 images: stem [64, 32, 32], stage1 [64, 32, 32], stage2 [128, 16, 16], stage3 [256, 8, 8],
    stage4 [512, 4, 4], pool [512]. Depth 50 has four times the channels after the stem."""

    Config = ResNetImageNetConfig

    def __init__(self, config: ResNetImageNetConfig, classes: int, size: int):
        times, make = (4, bottleneck) if config.depth == 50 else (1, basic)
        stages, inputs = {}, 64
        for place, blocks in enumerate(BLOCKS[config.depth]):
            layers: list[nn.Module] = []
            for block in range(blocks):
                outputs, stride = times * 64 * 2**place, 2 if block == 0 < place else 1
                layers += [make(inputs, outputs, stride), nn.ReLU()]
                inputs = outputs
            stages[f"stage{place + 1}"] = nn.Sequential(*layers)
        stem = nn.Sequential(*conv(3, 64, 3), nn.ReLU())
        super().__init__(stem=stem, **stages, pool=average(), head=nn.Linear(inputs, classes))
        he_normal(self)


def bottleneck(inputs: int, outputs: int, stride: int) -> Residual:
    """The block of depth 50, its stride in the 3 x 3 convolution, without its final ReLU."""
    inner = outputs // 4
    branch = [
        *conv(inputs, inner, 1),
        nn.ReLU(),
        *conv(inner, inner, 3, stride),
        nn.ReLU(),
        *conv(inner, outputs, 1),
    ]
    return Residual(nn.Sequential(*branch), projection(inputs, outputs, stride))
