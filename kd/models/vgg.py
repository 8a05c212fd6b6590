"""VGG (Simonyan and Zisserman 2014, arXiv 1409.1556) with batch norm, for small images.

The head is global average pooling and one linear layer (Tian et al. 2019, arXiv 1910.10699).
"""

from typing import Literal

from torch import nn

from kd.core.settings import Settings
from kd.models.base import Net, average, he_normal

# by depth: the number of convolutions in each block
CONVOLUTIONS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
CHANNELS = 64, 128, 256, 512, 512


class VGGConfig(Settings):
    """The keys of VGG."""

    name: Literal["vgg"]
    depth: Literal[8, 11, 13, 16, 19]

    @property
    def title(self) -> str:
        """Return the display name."""
        return f"vgg{self.depth}"


class VGG(Net):
    """VGG with batch norm.

    Taps on 32 x 32 images: block1 [64, 32, 32], block2 [128, 16, 16], block3 [256, 8, 8],
    block4 [512, 4, 4], block5 [512, 4, 4], pool [512]. Max pooling opens block2 to block4, and for
    images of at least 64 x 64 also block5.
    """

    Config = VGGConfig

    def __init__(self, config: VGGConfig, classes: int, size: int):
        blocks: dict[str, nn.Module] = {}
        inputs = 3
        block_sizes = zip(CONVOLUTIONS[config.depth], CHANNELS, strict=True)
        for number, (convolutions, channels) in enumerate(block_sizes, 1):
            pools = 1 < number < 5 or (number == 5 and size >= 64)
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if pools else []
            for _ in range(convolutions):
                layers += [
                    nn.Conv2d(inputs, channels, 3, padding=1),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                ]
                inputs = channels
            blocks[f"block{number}"] = nn.Sequential(*layers)
        super().__init__(**blocks, pool=average(), head=nn.Linear(inputs, classes))
        he_normal(self)
        nn.init.normal_(self.head.weight, std=0.01)  # type: ignore[arg-type]
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]
