"""Relational knowledge distillation (Park et al. 2019, arXiv 1904.05068)."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kd.methods.paired import FeatureMethod, FeatureMethodConfig


class RKDConfig(FeatureMethodConfig):
    """Settings of the `rkd` method."""

    name: Literal["rkd"]
    distance: float = Field(ge=0)
    angle: float = Field(ge=0)


class RKD(FeatureMethod):
    """loss = alpha * CE + beta * sum over pairs of (distance * H(d_s, d_t) + angle * H(a_s, a_t)).

    d [b, b] are the distances within the batch, divided by the mean of the positive ones.
    a [b, b, b] are the cosines of the angle at j between i and k. H is the Huber loss, averaged
    over all entries. Memory grows with the cube of the batch size.
    """

    Config = RKDConfig

    def compare(self, pair_index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the weighted sum of the distance loss and the angle loss."""
        s = student.flatten(1)
        t = teacher.flatten(1)
        distance_loss = F.smooth_l1_loss(_distances(s), _distances(t))
        weighted_distance_loss = self.config.distance * distance_loss
        angle_loss = F.smooth_l1_loss(_angles(s), _angles(t))
        loss: Tensor = weighted_distance_loss + self.config.angle * angle_loss
        return loss


def _distances(x: Tensor) -> Tensor:
    """Return the distances [b, b] of vectors [b, d], divided by the mean of the positive ones."""
    squares = x.square().sum(dim=1)
    distances = (squares[:, None] + squares - 2 * x @ x.T).clamp(min=1e-12).sqrt()
    distances = distances * (1 - torch.eye(len(x), device=x.device, dtype=x.dtype))
    return distances / distances.sum() * (distances > 0).sum()


def _angles(x: Tensor) -> Tensor:
    """Return the cosines [b, b, b] of the angles at j between i and k, for vectors [b, d].

    They are computed from the inner products of the samples with their mean as the origin, which
    avoids an array of b * b * d elements.
    """
    x = x - x.mean(dim=0)
    products = x @ x.T
    squares = products.diagonal()
    # [j, i, k]: the inner product of i - j and k - j
    dots = products - products[:, :, None] - products[:, None] + squares[:, None, None]
    square_sums = squares[:, None] + squares
    square_distances = square_sums - 2 * products
    # Two samples coincide if rounding hides their distance; an angle there counts as 90 degrees.
    coincident = square_distances <= 16 * torch.finfo(x.dtype).eps * square_sums
    scale = square_distances.masked_fill(coincident, 1).rsqrt().masked_fill(coincident, 0)
    return dots * scale[:, :, None] * scale[:, None]
