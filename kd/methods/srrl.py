"""Knowledge distillation via softmax regression representation learning (Yang et al. 2021, ICLR)."""

import copy
from typing import Any, Literal

from pydantic import Field
from torch import nn

from kd.data.batch import Batch
from kd.methods.base import Method, MethodContext, Terms, WeightedConfig, cross_entropy, mean_square
from kd.methods.paired import pairs
from kd.models.base import ModelOutput


class SRRLConfig(WeightedConfig):
    name: Literal["srrl"]
    regression: float = Field(ge=0)


class SRRL(Method):
    """loss = alpha * CE + beta * mean (h(f_s) - f_t)^2 + regression * mean (W_t h(f_s) - z_t)^2.

    f: the last vector before the logits; h: a linear layer, batch norm and ReLU, learned; W_t: the teacher's own
    classifier, frozen: what h gives must serve it as the teacher's vector does.
    """

    Config = SRRLConfig

    @classmethod
    def check(cls, config: Any, spec: MethodContext) -> None:
        for side, shapes in (("student", spec.student), ("teacher", spec.teacher)):
            before = list(shapes.values())[-2:-1]
            if not before or len(before[0]) != 1:
                raise ValueError(
                    f"name: srrl needs a {side} whose logits come from a vector; here they do not"
                )

    def __init__(self, config: SRRLConfig, spec: MethodContext):
        super().__init__(config, spec)
        ((student, teacher),) = pairs("vector", spec)
        self.student_taps, self.teacher_taps = (student,), (teacher,)
        width = spec.teacher[teacher][0]
        self.connect = nn.Sequential(
            nn.Linear(spec.student[student][0], width, bias=False), nn.BatchNorm1d(width), nn.ReLU()
        )
        assert spec.teacher_net is not None
        head = copy.deepcopy(spec.teacher_net.head).eval().requires_grad_(False)
        self.classify = head.forward  # not a part of this module: it is neither trained nor saved

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        assert teacher is not None
        seen = self.connect(student.taps[self.student_taps[0]])
        return {
            "hard": (self.config.alpha, cross_entropy(batch, student)),
            "feature": (self.config.beta, mean_square(seen - teacher.taps[self.teacher_taps[0]])),
            "regression": (
                self.config.regression,
                mean_square(self.classify(seen) - teacher.logits),
            ),
        }
