"""A comprehensive overhaul of feature distillation (Heo et al. 2019, arXiv 1904.01866)."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kd.methods.base import MethodContext
from kd.methods.paired import (
    FeatureMethod,
    FeatureMethodConfig,
    match_spatial_size,
    pairs,
    pre_activation_pairs,
    shape_of,
)
from kd.models.base import PRE


class OFDConfig(FeatureMethodConfig):
    name: Literal["ofd"]


class OFD(FeatureMethod):
    """loss = alpha * CE + beta * sum over the pairs, l = 1 .. L, of 2^-(L-l) * (sum of the partial distances) / B.

    Maps are taken before their activation. Partial distance: (s - t')^2, but 0 where s <= t' <= 0, with t' = max(t, m)
    of the teacher's map and s of the student's through a 1 x 1 convolution and batch norm, both learned. The margin m
    of a channel is E[x | x < 0] of a normal x with the mean and deviation that the teacher's batch norm gives it. With
    `pairs: stages`: the last map of each size at whose end both networks have a batch norm. The larger map is
    average-pooled to the smaller's size. The teacher is in eval mode (the authors' is not).
    """

    Config = OFDConfig
    dims = (3,)

    @classmethod
    def resolve_pairs(cls, config: Any, spec: MethodContext) -> list[tuple[str, str]]:
        if not isinstance(config.pairs, str):
            return pairs(config.pairs, spec)
        student = _normalized_maps("student", spec.student_net, spec.student)
        teacher = _normalized_maps("teacher", spec.teacher_net, spec.teacher)
        return pre_activation_pairs(
            pairs(config.pairs, MethodContext(student, teacher, spec.classes, spec.samples))
        )

    @classmethod
    def check(cls, config: Any, spec: MethodContext) -> None:
        super().check(config, spec)
        for _, tap in cls.resolve_pairs(config, spec):
            if _norm(spec.teacher_net, tap.removesuffix(PRE)) is None:
                raise ValueError(
                    f"pairs: the teacher's {tap} does not come from a batch norm, which gives the margin"
                )

    def __init__(self, config: OFDConfig, spec: MethodContext):
        super().__init__(config, spec)
        widths = [
            (shape_of(s, spec.student)[0], shape_of(t, spec.teacher)[0]) for s, t in self.pairs
        ]
        self.connectors = nn.ModuleList(
            nn.Sequential(nn.Conv2d(student, teacher, 1, bias=False), nn.BatchNorm2d(teacher))
            for student, teacher in widths
        )
        for number, (_, tap) in enumerate(self.pairs):
            norm = _norm(spec.teacher_net, tap.removesuffix(PRE))
            assert norm is not None
            self.register_buffer(f"margin{number}", margin(norm.weight, norm.bias))

    def compare(self, number: int, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = match_spatial_size(student, teacher)
        seen = self.connectors[number](student)
        target = torch.maximum(teacher, self.get_buffer(f"margin{number}")[:, None, None])
        counts = (seen > target) | (target > 0)
        return (
            0.5 ** (len(self.pairs) - 1 - number)
            * ((seen - target).square() * counts).sum()
            / len(seen)
        )


def _normalized_maps(
    side: str, net: Any, shapes: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The maps that end in a batch norm (and an activation). **Raises:** ValueError when there is none."""
    found = {
        tap: shapes[tap] for tap in shapes if len(shapes[tap]) == 3 and _norm(net, tap) is not None
    }
    if not found:
        raise ValueError(f"pairs: no map of the {side} comes from a batch norm, which ofd needs")
    return found


def _norm(net: Any, tap: str) -> nn.BatchNorm2d | None:
    """The batch norm at the end of the module that gives the tap; not that of a shortcut beside it."""
    found = [
        module
        for name, module in net.tap_module(tap).named_modules()
        if isinstance(module, nn.BatchNorm2d)
        and not {"shortcut", "downsample"} & set(name.split("."))
    ]
    return found[-1] if found else None


def margin(weight: Tensor, bias: Tensor) -> Tensor:
    """E[x | x < 0] of x ~ N(bias, weight^2): [C]; where that hardly ever is, -3 |weight|, as the authors do."""
    deviation, mean = weight.detach().double().abs().clamp(min=1e-12), bias.detach().double()
    place = mean / deviation
    below = torch.special.ndtr(-place)
    density = (-place.square() / 2).exp() / math.sqrt(2 * math.pi)
    found = torch.where(
        below > 0.001, mean - deviation * density / below.clamp(min=1e-300), -3 * deviation
    )
    return found.to(weight.dtype)
