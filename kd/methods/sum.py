"""Several methods combined: the weighted sum of their losses."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from torch import nn

from kd.core import registry
from kd.core.errors import UserError
from kd.core.settings import Settings
from kd.data.batch import Batch
from kd.methods.base import Method, MethodContext, Terms
from kd.models.base import ModelOutput


def _method_class(part: dict[str, Any]) -> type[Method]:
    kind: type[Method] = registry.defined(
        registry.module("methods", part["name"], "method"), Method
    )
    return kind


def _settings(part: dict[str, Any]) -> Any:
    """Return the validated settings of a part, which are its keys but `weight`."""
    keys = {key: value for key, value in part.items() if key != "weight"}
    return _method_class(part).Config.model_validate(keys)


def _with_defaults(part: Any) -> Any:
    """Complete a part, a name or a mapping with a name, with the defaults of the method's YAML."""
    part = {"name": part} if isinstance(part, str) else part
    if not isinstance(part, dict) or not isinstance(part.get("name"), str):
        raise ValueError(
            "should be the name of a method or {name: ..., weight: ..., keys of the method}, "
            f"got {str(part)[:100]!r}"
        )
    name = part["name"]
    try:
        method_class = _method_class(part)
        completed = {"weight": 1.0, **registry.defaults("method", name), **part}
        validated = {"weight": completed["weight"], **_settings(completed).model_dump()}
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{name}.{key}: {message}") from error
    except UserError as error:
        raise ValueError(str(error).removeprefix("method.name: ")) from error
    if (
        not method_class.needs_teacher
        or method_class.views != 1
        or method_class.mixed
        or method_class.self_taught
        or method_class.deploy is not Method.deploy
    ):
        raise ValueError(
            f"{name} cannot be part of a sum; allowed: methods that need a teacher, "
            "see one unblended view per image, are not self-taught and deploy the student alone"
        )
    if method_class is Sum:
        raise ValueError("sum cannot be part of another sum")
    return validated


def _check_weight(part: dict[str, Any]) -> dict[str, Any]:
    weight = part["weight"]
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1e6:
        raise ValueError(f"{part['name']}.weight: should be a number from 0 to 1e6, got {weight!r}")
    return part


Part = Annotated[dict[str, Any], BeforeValidator(_with_defaults), AfterValidator(_check_weight)]


class SumConfig(Settings):
    """Settings of the `sum` method."""

    name: Literal["sum"]
    parts: Annotated[list[Part], Field(min_length=1, max_length=20)]


class Sum(Method):
    """loss = sum over the parts of weight * the part's loss.

    Each part is a method with its own keys; omitted keys have the defaults of conf/method. The hard
    loss appears once, with the sum of its weights. Every other term is prefixed with the name of
    its method: `logits.soft`, and for a second `logits` part `logits2.soft`.
    """

    Config = SumConfig

    @classmethod
    def check(cls, config: Any, context: MethodContext) -> None:
        """Check every part."""
        for part in config.parts:
            try:
                _method_class(part).check(_settings(part), context)
            except ValueError as error:
                raise ValueError(f"parts: {part['name']}.{error}") from error

    @classmethod
    def needs_labels(cls, config: Any) -> bool:
        """Return whether any part needs labels."""
        return any(_method_class(part).needs_labels(_settings(part)) for part in config.parts)

    def __init__(self, config: SumConfig, context: MethodContext):
        super().__init__(config, context)
        self.parts = nn.ModuleList(
            _method_class(part)(_settings(part), context) for part in config.parts
        )
        self.names: list[str] = []
        for part in config.parts:
            earlier = sum(name.rstrip("0123456789") == part["name"] for name in self.names)
            self.names.append(f"{part['name']}{earlier + 1}" if earlier else part["name"])
        self.student_taps = self._taps_of_parts("student_taps")
        self.teacher_taps = self._taps_of_parts("teacher_taps")

    def _taps_of_parts(self, attribute: str) -> tuple[str, ...]:
        """Return the taps that the parts read, each once, in the order of the parts."""
        return tuple(dict.fromkeys(tap for part in self.parts for tap in getattr(part, attribute)))

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        """Return the term `hard` and the other terms of all parts."""
        terms: Terms = {}
        for name, part, settings in zip(self.names, self.parts, self.config.parts, strict=True):
            for term, (weight, value) in part(batch, student, teacher).items():
                weight = settings["weight"] * weight
                if term == "hard":
                    terms["hard"] = (weight + (terms["hard"][0] if "hard" in terms else 0.0), value)
                else:
                    terms[f"{name}.{term}"] = (weight, value)
        return terms
