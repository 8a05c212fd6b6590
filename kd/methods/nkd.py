"""Normalised knowledge distillation (Yang et al. 2023, arXiv 2303.13005).

Paper: "From knowledge distillation to self-knowledge distillation".
"""

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
    """Settings of the `nkd` method."""

    name: Literal["nkd"]
    target: float = Field(ge=0)
    non_target: float = Field(ge=0)
    T: Temperature


class NKD(Method):
    """loss = alpha * CE - target * p_t[l] log p_s[l] - non_target * T^2 sum_k o_t[k] log o_s[k].

    l is the label. p is at temperature 1; o is the softmax over all classes but the label, at
    temperature T. The terms are cross-entropies, so they are not zero where student and teacher
    agree.
    """

    Config = NKDConfig

    @classmethod
    def needs_labels(cls, config: Any) -> bool:
        """Return True: the label separates the two soft terms."""
        return True

    @classmethod
    def check(cls, config: NKDConfig, context: MethodContext) -> None:
        """Check that there are at least three classes."""
        require_non_target_classes(context)

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        """Return the terms `hard`, `target` and `non_target`."""
        config = self.config
        y = batch.y[:, None]
        s, t = comparison_logits(config, student, teacher)
        target = -(F.softmax(t, dim=1).gather(1, y) * F.log_softmax(s, dim=1).gather(1, y)).mean()
        non_target = F.cross_entropy(
            non_target_logits(s, batch.y) / config.T,
            F.softmax(non_target_logits(t, batch.y) / config.T, dim=1),
        )
        return {
            "hard": (config.alpha, cross_entropy(batch, student)),
            "target": (config.target, target),
            "non_target": (config.non_target, config.T**2 * non_target),
        }
