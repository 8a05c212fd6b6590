"""A student whose feature map feeds the teacher's last layers (SimKD).

Chen et al. 2022, arXiv 2203.14001.
"""

from typing import Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd.core.settings import Settings
from kd.models.base import Net


class Graft(Settings):
    """How the networks are joined.

    The student up to `student_tap` is followed by a projector and the teacher after `teacher_tap`.
    """

    teacher: dict[str, Any]  # the settings of the teacher's model
    student_tap: str
    teacher_tap: str
    factor: int = Field(ge=1)  # the projector has outputs / factor channels inside


class Projector(nn.Sequential):
    """Map the student's features [B, inputs, H, W] to the teacher's [B, outputs, *size].

    1 x 1, 3 x 3 and 1 x 1 convolution, each with batch norm and ReLU. A larger map is
    average-pooled first; a smaller one keeps its size.
    """

    def __init__(self, inputs: int, outputs: int, size: tuple[int, ...], factor: int):
        inner = max(1, outputs // factor)
        layers: list[nn.Module] = []
        for channels_in, channels_out, kernel in (
            (inputs, inner, 1),
            (inner, inner, 3),
            (inner, outputs, 1),
        ):
            layers += [
                nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False),
                nn.BatchNorm2d(channels_out),
                nn.ReLU(),
            ]
        super().__init__(*layers)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, min(H, size[0]), min(W, size[1])]."""
        height, width = (min(pair) for pair in zip(x.shape[2:], self.size, strict=True))
        projected: Tensor = super().forward(  # type: ignore[no-untyped-call]
            F.adaptive_avg_pool2d(x, (height, width))
        )
        return projected


class Grafted(Net):
    """The student up to a tap, the projector and the teacher after a tap. No module is copied."""

    def __init__(self, student: Net, projector: nn.Module, teacher: Net, graft: Graft):
        student_stages = list(student.stages.items())
        teacher_stages = list(teacher.stages.items())
        student_end = list(student.stages).index(graft.student_tap) + 1
        teacher_start = list(teacher.stages).index(graft.teacher_tap) + 1
        super().__init__(
            **{f"student_{name}": stage for name, stage in student_stages[:student_end]},
            projector=projector,
            **{f"teacher_{name}": stage for name, stage in teacher_stages[teacher_start:]},
        )


def build_grafted(student: Net, teacher: Net, graft: Graft, size: int) -> Grafted:
    """Build the network that `graft` describes, with a new projector.

    Args:
        student: The student.
        teacher: The teacher.
        graft: The taps and the width of the projector.
        size: Images are size x size.

    Raises:
        KeyError: One of the networks has no such tap.
        ValueError: The tap is not a stage of the network.
    """
    student_shape = student.shapes(size)[graft.student_tap]
    teacher_shape = teacher.shapes(size)[graft.teacher_tap]
    projector = Projector(student_shape[0], teacher_shape[0], teacher_shape[1:], graft.factor)
    return Grafted(student, projector, teacher, graft)
