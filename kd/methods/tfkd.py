"""Teacher-free knowledge distillation (Yuan et al. 2020, arXiv 1909.11723).

Paper: "Revisiting knowledge distillation via label smoothing regularization".
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from kd.core.settings import Settings
from kd.data.batch import Batch
from kd.methods.base import Method, Temperature, Terms, cross_entropy
from kd.models.base import ModelOutput


class TfKDConfig(Settings):
    """Settings of the `tfkd` method."""

    name: Literal["tfkd"]
    alpha: float = Field(ge=0, le=1)
    correct: float = Field(ge=0, le=1)
    T: Temperature


class TfKD(Method):
    """loss = alpha * CE + (1 - alpha) * KL(softmax(u / T) || student).

    u is `correct` at the label; the other classes share 1 - `correct` equally. As in the paper's
    code, the student is at temperature 1 and there is no factor T^2. The divergence is averaged
    over the batch; the paper's code also divides it by the number of classes and multiplies it by a
    constant.
    """

    Config = TfKDConfig
    needs_teacher = False

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        """Return the terms `hard` and `soft`."""
        config = self.config
        z = student.logits
        other = (1 - config.correct) / (z.shape[1] - 1)
        u = torch.full_like(z, other).scatter(1, batch.y[:, None], config.correct)
        soft = F.kl_div(
            F.log_softmax(z, dim=1),
            F.log_softmax(u / config.T, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        return {
            "hard": (config.alpha, cross_entropy(batch, student)),
            "soft": (1 - config.alpha, soft),
        }
