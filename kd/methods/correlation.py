"""Correlation congruence for knowledge distillation (Peng et al. 2019, arXiv 1904.01802)."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kd.methods.paired import FeatureMethod, FeatureMethodConfig


class CorrelationConfig(FeatureMethodConfig):
    """Settings of the `correlation` method."""

    name: Literal["correlation"]
    gamma: float = Field(gt=0, le=100)
    order: int = Field(ge=1, le=50)


class Correlation(FeatureMethod):
    """loss = alpha * CE + beta * sum over the pairs of mean_ij (K_s - K_t)^2.

    K_ij = exp(-2 gamma) sum_p (2 gamma)^p / p! (f_i . f_j)^p is a Gaussian kernel of the flattened
    taps f of the batch, each of norm 1, expanded up to the power `order`. No part is trained.
    """

    Config = CorrelationConfig

    def kernel(self, x: Tensor) -> Tensor:
        """Return the kernel matrix [B, B] of a tap [B, ...]."""
        gamma = self.config.gamma
        x = F.normalize(x.flatten(1), dim=1)
        cosines = x @ x.T
        factors = [(2 * gamma) ** p / math.factorial(p) for p in range(self.config.order + 1)]
        powers = (factor * cosines**p for p, factor in enumerate(factors))
        return math.exp(-2 * gamma) * sum(powers, torch.zeros_like(cosines))

    def compare(self, pair_index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean squared difference of the kernel matrices."""
        return (self.kernel(student) - self.kernel(teacher)).square().mean()
