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
    name: Literal["dkd"]
    target: float = Field(ge=0)
    other: float = Field(ge=0)
    T: Temperature
    warmup: float = Field(ge=0, le=1)


class DKD(Method):
    """loss = alpha * CE + r * (target * T^2 KL(b_t || b_s) + other * T^2 KL(o_t || o_s)).

    b = (p[label], 1 - p[label]); o = softmax over all classes but the label; all at temperature T. r rises from 0 to 1
    in the first `warmup` of the training.
    """

    Config = DKDConfig

    @classmethod
    def needs_labels(cls, config: Any) -> bool:
        return True

    @classmethod
    def check(cls, config: DKDConfig, spec: MethodContext) -> None:
        require_non_target_classes(spec)

    def __init__(self, config: DKDConfig, spec: MethodContext):
        super().__init__(config, spec)
        self.over = config.warmup * spec.epochs

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        c, r = self.config, linear_warmup(batch, self.over)
        s, t = comparison_logits(c, student, teacher)
        binary = c.T**2 * F.kl_div(
            _binary(s / c.T, batch.y),
            _binary(t / c.T, batch.y),
            reduction="batchmean",
            log_target=True,
        )
        rest = soft_kl(non_target_logits(s, batch.y), non_target_logits(t, batch.y), c.T)
        return {
            "hard": (c.alpha, cross_entropy(batch, student)),
            "target": (r * c.target, binary),
            "other": (r * c.other, rest),
        }


def _binary(z: Tensor, y: Tensor) -> Tensor:
    """[B, 2]: the logarithms of p[label] and of 1 - p[label]."""
    whole = z.logsumexp(dim=1)
    return torch.stack(
        [z.gather(1, y[:, None])[:, 0] - whole, non_target_logits(z, y).logsumexp(dim=1) - whole],
        dim=1,
    )
