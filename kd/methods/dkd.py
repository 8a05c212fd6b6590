"""Decoupled knowledge distillation (Zhao et al. 2022, arXiv 2203.08679)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kd.data.batch import Batch
from kd.methods.base import (
    LogitMethodConfig,
    Method,
    MethodContext,
    Temperature,
    Terms,
    comparison_logits,
    cross_entropy,
    linear_warmup,
    non_target_logits,
    require_non_target_classes,
    soft_kl,
)
from kd.models.base import ModelOutput


class DKDConfig(LogitMethodConfig):
    """Settings of the `dkd` method."""

    name: Literal["dkd"]
    target: float = Field(ge=0)
    non_target: float = Field(ge=0)
    T: Temperature
    warmup_fraction: float = Field(ge=0, le=1)


class DKD(Method):
    """loss = alpha * CE + r * (target * T^2 KL(b_t || b_s) + non_target * T^2 KL(o_t || o_s)).

    b = (p[label], 1 - p[label]) and o is the softmax over all classes but the label, both at
    temperature T. r rises from 0 to 1 in the first fraction `warmup_fraction` of the training.
    """

    Config = DKDConfig

    @classmethod
    def needs_labels(cls, config: Any) -> bool:
        """Return True: the label separates the two soft terms."""
        return True

    @classmethod
    def check(cls, config: DKDConfig, context: MethodContext) -> None:
        """Check that there are at least three classes."""
        require_non_target_classes(context)

    def __init__(self, config: DKDConfig, context: MethodContext):
        super().__init__(config, context)
        self.warmup_epochs = config.warmup_fraction * context.epochs

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        """Return the terms `hard`, `target` and `non_target`."""
        config = self.config
        r = linear_warmup(batch, self.warmup_epochs)
        s, t = comparison_logits(config, student, teacher)
        target = config.T**2 * F.kl_div(
            _binary_log_probabilities(s / config.T, batch.y),
            _binary_log_probabilities(t / config.T, batch.y),
            reduction="batchmean",
            log_target=True,
        )
        non_target = soft_kl(non_target_logits(s, batch.y), non_target_logits(t, batch.y), config.T)
        return {
            "hard": (config.alpha, cross_entropy(batch, student)),
            "target": (r * config.target, target),
            "non_target": (r * config.non_target, non_target),
        }


def _binary_log_probabilities(z: Tensor, y: Tensor) -> Tensor:
    """Return the logarithms [B, 2] of p[label] and of 1 - p[label]."""
    log_total = z.logsumexp(dim=1)
    return torch.stack(
        [
            z.gather(1, y[:, None])[:, 0] - log_total,
            non_target_logits(z, y).logsumexp(dim=1) - log_total,
        ],
        dim=1,
    )
