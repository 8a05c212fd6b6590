"""The reference CNN of the CIFAR-10 distillation study: four convolutions and two linear layers.

With scale s: conv3x3(s), conv3x3(s), maxpool, conv3x3(2s), conv3x3(2s), maxpool,
linear(64 * 2s -> 32s), dropout, linear(classes), and batch norm after each convolution.
On 32 x 32 images scale 32 has 4.27M parameters, and scale 16 has 1.07M.
"""

from typing import Literal

from pydantic import Field
from torch import nn

from kd.core.settings import Settings
from kd.models.base import Net


class CNNConfig(Settings):
    """The keys of the reference CNN."""

    name: Literal["cnn"]
    scale: int = Field(ge=1, le=1024)
    activation: Literal["relu", "elu", "gelu", "silu"]
    dropout: float = Field(ge=0, lt=1)


class CNN(Net):
    """The reference CNN.

    Taps on 32 x 32 images with scale s: conv1, conv2 [s, 32, 32], pool1 [s, 16, 16],
    conv3, conv4 [2s, 16, 16], pool2 [2s, 8, 8], hidden [32s].
    """

    Config = CNNConfig

    def __init__(self, config: CNNConfig, classes: int, size: int):
        activations = {"relu": nn.ReLU, "elu": nn.ELU, "gelu": nn.GELU, "silu": nn.SiLU}
        activation = activations[config.activation]
        s = config.scale

        def conv(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                activation(),
            )

        super().__init__(
            conv1=conv(3, s),
            conv2=conv(s, s),
            pool1=nn.MaxPool2d(2),
            conv3=conv(s, 2 * s),
            conv4=conv(2 * s, 2 * s),
            pool2=nn.MaxPool2d(2),
            hidden=nn.Sequential(
                nn.Flatten(), nn.Linear(2 * s * (size // 4) ** 2, 32 * s), activation()
            ),
            head=nn.Sequential(nn.Dropout(config.dropout), nn.Linear(32 * s, classes)),
        )
