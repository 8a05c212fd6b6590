"""Distilling knowledge via knowledge review (Chen et al. 2021, arXiv 2104.09044)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd.data.batch import Batch
from kd.methods.base import MethodContext, Terms, cross_entropy, linear_warmup, mean_square
from kd.methods.paired import (
    FeatureMethod,
    FeatureMethodConfig,
    pairs,
    pre_activation_pairs,
    shape_of,
)
from kd.models.base import ModelOutput


class ReviewKDConfig(FeatureMethodConfig):
    name: Literal["reviewkd"]
    warmup: float = Field(ge=0, le=1)


class ReviewKD(FeatureMethod):
    """loss = alpha * CE + beta * min(1, epoch / (warmup * epochs)) * sum over the levels of hcl(out_l, t_l).

    From the deepest level to the first, the student's map is joined with what came from the level below it (attention
    based fusion, ABF) and turned into `out`, of the shape of the teacher's map. hcl: the mean squared error of maps at
    full size (weight 1) and average-pooled to 4 x 4, 2 x 2, 1 x 1 (1/2, 1/4, 1/8), those smaller than the map, over the
    sum of the weights. With `pairs: stages` the levels are the last map of each size as its activation reads it and,
    as a map of 1 x 1, the last vector.
    """

    Config = ReviewKDConfig

    @classmethod
    def resolve_pairs(cls, config: Any, spec: MethodContext) -> list[tuple[str, str]]:
        found = pairs(config.pairs, spec)
        if config.pairs != "stages":
            return found
        try:
            return pre_activation_pairs(found) + pairs("vector", spec)
        except ValueError:  # a network without one
            return pre_activation_pairs(found)

    def __init__(self, config: ReviewKDConfig, spec: MethodContext):
        super().__init__(config, spec)
        ins = [shape_of(s, spec.student) for s, _ in self.pairs]
        outs = [shape_of(t, spec.teacher) for _, t in self.pairs]
        middle = min(
            512, next((i[0] for i in reversed(ins) if len(i) == 3), ins[-1][0])
        )  # of the deepest map
        self.levels = nn.ModuleList(
            _Fusion(i[0], middle, o[0], o[1:] or (1, 1), n < len(ins) - 1)
            for n, (i, o) in enumerate(zip(ins, outs, strict=True))
        )
        self.warm = config.warmup * spec.epochs

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        assert teacher is not None
        total, below = student.logits.new_zeros(()), None
        for level, (s, t) in reversed(list(zip(self.levels, self.pairs, strict=True))):
            out, below = level(_map(student.taps[s]), below)
            total = total + hcl(out, _map(teacher.taps[t]))
        weight = self.config.beta * linear_warmup(batch, self.warm)
        return {
            "hard": (self.config.alpha, cross_entropy(batch, student)),
            "review": (weight, total),
        }


class _Fusion(nn.Module):
    """ABF: (map [B, in, H, W], map from below or None) -> (out [B, out, *size], map [B, middle, *size] for above)."""

    def __init__(self, inputs: int, middle: int, outputs: int, size: tuple[int, ...], joins: bool):
        super().__init__()
        self.size = size
        self.conv1, self.bn1 = nn.Conv2d(inputs, middle, 1, bias=False), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = (
            nn.Conv2d(middle, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.att = nn.Conv2d(2 * middle, 2, 1) if joins else None
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, x: Tensor, below: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.bn1(self.conv1(x))
        if self.att is not None and below is not None:
            below = F.interpolate(below, x.shape[2:], mode="nearest")
            own, other = self.att(torch.cat([x, below], dim=1)).sigmoid().chunk(2, dim=1)
            x = x * own + below * other
        if x.shape[2:] != self.size:
            x = F.interpolate(x, self.size, mode="nearest")
        return self.bn2(self.conv2(x)), x


def _map(x: Tensor) -> Tensor:
    return x if x.ndim == 4 else x[:, :, None, None]


def hcl(student: Tensor, teacher: Tensor) -> Tensor:
    """The hierarchical context loss of two maps of one shape: a scalar."""
    apart = student - teacher  # the difference of pooled maps is the pooled difference
    total, weights, weight = mean_square(apart), 1.0, 1.0
    for size in (4, 2, 1):
        if size < student.shape[2]:
            weight /= 2
            # to 1 x 1 adaptive pooling is a mean, for whose gradient see base.mean_square
            pooled = (
                F.adaptive_avg_pool2d(apart, size)
                if size > 1
                else F.avg_pool2d(apart, apart.shape[2:])
            )
            total, weights = total + weight * mean_square(pooled), weights + weight
    return total / weights
