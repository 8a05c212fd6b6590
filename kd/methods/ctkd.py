"""Curriculum temperature for knowledge distillation (Li et al. 2023, arXiv 2211.16231), with one global temperature."""

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
    name: Literal["ctkd"]
    beta: float = Field(ge=0)
    low: Temperature
    span: float = Field(ge=0, le=1e3)
    warmup: float = Field(ge=0, le=1)


class CTKD(Method):
    """loss = alpha * CE + beta * T^2 KL(teacher_T || student_T), T = low + span * sigmoid(raw).

    `raw` is learned, by the gradient times a factor that goes from 0 to -1, as a cosine, in the first `warmup` of the
    training: T makes the student's task harder. It begins at 1, as in the paper's code.
    """

    Config = CTKDConfig

    def __init__(self, config: CTKDConfig, spec: MethodContext):
        super().__init__(config, spec)
        self.over = config.warmup * spec.epochs
        self.raw = nn.Parameter(torch.ones(()))

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        c = self.config
        s, t = comparison_logits(c, student, teacher)
        factor = (math.cos(math.pi * linear_warmup(batch, self.over)) - 1) / 2
        raw = self.raw.detach() + factor * (
            self.raw - self.raw.detach()
        )  # its value, and its gradient times factor
        return {
            "hard": (c.alpha, cross_entropy(batch, student)),
            "soft": (c.beta, soft_kl(s, t, c.low + c.span * raw.sigmoid())),
        }
