"""The base class of methods that compare taps in pairs: it selects the taps and sums the losses."""

from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from pydantic import AfterValidator
from torch import Tensor

from kd.data.batch import Batch
from kd.methods.base import Method, MethodContext, Terms, WeightedConfig, cross_entropy
from kd.models.base import PRE, ModelOutput

PAIR_WORDS = "last", "stages", "penultimate"


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and all(isinstance(tap, str) for tap in value)
    )


def _validate_pairs(value: Any) -> Any:
    is_list = isinstance(value, list) and len(value) > 0 and all(map(_is_pair, value))
    if value not in PAIR_WORDS and not is_list:
        raise ValueError(
            f"should be {', '.join(PAIR_WORDS)} or [[student tap, teacher tap], ...], "
            f"got {str(value)[:100]!r}"
        )
    return value


Pairs = Annotated[Any, AfterValidator(_validate_pairs)]


class FeatureMethodConfig(WeightedConfig):
    """Settings of a method that compares taps in pairs.

    `pairs` is [[student tap, teacher tap], ...] or a word. `last` selects the last map of each
    network. `stages` selects the last map of each size, matched from the smallest size upwards.
    `penultimate` selects the last vector before the logits. A map has more than one pixel.
    """

    pairs: Pairs


class FeatureMethod(Method):
    """A method that compares taps of the student with taps of the teacher, pair by pair.

    Attributes:
        dims: Accepted numbers of dimensions of a tap: 3 for maps [C, H, W], 1 for vectors [D].
    """

    dims: ClassVar[tuple[int, ...]] = (3, 1)

    @classmethod
    def check(cls, config: Any, context: MethodContext) -> None:
        """Check that the taps exist, have an accepted number of dimensions and match."""
        for student, teacher in cls.resolve_pairs(config, context):
            pair_shapes = []
            for side, tap, shapes in (
                ("student", student, context.student),
                ("teacher", teacher, context.teacher),
            ):
                if tap.removesuffix(PRE) not in shapes:
                    raise ValueError(
                        f"pairs: the {side} has no tap {tap!r}; allowed: {', '.join(shapes)}"
                    )
                shape = list(shape_of(tap, shapes))
                pair_shapes.append(shape)
                if len(shape) not in cls.dims:
                    forms = {3: "maps [C, H, W]", 1: "vectors [D]"}
                    allowed = " or ".join(forms[dim] for dim in cls.dims)
                    raise ValueError(
                        f"pairs: the {side}'s {tap} has shape {shape}; allowed: {allowed}"
                    )
            if len(pair_shapes[0]) != len(pair_shapes[1]):
                raise ValueError(
                    f"pairs: {student} -> {teacher} pairs a map with a vector: "
                    f"the student's {student} has shape {pair_shapes[0]}, "
                    f"the teacher's {teacher} has shape {pair_shapes[1]}"
                )

    @classmethod
    def resolve_pairs(cls, config: Any, context: MethodContext) -> list[tuple[str, str]]:
        """Return the [student tap, teacher tap] pairs that the configuration selects.

        Raises:
            ValueError: If there are none.
        """
        return pairs(config.pairs, context)

    def __init__(self, config: Any, context: MethodContext):
        super().__init__(config, context)
        self.pairs = self.resolve_pairs(config, context)
        self.student_taps, self.teacher_taps = (
            tuple(dict.fromkeys(taps)) for taps in zip(*self.pairs, strict=True)
        )

    def compare(self, pair_index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of one pair, a scalar.

        Args:
            pair_index: Index in `self.pairs`.
            student: The student's tap [B, ...], float32.
            teacher: The teacher's tap [B, ...], float32.
        """
        raise NotImplementedError

    def comparison_loss(self, student: ModelOutput, teacher: ModelOutput | None) -> Tensor:
        """Return the sum of the losses over the pairs, a scalar."""
        assert teacher is not None
        losses = [
            self.compare(pair_index, student.taps[s], teacher.taps[t])
            for pair_index, (s, t) in enumerate(self.pairs)
        ]
        return sum(losses[1:], losses[0])

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        """Return the term `hard` and the method's own term, which has the method's name."""
        feature_loss = self.comparison_loss(student, teacher)
        return {
            "hard": (self.config.alpha, cross_entropy(batch, student)),
            self.config.name: (self.config.beta, feature_loss),
        }


def pairs(selection: Any, context: MethodContext) -> list[tuple[str, str]]:
    """Return the [student tap, teacher tap] pairs that a value of `Pairs` selects.

    Raises:
        ValueError: If a network has no such taps.
    """
    if not isinstance(selection, str):
        return [(student, teacher) for student, teacher in selection]
    taps_by_side = []
    for side, shapes in (("student", context.student), ("teacher", context.teacher)):
        if selection == "penultimate":
            before_logits = list(shapes.items())[:-1]
            taps = [tap for tap, shape in before_logits if len(shape) == 1]
        else:
            last_of_size = {
                shape[1:]: tap
                for tap, shape in shapes.items()
                if len(shape) == 3 and max(shape[1:]) > 1
            }
            taps = list(last_of_size.values())
        if not taps:
            form = "vector" if selection == "penultimate" else "feature map"
            raise ValueError(f"pairs: the {side} has no {form} to tap")
        taps_by_side.append(taps if selection == "stages" else taps[-1:])
    count = min(map(len, taps_by_side))
    student_taps, teacher_taps = taps_by_side
    return list(zip(student_taps[-count:], teacher_taps[-count:], strict=True))


def shape_of(tap: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of a tap; a `.pre` tap has the shape of its stage's output."""
    return shapes[tap.removesuffix(PRE)]


def pre_activation_pairs(tap_pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the same pairs, with each tap taken before the last activation of its stage."""
    return [(student + PRE, teacher + PRE) for student, teacher in tap_pairs]


def match_spatial_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool both maps to the smaller height and width; return vectors unchanged."""
    if student.ndim < 4:
        return student, teacher
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    return _pool_to(student, size), _pool_to(teacher, size)


def _pool_to(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size)
