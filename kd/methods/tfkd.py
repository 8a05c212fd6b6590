"""Revisiting knowledge distillation via label smoothing: teacher-free KD (Yuan et al. 2020, arXiv 1909.11723)."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from kd.core.settings import Settings
from kd.data.batch import Batch
from kd.methods.base import Method, Temperature, Terms, cross_entropy
from kd.models.base import ModelOutput


class TfKDConfig(Settings):
    name: Literal["tfkd"]
    alpha: float = Field(ge=0, le=1)
    correct: float = Field(ge=0, le=1)
    T: Temperature


class TfKD(Method):
    """loss = alpha * CE + (1 - alpha) * KL(softmax(u / T) || student), u = `correct` at the label, else its share.

    As in the paper's code the student is at temperature 1 and there is no T^2; averaged over the batch, where that
    code also divides by the classes and multiplies by a number of its own.
    """

    Config = TfKDConfig
    needs_teacher = False

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        c, z = self.config, student.logits
        made = torch.full_like(z, (1 - c.correct) / (z.shape[1] - 1)).scatter(
            1, batch.y[:, None], c.correct
        )
        soft = F.kl_div(
            F.log_softmax(z, dim=1),
            F.log_softmax(made / c.T, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        return {"hard": (c.alpha, cross_entropy(batch, student)), "soft": (1 - c.alpha, soft)}
