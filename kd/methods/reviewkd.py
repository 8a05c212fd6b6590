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
    """Settings of the `reviewkd` method."""

    name: Literal["reviewkd"]
    warmup_fraction: float = Field(ge=0, le=1)


class ReviewKD(FeatureMethod):
    """loss = alpha * CE + r * beta * sum_l hcl(out_l, t_l), r = epoch / (warmup_fraction * epochs).

    r is at most 1.

    The levels l are visited from the deepest to the first. At each, the student's map is joined
    with the result of the next deeper level (attention based fusion, ABF) and turned into `out`, of
    the shape of the teacher's map t. hcl is a weighted mean of mean squared errors: of the maps at
    full size (weight 1), and average-pooled to 4 x 4, 2 x 2 and 1 x 1 (weights 1/2, 1/4 and 1/8)
    where that is smaller than the map. With `pairs: stages` the levels are the last map of each
    size, before its activation, and the last vector as a 1 x 1 map.
    """

    Config = ReviewKDConfig

    @classmethod
    def resolve_pairs(cls, config: Any, context: MethodContext) -> list[tuple[str, str]]:
        """Return the pairs; `stages` selects maps before activation, and the last vectors."""
        tap_pairs = pairs(config.pairs, context)
        if config.pairs != "stages":
            return tap_pairs
        try:
            return pre_activation_pairs(tap_pairs) + pairs("penultimate", context)
        except ValueError:  # a network without a vector
            return pre_activation_pairs(tap_pairs)

    def __init__(self, config: ReviewKDConfig, context: MethodContext):
        super().__init__(config, context)
        student_shapes = [shape_of(s, context.student) for s, _ in self.pairs]
        teacher_shapes = [shape_of(t, context.teacher) for _, t in self.pairs]
        deepest_map = next(
            (shape for shape in reversed(student_shapes) if len(shape) == 3), student_shapes[-1]
        )
        middle = min(512, deepest_map[0])
        last = len(self.pairs) - 1
        shapes = enumerate(zip(student_shapes, teacher_shapes, strict=True))
        self.levels = nn.ModuleList(
            _Fusion(student[0], middle, teacher[0], teacher[1:] or (1, 1), level < last)
            for level, (student, teacher) in shapes
        )
        self.warmup_epochs = config.warmup_fraction * context.epochs

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        """Return the terms `hard` and `review`."""
        assert teacher is not None
        total = student.logits.new_zeros(())
        deeper = None
        for level, (s, t) in reversed(list(zip(self.levels, self.pairs, strict=True))):
            out, deeper = level(_as_map(student.taps[s]), deeper)
            total = total + hcl(out, _as_map(teacher.taps[t]))
        weight = self.config.beta * linear_warmup(batch, self.warmup_epochs)
        return {
            "hard": (self.config.alpha, cross_entropy(batch, student)),
            "review": (weight, total),
        }


class _Fusion(nn.Module):
    """Attention based fusion of a map with the result of the next deeper level.

    The input is a map [B, inputs, H, W] and the deeper level's fused map, or None. The output is
    `out` [B, outputs, *size] and the fused map [B, middle, *size] for the next shallower level.
    """

    def __init__(
        self, inputs: int, middle: int, outputs: int, size: tuple[int, ...], has_deeper: bool
    ):
        super().__init__()
        self.size = size
        self.conv1 = nn.Conv2d(inputs, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.att = nn.Conv2d(2 * middle, 2, 1) if has_deeper else None
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, x: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.bn1(self.conv1(x))
        if self.att is not None and deeper is not None:
            deeper = F.interpolate(deeper, x.shape[2:], mode="nearest")
            attention = self.att(torch.cat([x, deeper], dim=1)).sigmoid()
            own_share, deeper_share = attention.chunk(2, dim=1)
            x = x * own_share + deeper * deeper_share
        if x.shape[2:] != self.size:
            x = F.interpolate(x, self.size, mode="nearest")
        return self.bn2(self.conv2(x)), x


def _as_map(x: Tensor) -> Tensor:
    return x if x.ndim == 4 else x[:, :, None, None]


def hcl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the hierarchical context loss of two maps of the same shape, a scalar."""
    # The difference of pooled maps is the pooled difference.
    difference = student - teacher
    total = mean_square(difference)
    weight_sum = 1.0
    weight = 1.0
    for size in (4, 2, 1):
        if size < student.shape[2]:
            weight /= 2
            # To 1 x 1, adaptive pooling is a mean, whose gradient is slow: see base.mean_square.
            pooled = (
                F.adaptive_avg_pool2d(difference, size)
                if size > 1
                else F.avg_pool2d(difference, difference.shape[2:])
            )
            total = total + weight * mean_square(pooled)
            weight_sum = weight_sum + weight
    return total / weight_sum
