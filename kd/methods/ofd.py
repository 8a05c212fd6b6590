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
    """Settings of the `ofd` method."""

    name: Literal["ofd"]


class OFD(FeatureMethod):
    """loss = alpha * CE + beta * sum_{l = 1..L} 2^-(L-l) * (sum of the partial distances) / B.

    l numbers the pairs; B is the batch size. Maps are taken before their activation. The partial
    distance is (s - t')^2, but 0 where s <= t' <= 0. Here t' = max(t, m) for the teacher's map t,
    and s is the student's map after a learned 1 x 1 convolution and batch norm. The margin m of a
    channel is E[x | x < 0] of a normal x with the mean and the standard deviation given by the
    teacher's batch norm. `pairs: stages` selects the last map of each size that ends in a batch
    norm in both networks. The larger map is average-pooled to the size of the smaller. The teacher
    is in eval mode (the authors' is not).
    """

    Config = OFDConfig
    dims = (3,)

    @classmethod
    def resolve_pairs(cls, config: Any, context: MethodContext) -> list[tuple[str, str]]:
        """Return the pairs; words select among the maps with a batch norm, before activation."""
        if not isinstance(config.pairs, str):
            return pairs(config.pairs, context)
        student = _normalized_maps("student", context.student_net, context.student)
        teacher = _normalized_maps("teacher", context.teacher_net, context.teacher)
        normalized = MethodContext(student, teacher, context.classes, context.samples)
        return pre_activation_pairs(pairs(config.pairs, normalized))

    @classmethod
    def check(cls, config: Any, context: MethodContext) -> None:
        """Check the pairs, and that each map of the teacher comes from a batch norm."""
        super().check(config, context)
        for _, tap in cls.resolve_pairs(config, context):
            if _batch_norm(context.teacher_net, tap.removesuffix(PRE)) is None:
                raise ValueError(
                    f"pairs: the teacher's {tap} does not come from a batch norm, "
                    "which ofd needs for the margin"
                )

    def __init__(self, config: OFDConfig, context: MethodContext):
        super().__init__(config, context)
        widths = [
            (shape_of(s, context.student)[0], shape_of(t, context.teacher)[0])
            for s, t in self.pairs
        ]
        self.connectors = nn.ModuleList(
            nn.Sequential(nn.Conv2d(student, teacher, 1, bias=False), nn.BatchNorm2d(teacher))
            for student, teacher in widths
        )
        for pair_index, (_, tap) in enumerate(self.pairs):
            norm = _batch_norm(context.teacher_net, tap.removesuffix(PRE))
            assert norm is not None
            self.register_buffer(f"margin{pair_index}", margin(norm.weight, norm.bias))

    def compare(self, pair_index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the partial distance summed per sample, times the weight of the level."""
        student, teacher = match_spatial_size(student, teacher)
        connected = self.connectors[pair_index](student)
        target = torch.maximum(teacher, self.get_buffer(f"margin{pair_index}")[:, None, None])
        mask = (connected > target) | (target > 0)
        weight = 0.5 ** (len(self.pairs) - 1 - pair_index)
        loss: Tensor = weight * ((connected - target).square() * mask).sum() / len(connected)
        return loss


def _normalized_maps(
    side: str, net: Any, shapes: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the maps that end in a batch norm (and an activation).

    Raises:
        ValueError: If there is none.
    """
    maps: dict[str, tuple[int, ...]] = {
        tap: shape
        for tap, shape in shapes.items()
        if len(shape) == 3 and _batch_norm(net, tap) is not None
    }
    if not maps:
        raise ValueError(f"pairs: no map of the {side} comes from a batch norm, which ofd needs")
    return maps


def _batch_norm(net: Any, tap: str) -> nn.BatchNorm2d | None:
    """Return the last batch norm of the module that outputs the tap, ignoring any on a shortcut."""
    norms = [
        module
        for name, module in net.tap_module(tap).named_modules()
        if isinstance(module, nn.BatchNorm2d)
        and not {"shortcut", "downsample"} & set(name.split("."))
    ]
    return norms[-1] if norms else None


def margin(weight: Tensor, bias: Tensor) -> Tensor:
    """Return the margins [C]: E[x | x < 0] of x ~ N(bias, weight^2).

    Where x < 0 is very rare (probability at most 0.001) the margin is -3 |weight|, as in the
    authors' code.
    """
    deviation = weight.detach().double().abs().clamp(min=1e-12)
    mean = bias.detach().double()
    standardised_mean = mean / deviation
    probability = torch.special.ndtr(-standardised_mean)
    density = (-standardised_mean.square() / 2).exp() / math.sqrt(2 * math.pi)
    expectation = mean - deviation * density / probability.clamp(min=1e-300)
    margins = torch.where(probability > 0.001, expectation, -3 * deviation)
    return margins.to(weight.dtype)
