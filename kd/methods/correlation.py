"""Correlation congruence for knowledge distillation (Peng et al. 2019, arXiv 1904.01802)."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kd.methods.paired import FeatureMethod, FeatureMethodConfig


class CorrelationConfig(FeatureMethodConfig):
    name: Literal["correlation"]
    gamma: float = Field(gt=0, le=100)
    order: int = Field(ge=1, le=50)


class Correlation(FeatureMethod):
    """loss = alpha * CE + beta * sum over the pairs of mean_ij (K_s - K_t)^2.

    K_ij = exp(-2 gamma) sum_p (2 gamma)^p / p! (f_i . f_j)^p: a Gaussian kernel, to the power `order`, of the batch's
    flattened taps f, each of norm 1. No part is trained.
    """

    Config = CorrelationConfig

    def kernel(self, x: Tensor) -> Tensor:
        """[b, b] of a tap [b, ...]."""
        gamma, x = self.config.gamma, F.normalize(x.flatten(1), dim=1)
        alike, factors = (
            x @ x.T,
            [(2 * gamma) ** p / math.factorial(p) for p in range(self.config.order + 1)],
        )
        return math.exp(-2 * gamma) * sum(
            (f * alike**p for p, f in enumerate(factors)), torch.zeros_like(alike)
        )

    def compare(self, number: int, student: Tensor, teacher: Tensor) -> Tensor:
        return (self.kernel(student) - self.kernel(teacher)).square().mean()
