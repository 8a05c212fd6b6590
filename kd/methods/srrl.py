"""Softmax regression representation learning (Yang et al. 2021, ICLR).

Paper: "Knowledge distillation via softmax regression representation learning".
"""

import copy
from typing import Any, Literal

from pydantic import Field
from torch import nn

from kd.data.batch import Batch
from kd.methods.base import Method, MethodContext, Terms, WeightedConfig, cross_entropy, mean_square
from kd.methods.paired import pairs
from kd.models.base import ModelOutput


class SRRLConfig(WeightedConfig):
    """Settings of the `srrl` method."""

    name: Literal["srrl"]
    regression: float = Field(ge=0)


class SRRL(Method):
    """loss = alpha * CE + beta * mean (h(f_s) - f_t)^2 + regression * mean (W_t h(f_s) - z_t)^2.

    f is the last vector before the logits z. h is a learned linear layer with batch norm and ReLU.
    W_t is the teacher's own classifier, frozen: h(f_s) must serve it as well as the teacher's
    vector does.
    """

    Config = SRRLConfig

    @classmethod
    def check(cls, config: Any, context: MethodContext) -> None:
        """Check that the last tap before the logits is a vector in both networks."""
        for side, shapes in (("student", context.student), ("teacher", context.teacher)):
            penultimate = list(shapes.values())[-2:-1]
            if not penultimate or len(penultimate[0]) != 1:
                raise ValueError(
                    f"name: srrl needs a {side} whose last tap before the logits is a vector"
                )

    def __init__(self, config: SRRLConfig, context: MethodContext):
        super().__init__(config, context)
        ((student, teacher),) = pairs("penultimate", context)
        self.student_taps = (student,)
        self.teacher_taps = (teacher,)
        width = context.teacher[teacher][0]
        self.connect = nn.Sequential(
            nn.Linear(context.student[student][0], width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
        )
        assert context.teacher_net is not None
        head = copy.deepcopy(context.teacher_net.head).eval().requires_grad_(False)
        # A bound method is not a submodule, so the head is neither trained nor saved.
        self.classify = head.forward

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        """Return the terms `hard`, `feature` and `regression`."""
        assert teacher is not None
        connected = self.connect(student.taps[self.student_taps[0]])
        teacher_vector = teacher.taps[self.teacher_taps[0]]
        return {
            "hard": (self.config.alpha, cross_entropy(batch, student)),
            "feature": (self.config.beta, mean_square(connected - teacher_vector)),
            "regression": (
                self.config.regression,
                mean_square(self.classify(connected) - teacher.logits),
            ),
        }
