"""Weighted transformed teacher matching (Zheng and Yang 2024, arXiv 2402.11148).

Paper: "Knowledge distillation based on transformed teacher matching".
"""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field

from kd.data.batch import Batch
from kd.methods.base import LogitMethodConfig, Method, Terms, comparison_logits, cross_entropy
from kd.models.base import ModelOutput


class WTTMConfig(LogitMethodConfig):
    """Settings of the `wttm` method."""

    name: Literal["wttm"]
    beta: float = Field(ge=0)
    power: float = Field(gt=0, le=10)


class WTTM(Method):
    """loss = alpha * CE + beta * mean_i w_i KL(r_i || p_i).

    r = p_t^power / w and w = sum_k p_t[k]^power. p of both networks is at temperature 1: only the
    teacher is transformed, and there is no factor T^2.
    """

    Config = WTTMConfig

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        """Return the terms `hard` and `soft`."""
        config = self.config
        s, t = comparison_logits(config, student, teacher)
        scaled_log_p_t = config.power * F.log_softmax(t, dim=1)
        weight = scaled_log_p_t.logsumexp(dim=1).exp()
        divergence = F.kl_div(
            F.log_softmax(s, dim=1),
            F.log_softmax(scaled_log_p_t, dim=1),
            reduction="none",
            log_target=True,
        )
        return {
            "hard": (config.alpha, cross_entropy(batch, student)),
            "soft": (config.beta, (weight * divergence.sum(dim=1)).mean()),
        }
