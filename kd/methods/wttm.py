"""Knowledge distillation based on transformed teacher matching, weighted (Zheng and Yang 2024, arXiv 2402.11148)."""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field

from kd.data.batch import Batch
from kd.methods.base import LogitMethodConfig, Method, Terms, comparison_logits, cross_entropy
from kd.models.base import ModelOutput


class WTTMConfig(LogitMethodConfig):
    name: Literal["wttm"]
    beta: float = Field(ge=0)
    power: float = Field(gt=0, le=10)


class WTTM(Method):
    """loss = alpha * CE + beta * mean_i w_i KL(r_i || p_i), r = p_t^power / w, w = sum_k p_t[k]^power.

    Both p at temperature 1: only the teacher is transformed, and there is no T^2.
    """

    Config = WTTMConfig

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        c = self.config
        s, t = comparison_logits(c, student, teacher)
        raised = c.power * F.log_softmax(t, dim=1)
        weight = raised.logsumexp(dim=1).exp()
        each = F.kl_div(
            F.log_softmax(s, dim=1), F.log_softmax(raised, dim=1), reduction="none", log_target=True
        )
        return {
            "hard": (c.alpha, cross_entropy(batch, student)),
            "soft": (c.beta, (weight * each.sum(dim=1)).mean()),
        }
