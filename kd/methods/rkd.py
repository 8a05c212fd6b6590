"""Relational knowledge distillation (Park et al. 2019, arXiv 1904.05068)."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kd.methods.paired import FeatureMethod, FeatureMethodConfig


class RKDConfig(FeatureMethodConfig):
    name: Literal["rkd"]
    distance: float = Field(ge=0)
    angle: float = Field(ge=0)


class RKD(FeatureMethod):
    """loss = alpha * CE + beta * sum over the pairs of (distance * H(d_s, d_t) + angle * H(a_s, a_t)).

    d [b, b]: distances within the batch, over the mean of the positive ones; a [b, b, b]: cosines of the angle at j
    between i and k. H: Huber's loss, averaged over all entries. Memory grows with the cube of the batch size.
    """

    Config = RKDConfig

    def compare(self, number: int, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = student.flatten(1), teacher.flatten(1)
        distances = F.smooth_l1_loss(_distances(s), _distances(t))
        return self.config.distance * distances + self.config.angle * F.smooth_l1_loss(
            _angles(s), _angles(t)
        )


def _distances(x: Tensor) -> Tensor:
    squares = x.square().sum(dim=1)
    found = (squares[:, None] + squares - 2 * x @ x.T).clamp(min=1e-12).sqrt()
    found = found * (1 - torch.eye(len(x), device=x.device, dtype=x.dtype))
    return found / found.sum() * (found > 0).sum()


def _angles(x: Tensor) -> Tensor:
    """[b, b, b] of [b, d], without an array of b * b * d: by the products of the samples, from their mean as origin."""
    x = x - x.mean(dim=0)
    products = x @ x.T
    squares = products.diagonal()
    dots = (
        products - products[:, :, None] - products[:, None] + squares[:, None, None]
    )  # [j, i, k]: at j, of i and k
    lengths = squares[:, None] + squares
    apart = lengths - 2 * products
    same = (
        apart <= 16 * torch.finfo(x.dtype).eps * lengths
    )  # as far as rounding can tell; an angle there counts as 90
    scale = apart.masked_fill(same, 1).rsqrt().masked_fill(same, 0)
    return dots * scale[:, :, None] * scale[:, None]
