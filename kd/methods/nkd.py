"""From knowledge distillation to self-knowledge distillation: normalised KD (Yang et al. 2023, arXiv 2303.13005)."""

from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field

from kd.data.batch import Batch
from kd.methods.base import (
    LogitMethodConfig,
    Method,
    MethodContext,
    Temperature,
    Terms,
    comparison_logits,
    cross_entropy,
    non_target_logits,
    require_non_target_classes,
)
from kd.models.base import ModelOutput


class NKDConfig(LogitMethodConfig):
    name: Literal["nkd"]
    target: float = Field(ge=0)
    other: float = Field(ge=0)
    T: Temperature


class NKD(Method):
    """loss = alpha * CE - target * p_t[label] log p_s[label] - other * T^2 sum_k o_t[k] log o_s[k].

    p at temperature 1; o = softmax over all classes but the label, at temperature T. A cross-entropy, so not zero
    where student and teacher agree.
    """

    Config = NKDConfig

    @classmethod
    def needs_labels(cls, config: Any) -> bool:
        return True

    @classmethod
    def check(cls, config: NKDConfig, spec: MethodContext) -> None:
        require_non_target_classes(spec)

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        c, y = self.config, batch.y[:, None]
        s, t = comparison_logits(c, student, teacher)
        target = -(F.softmax(t, dim=1).gather(1, y) * F.log_softmax(s, dim=1).gather(1, y)).mean()
        rest = F.cross_entropy(
            non_target_logits(s, batch.y) / c.T,
            F.softmax(non_target_logits(t, batch.y) / c.T, dim=1),
        )
        return {
            "hard": (c.alpha, cross_entropy(batch, student)),
            "target": (c.target, target),
            "other": (c.other, c.T**2 * rest),
        }
