"""SimKD: reusing the teacher's classifier (Chen et al. 2022, arXiv 2203.14001).

Paper: "Knowledge distillation with the reused teacher classifier".
"""

import copy
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from kd.methods.base import MethodContext
from kd.methods.paired import FeatureMethod, FeatureMethodConfig, match_spatial_size, pairs
from kd.models.base import Net
from kd.models.grafted import Graft, Grafted, Projector


class SimKDConfig(FeatureMethodConfig):
    """Settings of the `simkd` method."""

    name: Literal["simkd"]
    factor: int = Field(ge=1, le=64)


class SimKD(FeatureMethod):
    """loss = alpha * CE + beta * mean (projector(f_s) - f_t)^2 on the last maps.

    The paper uses alpha = 0. The network that is evaluated and shipped is the student up to its
    map, the projector, and the teacher's layers after its map: `size` in the result counts all of
    them. The larger map is average-pooled to the size of the smaller.
    """

    Config = SimKDConfig
    dims = (3,)

    @classmethod
    def check(cls, config: Any, context: MethodContext) -> None:
        """Check the pair, and that the teacher's layers can follow the student's map."""
        super().check(config, context)
        tap_pairs = cls.resolve_pairs(config, context)
        if len(tap_pairs) != 1:
            raise ValueError(f"pairs: simkd takes one pair, got {len(tap_pairs)}")
        ((student, teacher),) = tap_pairs
        for side, net, tap in (
            ("student", context.student_net, student),
            ("teacher", context.teacher_net, teacher),
        ):
            if net is None or tap not in list(net.stages)[:-1]:
                raise ValueError(
                    f"pairs: simkd cuts the {side} after {tap}, which must be a stage before the "
                    "head of one of kd's own models"
                )
        student_shape = context.student[student]
        teacher_shape = context.teacher[teacher]
        next_tap = list(context.teacher)[list(context.teacher).index(teacher) + 1]
        student_is_smaller = min(student_shape[1:]) < min(teacher_shape[1:])
        if student_is_smaller and context.teacher[next_tap] != teacher_shape[:1]:
            raise ValueError(
                f"pairs: the student's {student} is {list(student_shape)}, smaller than the "
                f"teacher's {teacher}, {list(teacher_shape)}, whose next layer cannot take a "
                "smaller map"
            )

    @classmethod
    def resolve_pairs(cls, config: Any, context: MethodContext) -> list[tuple[str, str]]:
        """Return the pairs that the configuration selects."""
        return pairs(config.pairs, context)

    def __init__(self, config: SimKDConfig, context: MethodContext):
        super().__init__(config, context)
        ((student, teacher),) = self.pairs
        channels, *size = context.teacher[teacher]
        self.projector = Projector(
            context.student[student][0], channels, tuple(size), config.factor
        )
        self.graft_settings: dict[str, Any] = {
            "student_tap": student,
            "teacher_tap": teacher,
            "factor": config.factor,
        }
        teacher_copy = (
            copy.deepcopy(context.teacher_net).eval().requires_grad_(False)
            if context.teacher_net
            else None
        )
        # A tuple keeps it from being a submodule, so it is neither trained nor saved.
        self.teacher = (teacher_copy,)

    def compare(self, pair_index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean squared error of the projected map."""
        projected, target = match_spatial_size(self.projector(student), teacher)
        return (projected - target).square().mean()

    def deploy(self, student: Net) -> Net:
        """Return the student's stages, the projector and the teacher's last stages."""
        (teacher,) = self.teacher
        assert teacher is not None
        graft = Graft(teacher={}, **self.graft_settings)
        return Grafted(student, self.projector, teacher, graft)

    @property
    def graft(self) -> dict[str, Any] | None:
        """The taps and the projector's factor, from which the deployed network can be rebuilt."""
        return self.graft_settings
