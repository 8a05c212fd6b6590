"""Variational information distillation (Ahn et al. 2019, arXiv 1904.05835).

Paper: "Variational information distillation for knowledge transfer".
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.methods.base import MethodContext, mean_square
from kd.methods.paired import FeatureMethod, FeatureMethodConfig, match_spatial_size


class VIDConfig(FeatureMethodConfig):
    """Settings of the `vid` method."""

    name: Literal["vid"]


class VID(FeatureMethod):
    """loss = alpha * CE + beta * sum over pairs of mean ((mu(f_s) - f_t)^2 / v_c + log v_c) / 2.

    mu is three 1 x 1 convolutions (for vectors, the equivalent linear layers) and
    v_c = softplus(raw_c) + 1e-5 is the variance of channel c of the teacher. Both are learned. The
    larger map is first average-pooled to the size of the smaller.
    """

    Config = VIDConfig

    def __init__(self, config: VIDConfig, context: MethodContext):
        super().__init__(config, context)
        widths = [(context.student[s][0], context.teacher[t][0]) for s, t in self.pairs]
        self.means = nn.ModuleList(_mean(*width) for width in widths)
        raw = math.log(math.expm1(5 - 1e-5))  # a variance of 5
        self.raws = nn.ParameterList(torch.full((width,), raw) for _, width in widths)

    def compare(self, pair_index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean negative log-likelihood of the teacher's tap, up to a constant."""
        if student.ndim == 2:
            student = student[:, :, None, None]
            teacher = teacher[:, :, None, None]
        student, teacher = match_spatial_size(student, teacher)
        variance = (F.softplus(self.raws[pair_index]) + 1e-5)[:, None, None]
        error = (self.means[pair_index](student) - teacher) * variance.rsqrt()
        return (mean_square(error) + variance.log().mean()) / 2


def _mean(student: int, teacher: int) -> nn.Module:
    def layer(inputs: int) -> nn.Module:
        return nn.Conv2d(inputs, teacher, 1, bias=False)

    return nn.Sequential(layer(student), nn.ReLU(), layer(teacher), nn.ReLU(), layer(teacher))
