"""FitNets: hints for thin deep nets (Romero et al. 2015, arXiv 1412.6550), in the combined, one-stage form."""

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd.methods.base import Batch, FeatureWeights, Method, Spec, Terms, hard, soft_kl
from kd.models.base import Out

Pair = Annotated[list[str], Field(min_length=2, max_length=2)]  # [student tap, teacher tap]


class FeatureConfig(FeatureWeights):
    name: Literal["feature"]
    pairs: list[Pair] = Field(min_length=1)


class Feature(Method):
    """loss = alpha * CE + beta * feature + (1 - alpha - beta) * T^2 * KL(teacher_T || student_T).

    `feature` is the mean over the `pairs` ([student tap, teacher tap]) of the mean squared error between the
    teacher's tap and the student's through a learned regressor: a 1 x 1 convolution for maps [C, H, W], of which
    the larger is average-pooled to the smaller's size; a linear layer for vectors [D].
    """

    Config = FeatureConfig

    @classmethod
    def check(cls, config: FeatureConfig, spec: Spec) -> None:
        for student, teacher in config.pairs:
            for side, tap, shapes in (("student", student, spec.student), ("teacher", teacher, spec.teacher)):
                if tap not in shapes:
                    raise ValueError(f"pairs: the {side} has no tap {tap!r}; it has {', '.join(shapes)}")
            if len(spec.student[student]) != len(spec.teacher[teacher]):
                raise ValueError(
                    f"pairs: {student} -> {teacher} pairs a map with a vector: the student's {student} is "
                    f"{list(spec.student[student])}, the teacher's {teacher} is {list(spec.teacher[teacher])}"
                )

    def __init__(self, config: FeatureConfig, spec: Spec):
        super().__init__(config, spec)
        self.student_taps, self.teacher_taps = zip(*config.pairs, strict=True)
        self.regressors = nn.ModuleList(_regressor(spec.student[s], spec.teacher[t]) for s, t in config.pairs)

    def forward(self, batch: Batch, student: Out, teacher: Out | None) -> Terms:
        assert teacher is not None
        alpha, beta = self.config.alpha, self.config.beta
        errors = [
            _error(regress, student.taps[s], teacher.taps[t])
            for regress, (s, t) in zip(self.regressors, self.config.pairs, strict=True)
        ]
        return {
            "hard": (alpha, hard(batch, student)),
            "feature": (beta, sum(errors[1:], errors[0]) / len(errors)),
            "soft": (max(0.0, 1 - alpha - beta), soft_kl(student.logits, teacher.logits, self.config.T)),
        }


def _regressor(student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Module:
    return nn.Conv2d(student[0], teacher[0], 1) if len(student) == 3 else nn.Linear(student[0], teacher[0])


def _error(regress: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    if student.ndim == 4:  # the 1 x 1 convolution and the pooling commute: pool first, it is cheaper
        size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
        student, teacher = F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
    return F.mse_loss(regress(student), teacher)
