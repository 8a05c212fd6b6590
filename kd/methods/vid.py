"""Variational information distillation for knowledge transfer (Ahn et al. 2019, arXiv 1904.05835)."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.methods.base import MethodContext, mean_square
from kd.methods.paired import FeatureMethod, FeatureMethodConfig, match_spatial_size


class VIDConfig(FeatureMethodConfig):
    name: Literal["vid"]


class VID(FeatureMethod):
    """loss = alpha * CE + beta * sum over the pairs of mean 1/2 ((mu(f_s) - f_t)^2 / var_c + log var_c).

    mu: three convolutions of 1 x 1 (for vectors the same, linear), var_c = softplus(raw_c) + 1e-5 for each of the
    teacher's channels; both are learned. The larger map is average-pooled to the smaller's size first.
    """

    Config = VIDConfig

    def __init__(self, config: VIDConfig, spec: MethodContext):
        super().__init__(config, spec)
        widths = [(spec.student[s][0], spec.teacher[t][0]) for s, t in self.pairs]
        self.means = nn.ModuleList(_mean(*width) for width in widths)
        raw = math.log(math.expm1(5 - 1e-5))  # a variance of 5
        self.raws = nn.ParameterList(torch.full((width,), raw) for _, width in widths)

    def compare(self, number: int, student: Tensor, teacher: Tensor) -> Tensor:
        if student.ndim == 2:
            student, teacher = student[:, :, None, None], teacher[:, :, None, None]
        student, teacher = match_spatial_size(student, teacher)
        variance = (F.softplus(self.raws[number]) + 1e-5)[:, None, None]
        return (
            mean_square((self.means[number](student) - teacher) * variance.rsqrt())
            + variance.log().mean()
        ) / 2


def _mean(student: int, teacher: int) -> nn.Module:
    def layer(inputs: int) -> nn.Module:
        return nn.Conv2d(inputs, teacher, 1, bias=False)

    return nn.Sequential(layer(student), nn.ReLU(), layer(teacher), nn.ReLU(), layer(teacher))
