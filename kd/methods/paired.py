"""What methods that compare taps in pairs have in common: which taps, and their sum."""

from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from pydantic import AfterValidator
from torch import Tensor

from kd.data.batch import Batch
from kd.methods.base import Method, MethodContext, Terms, WeightedConfig, cross_entropy
from kd.models.base import PRE, ModelOutput

PAIR_WORDS = "last", "stages", "vector"


def _are_pairs(value: Any) -> Any:
    listed = (
        isinstance(value, list)
        and value
        and all(isinstance(p, list) and len(p) == 2 for p in value)
    )
    if value not in PAIR_WORDS and not (
        listed and all(isinstance(tap, str) for pair in value for tap in pair)
    ):
        raise ValueError(
            f"should be {', '.join(PAIR_WORDS)} or [[student tap, teacher tap], ...], got {str(value)[:100]!r}"
        )
    return value


Pairs = Annotated[Any, AfterValidator(_are_pairs)]


class FeatureMethodConfig(WeightedConfig):
    """`pairs`: [[student tap, teacher tap], ...]; or last: the last map of each; stages: the last map of each size, the
    smallest with the smallest; vector: the last vector before the logits. A map has more than one pixel."""

    pairs: Pairs


class FeatureMethod(Method):
    """A method that compares taps of the student with taps of the teacher, pair by pair."""

    dims: ClassVar[tuple[int, ...]] = (3, 1)  # of taps it can take: maps [C, H, W], vectors [D]

    @classmethod
    def check(cls, config: Any, spec: MethodContext) -> None:
        for student, teacher in cls.resolve_pairs(config, spec):
            found = []
            for side, tap, shapes in (
                ("student", student, spec.student),
                ("teacher", teacher, spec.teacher),
            ):
                if tap.removesuffix(PRE) not in shapes:
                    raise ValueError(
                        f"pairs: the {side} has no tap {tap!r}; it has {', '.join(shapes)}"
                    )
                found.append(list(shape_of(tap, shapes)))
                if len(found[-1]) not in cls.dims:
                    takes = " or ".join({3: "maps", 1: "vectors"}[dim] for dim in cls.dims)
                    raise ValueError(
                        f"pairs: {tap} of the {side} is {found[-1]}; this method takes {takes}"
                    )
            if len(found[0]) != len(found[1]):
                raise ValueError(
                    f"pairs: {student} -> {teacher} pairs a map with a vector: the student's {student} is {found[0]}, "
                    f"the teacher's {teacher} is {found[1]}"
                )

    @classmethod
    def resolve_pairs(cls, config: Any, spec: MethodContext) -> list[tuple[str, str]]:
        """The pairs of taps that the configuration names. **Raises:** ValueError when there are none."""
        return pairs(config.pairs, spec)

    def __init__(self, config: Any, spec: MethodContext):
        super().__init__(config, spec)
        self.pairs = self.resolve_pairs(config, spec)
        self.student_taps, self.teacher_taps = (
            tuple(dict.fromkeys(taps)) for taps in zip(*self.pairs, strict=True)
        )

    def compare(self, number: int, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of pair `number`: a scalar."""
        raise NotImplementedError

    def comparison_terms(self, student: ModelOutput, teacher: ModelOutput | None) -> Tensor:
        """The sum over the pairs."""
        assert teacher is not None
        each = [
            self.compare(n, student.taps[s], teacher.taps[t]) for n, (s, t) in enumerate(self.pairs)
        ]
        return sum(each[1:], each[0])

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        own = self.comparison_terms(student, teacher)
        return {
            "hard": (self.config.alpha, cross_entropy(batch, student)),
            self.config.name: (self.config.beta, own),
        }


def pairs(wanted: Any, spec: MethodContext) -> list[tuple[str, str]]:
    """The pairs of taps that `Pairs` names. **Raises:** ValueError when a network has no such taps."""
    if not isinstance(wanted, str):
        return [(student, teacher) for student, teacher in wanted]
    found = []
    for side, shapes in (("student", spec.student), ("teacher", spec.teacher)):
        if wanted == "vector":
            own = [tap for tap, shape in list(shapes.items())[:-1] if len(shape) == 1][
                -1:
            ]  # the last are the logits
        else:
            maps = {
                tap: shape
                for tap, shape in shapes.items()
                if len(shape) == 3 and max(shape[1:]) > 1
            }
            own = list(
                {shape[1:]: tap for tap, shape in maps.items()}.values()
            )  # of each size the last
        if not own:
            raise ValueError(
                f"pairs: the {side} has no {'vector' if wanted == 'vector' else 'feature map'} to tap"
            )
        found.append(own if wanted == "stages" else own[-1:])
    count = min(map(len, found))
    return list(zip(found[0][-count:], found[1][-count:], strict=True))


def shape_of(tap: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of a tap, which is that of what its last activation reads."""
    return shapes[tap.removesuffix(PRE)]


def pre_activation_pairs(chosen: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same pairs, of what the last activation of each reads."""
    return [(student + PRE, teacher + PRE) for student, teacher in chosen]


def match_spatial_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller's size, by average pooling; vectors as they are."""
    if student.ndim < 4:
        return student, teacher
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    pooled, wanted = (
        x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (student, teacher)
    )
    return pooled, wanted
