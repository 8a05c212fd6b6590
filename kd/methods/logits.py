"""Distilling the knowledge in a neural network (Hinton, Vinyals and Dean 2015, arXiv 1503.02531)."""

from typing import Literal

from kd.data.batch import Batch
from kd.methods.base import Method, Terms, Weights, compared, hard, soft_kl
from kd.models.base import Out


class LogitsConfig(Weights):
    name: Literal["logits"]
    standardize: bool = False


class Logits(Method):
    """loss = alpha * CE(student, labels) + (1 - alpha) * T^2 * KL(teacher_T || student_T)."""

    Config = LogitsConfig

    def forward(self, batch: Batch, student: Out, teacher: Out | None) -> Terms:
        soft = soft_kl(*compared(self.config, student, teacher), self.config.T)
        return {"hard": (self.config.alpha, hard(batch, student)), "soft": (1 - self.config.alpha, soft)}
