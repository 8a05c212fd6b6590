"""Knowledge distillation from a stronger teacher (Huang et al. 2022, arXiv 2205.10536)."""

from typing import Literal

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
)
from kd.models.base import ModelOutput


class DISTConfig(LogitMethodConfig):
    """Settings of the `dist` method."""

    name: Literal["dist"]
    inter: float = Field(ge=0)
    intra: float = Field(ge=0)
    T: Temperature


class DIST(Method):
    """loss = alpha * CE + inter * T^2 (1 - rho over classes) + intra * T^2 (1 - rho over batch).

    rho is Pearson's correlation of the student's probabilities with the teacher's, at temperature
    T: `inter` for the row of each sample, `intra` for the column of each class; each is averaged.
    """

    Config = DISTConfig

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        """Return the terms `hard`, `inter` and `intra`."""
        config = self.config
        p_s, p_t = (
            F.softmax(z / config.T, dim=1) for z in comparison_logits(config, student, teacher)
        )
        return {
            "hard": (config.alpha, cross_entropy(batch, student)),
            "inter": (config.inter, config.T**2 * (1 - _correlation(p_s, p_t, 1)).mean()),
            "intra": (config.intra, config.T**2 * (1 - _correlation(p_s, p_t, 0)).mean()),
        }


def _correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
    return F.cosine_similarity(
        a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True), dim=dim
    )
