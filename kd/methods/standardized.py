"""Logit standardization in knowledge distillation (Sun et al. 2024, arXiv 2403.01427)."""

from typing import Literal

from kd.data.batch import Batch
from kd.methods.base import (
    Method,
    Temperature,
    Terms,
    WeightedConfig,
    cross_entropy,
    soft_kl,
    standardise,
)
from kd.models.base import ModelOutput


class StandardizedConfig(WeightedConfig):
    """Settings of the `standardized` method."""

    name: Literal["standardized"]
    T: Temperature


class Standardized(Method):
    """loss = alpha * CE + beta * T^2 KL(teacher_T || student_T) of standardised logits.

    The standardised logits are (z - mean z) / (std z + 1e-7). Other methods on logits use them with
    `standardize: true`.
    """

    Config = StandardizedConfig

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        """Return the terms `hard` and `soft`."""
        assert teacher is not None
        soft = soft_kl(standardise(student.logits), standardise(teacher.logits), self.config.T)
        return {
            "hard": (self.config.alpha, cross_entropy(batch, student)),
            "soft": (self.config.beta, soft),
        }
