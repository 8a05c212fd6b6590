"""Knowledge distillation with the reused teacher classifier (Chen et al. 2022, arXiv 2203.14001)."""

import copy
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from kd.methods.base import MethodContext
from kd.methods.paired import FeatureMethod, FeatureMethodConfig, match_spatial_size, pairs
from kd.models.base import Net
from kd.models.grafted import Graft, Grafted, Projector


class SimKDConfig(FeatureMethodConfig):
    name: Literal["simkd"]
    factor: int = Field(ge=1, le=64)


class SimKD(FeatureMethod):
    """loss = alpha * CE + beta * mean (projector(f_s) - f_t)^2 on the last maps; the paper has alpha = 0.

    What is evaluated and shipped is the student up to its map, the projector, and the teacher's layers after its map:
    `size` in the result counts them all. A larger map is average-pooled to the smaller's size.
    """

    Config = SimKDConfig
    dims = (3,)

    @classmethod
    def check(cls, config: Any, spec: MethodContext) -> None:
        super().check(config, spec)
        if len(found := cls.resolve_pairs(config, spec)) != 1:
            raise ValueError("pairs: simkd takes one pair")
        ((student, teacher),) = found
        for side, net, tap in (
            ("student", spec.student_net, student),
            ("teacher", spec.teacher_net, teacher),
        ):
            if net is None or tap not in list(net.stages)[:-1]:
                raise ValueError(
                    f"pairs: simkd cuts the {side} after {tap}, which must be a stage of a network of kd's own"
                )
        here, there = spec.student[student], spec.teacher[teacher]
        following = list(spec.teacher)[list(spec.teacher).index(teacher) + 1]
        if min(here[1:]) < min(there[1:]) and spec.teacher[following] != there[:1]:
            raise ValueError(
                f"pairs: the student's {student} is {list(here)}, smaller than the teacher's {teacher}, {list(there)}, "
                "whose next layers take no smaller map"
            )

    @classmethod
    def resolve_pairs(cls, config: Any, spec: MethodContext) -> list[tuple[str, str]]:
        return pairs(config.pairs, spec)

    def __init__(self, config: SimKDConfig, spec: MethodContext):
        super().__init__(config, spec)
        ((student, teacher),) = self.pairs
        channels, *size = spec.teacher[teacher]
        self.projector = Projector(spec.student[student][0], channels, tuple(size), config.factor)
        self.taps: dict[str, Any] = {
            "student_tap": student,
            "teacher_tap": teacher,
            "factor": config.factor,
        }
        tail = (
            copy.deepcopy(spec.teacher_net).eval().requires_grad_(False)
            if spec.teacher_net
            else None
        )
        self.teacher = (
            tail,
        )  # in a tuple: no part of this module, neither trained nor saved with it

    def compare(self, number: int, student: Tensor, teacher: Tensor) -> Tensor:
        seen, wanted = match_spatial_size(self.projector(student), teacher)
        return (seen - wanted).square().mean()

    def deploy(self, student: Net) -> Net:
        (teacher,) = self.teacher
        assert teacher is not None
        return Grafted(student, self.projector, teacher, Graft(teacher={}, **self.taps))

    @property
    def graft(self) -> dict[str, Any] | None:
        return self.taps
