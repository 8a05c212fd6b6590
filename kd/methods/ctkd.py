"""Curriculum temperature for knowledge distillation (Li et al. 2023, arXiv 2211.16231).

This is the variant with one global temperature.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import nn

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
    soft_kl,
)
from kd.models.base import ModelOutput


class CTKDConfig(LogitMethodConfig):
    """Settings of the `ctkd` method."""

    name: Literal["ctkd"]
    beta: float = Field(ge=0)
    t_min: Temperature
    t_range: float = Field(ge=0, le=1e3)
    warmup_fraction: float = Field(ge=0, le=1)


class CTKD(Method):
    """loss = alpha * CE + beta * T^2 KL(teacher_T || student_T).

    T = t_min + t_range * sigmoid(raw), where `raw` is learned. Its gradient is multiplied by a
    factor that falls from 0 to -1 along a cosine in the first fraction `warmup_fraction` of the
    training, so T makes the student's task harder. `raw` starts at 1, as in the paper's code.
    """

    Config = CTKDConfig

    def __init__(self, config: CTKDConfig, context: MethodContext):
        super().__init__(config, context)
        self.warmup_epochs = config.warmup_fraction * context.epochs
        self.raw = nn.Parameter(torch.ones(()))

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        """Return the terms `hard` and `soft`."""
        config = self.config
        s, t = comparison_logits(config, student, teacher)
        factor = (math.cos(math.pi * linear_warmup(batch, self.warmup_epochs)) - 1) / 2
        # The value of self.raw, with its gradient multiplied by the factor.
        raw = self.raw.detach() + factor * (self.raw - self.raw.detach())
        return {
            "hard": (config.alpha, cross_entropy(batch, student)),
            "soft": (config.beta, soft_kl(s, t, config.t_min + config.t_range * raw.sigmoid())),
        }
