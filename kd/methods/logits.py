"""Knowledge distillation (Hinton, Vinyals and Dean 2015, arXiv 1503.02531).

Paper: "Distilling the knowledge in a neural network".
"""

from typing import Literal

from kd.data.batch import Batch
from kd.methods.base import Method, Terms, Weights, comparison_logits, cross_entropy, soft_kl
from kd.models.base import ModelOutput


class LogitsConfig(Weights):
    """Settings of the `logits` method."""

    name: Literal["logits"]
    standardize: bool = False


class Logits(Method):
    """loss = alpha * CE(student, labels) + (1 - alpha) * T^2 * KL(teacher_T || student_T)."""

    Config = LogitsConfig

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        """Return the terms `hard` and `soft`."""
        soft = soft_kl(*comparison_logits(self.config, student, teacher), self.config.T)
        return {
            "hard": (self.config.alpha, cross_entropy(batch, student)),
            "soft": (1 - self.config.alpha, soft),
        }
