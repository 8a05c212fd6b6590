"""A student whose map is led into the teacher's last layers (SimKD, Chen et al. 2022, arXiv 2203.14001)."""

from typing import Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd.core.settings import Settings
from kd.models.base import Net


class Graft(Settings):
    """What joins the two: the student up to `student_tap`, a projector, the teacher after `teacher_tap`."""

    teacher: dict[str, Any]  # the settings of the teacher's model
    student_tap: str
    teacher_tap: str
    factor: int = Field(ge=1)  # by which the projector is narrower inside than the teacher's map


class Projector(nn.Sequential):
    """The student's map [B, inputs, H, W] as the teacher's [B, outputs, *size]: 1 x 1, 3 x 3, 1 x 1 convolution, each
    with batch norm and ReLU. A larger map is average-pooled first, a smaller one stays as small."""

    def __init__(self, inputs: int, outputs: int, size: tuple[int, ...], factor: int):
        inner, layers = max(1, outputs // factor), []
        for i, o, kernel in ((inputs, inner, 1), (inner, inner, 3), (inner, outputs, 1)):
            layers += [
                nn.Conv2d(i, o, kernel, padding=kernel // 2, bias=False),
                nn.BatchNorm2d(o),
                nn.ReLU(),
            ]
        super().__init__(*layers)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        height, width = (min(pair) for pair in zip(x.shape[2:], self.size, strict=True))
        return super().forward(F.adaptive_avg_pool2d(x, (height, width)))


class Grafted(Net):
    """The student's stages up to a tap, the projector, the teacher's stages after a tap. None of them is copied."""

    def __init__(self, student: Net, projector: nn.Module, teacher: Net, graft: Graft):
        own, tail = list(student.stages.items()), list(teacher.stages.items())
        upto, after = (
            list(student.stages).index(graft.student_tap),
            list(teacher.stages).index(graft.teacher_tap),
        )
        super().__init__(
            **{f"student_{name}": stage for name, stage in own[: upto + 1]},
            projector=projector,
            **{f"teacher_{name}": stage for name, stage in tail[after + 1 :]},
        )


def build_grafted(student: Net, teacher: Net, graft: Graft, size: int) -> Grafted:
    """The network that a card with this graft describes. **Raises:** ValueError when they have no such taps."""
    inputs, outputs = (
        student.shapes(size)[graft.student_tap],
        teacher.shapes(size)[graft.teacher_tap],
    )
    return Grafted(
        student, Projector(inputs[0], outputs[0], outputs[1:], graft.factor), teacher, graft
    )
