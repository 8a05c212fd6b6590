"""Multi-level logit distillation (Jin, Wang and Lin, CVPR 2023)."""

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kd.data.batch import Batch
from kd.methods.base import (
    LogitMethodConfig,
    Method,
    Temperature,
    Terms,
    comparison_logits,
    cross_entropy,
    soft_kl,
)
from kd.models.base import ModelOutput


class MLKDConfig(LogitMethodConfig):
    """Settings of the `mlkd` method."""

    name: Literal["mlkd"]
    beta: float = Field(ge=0)
    temperatures: Annotated[list[Temperature], Field(min_length=1, max_length=100)]


class MLKD(Method):
    """loss = alpha * sum_views CE + beta * sum_T (sum_views T^2 KL + batch + class).

    sum_views is the sum over two views. With P = softmax(z / T) [B, classes] of the first view,
    batch = |P_t P_t' - P_s P_s'|^2 / B and class = |P_t' P_t - P_s' P_s|^2 / classes. The authors'
    second view is a RandAugment one; here both are crops and flips. Their later masks of the less
    confident half are left out. A step has twice the images of other methods.
    """

    Config = MLKDConfig
    views = 2

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        """Return the terms `hard`, `instance`, `batch` and `class`."""
        s, t = comparison_logits(self.config, student, teacher)
        first_s = s.chunk(self.views)[0]
        first_t = t.chunk(self.views)[0]
        terms = {"instance": s.new_zeros(()), "batch": s.new_zeros(()), "class": s.new_zeros(())}
        for T in self.config.temperatures:
            p_s = F.softmax(first_s / T, dim=1)
            p_t = F.softmax(first_t / T, dim=1)
            terms["instance"] = terms["instance"] + soft_kl(s, t, T)  # the mean of both views
            terms["batch"] = terms["batch"] + _gram_distance(p_s, p_t)
            terms["class"] = terms["class"] + _gram_distance(p_s.T, p_t.T)
        alpha = self.config.alpha
        beta = self.config.beta
        weights = {"instance": self.views * beta, "batch": beta, "class": beta}
        return {
            "hard": (self.views * alpha, cross_entropy(batch, student)),
            **{name: (weights[name], value) for name, value in terms.items()},
        }


def _gram_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared distance of the Gram matrices of the rows, per row."""
    return (b @ b.T - a @ a.T).square().sum() / len(a)
