"""The vision transformer (Dosovitskiy et al. 2020, arXiv 2010.11929) for small images."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from kd.core.settings import Settings
from kd.models.base import Net, Residual

SIZES = {192: "tiny", 384: "small", 768: "base"}


class ViTConfig(Settings):
    """The keys of the vision transformer."""

    name: Literal["vit"]
    patch: int = Field(ge=1, le=1024)
    width: int = Field(ge=1, le=16384)
    depth: int = Field(ge=1, le=200)
    heads: int = Field(ge=1, le=1024)
    dropout: float = Field(ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ViTConfig":
        if self.width % self.heads:
            raise ValueError(
                f"width must be a multiple of heads, got {self.width} and {self.heads}"
            )
        return self

    @property
    def title(self) -> str:
        """Return the display name."""
        depth = f"-{self.depth}" if self.depth != 12 else ""
        return f"vit-{SIZES.get(self.width, self.width)}{depth}"


class ViT(Net):
    """A vision transformer.

    Taps, with N = (size / patch)^2 and width D: embed, block1, block2, ... [N + 1, D], of which
    the first token is the class token; pool [D], the class token after the last norm.

    The weights of linear layers are drawn from a normal distribution with standard deviation 0.02,
    truncated at 2; biases are 0.
    """

    Config = ViTConfig

    def __init__(self, config: ViTConfig, classes: int, size: int):
        if size % config.patch:
            raise RuntimeError(f"the image size must be a multiple of patch={config.patch}")
        width = config.width
        dropout = config.dropout
        super().__init__(
            embed=Embed(config.patch, width, (size // config.patch) ** 2, dropout),
            **{
                f"block{n}": _block(width, config.heads, dropout)
                for n in range(1, config.depth + 1)
            },
            pool=ClassToken(width, eps=1e-6),
            head=nn.Linear(width, classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)


class Embed(nn.Module):
    """Patch embeddings, a class token and learned positions: [B, 3, H, W] -> [B, N + 1, D]."""

    def __init__(self, patch: int, width: int, patches: int, dropout: float):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, patches + 1, width))
        self.dropout = nn.Dropout(dropout)
        for parameter in (self.patches.weight, self.token, self.positions):
            nn.init.trunc_normal_(parameter, std=0.02)
        nn.init.zeros_(self.patches.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Embed images [B, 3, H, W] as tokens [B, N + 1, D]."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        embedded: Tensor = self.dropout(x + self.positions)
        return embedded


class Attention(nn.Module):
    """Multi-head self-attention: [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over all tokens [B, T, D]."""
        # each of q, k and v is [B, heads, T, D / heads]
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class ClassToken(nn.LayerNorm):
    """The first token after layer norm: [B, T, D] -> [B, D]."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the first token."""
        return super().forward(x[:, 0])


def _block(width: int, heads: int, dropout: float) -> nn.Module:
    attention = [nn.LayerNorm(width, eps=1e-6), Attention(width, heads), nn.Dropout(dropout)]
    linears = [
        nn.Linear(width, 4 * width),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(4 * width, width),
    ]
    mlp = [nn.LayerNorm(width, eps=1e-6), *linears, nn.Dropout(dropout)]
    return nn.Sequential(
        Residual(nn.Sequential(*attention), nn.Identity()),
        Residual(nn.Sequential(*mlp), nn.Identity()),
    )
