"""Distillation without labels (Hinton, Vinyals and Dean 2015, arXiv 1503.02531).

This is the `logits` method with alpha = 0.
"""

from typing import Literal

from kd.core.settings import Settings
from kd.data.batch import Batch
from kd.methods.base import Method, Temperature, Terms, comparison_logits, soft_kl
from kd.models.base import ModelOutput


class SoftLabelsConfig(Settings):
    """Settings of the `soft_labels` method."""

    name: Literal["soft_labels"]
    T: Temperature
    standardize: bool = False


class SoftLabels(Method):
    """loss = T^2 * KL(teacher_T || student_T)."""

    Config = SoftLabelsConfig

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        """Return the term `soft`."""
        s, t = comparison_logits(self.config, student, teacher)
        return {"soft": (1.0, soft_kl(s, t, self.config.T))}
