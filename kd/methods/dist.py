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
    name: Literal["dist"]
    inter: float = Field(ge=0)
    intra: float = Field(ge=0)
    T: Temperature


class DIST(Method):
    """loss = alpha * CE + inter * T^2 (1 - rho over the classes) + intra * T^2 (1 - rho over the batch).

    rho is Pearson's correlation of the student's probabilities with the teacher's, at temperature T: of each sample's
    row, and of each class's column; each averaged.
    """

    Config = DISTConfig

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        c = self.config
        p, q = (F.softmax(z / c.T, dim=1) for z in comparison_logits(c, student, teacher))
        return {
            "hard": (c.alpha, cross_entropy(batch, student)),
            "inter": (c.inter, c.T**2 * (1 - _correlation(p, q, 1)).mean()),
            "intra": (c.intra, c.T**2 * (1 - _correlation(p, q, 0)).mean()),
        }


def _correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
    return F.cosine_similarity(
        a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True), dim=dim
    )
