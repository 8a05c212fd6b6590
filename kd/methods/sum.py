"""Several methods at once: the weighted sum of their losses."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from torch import nn

from kd.core import registry
from kd.core.errors import UserError
from kd.core.settings import Settings
from kd.data.batch import Batch
from kd.methods.base import Method, MethodContext, Terms
from kd.models.base import ModelOutput


def _kind(part: dict[str, Any]) -> type[Method]:
    return registry.defined(registry.module("methods", part["name"], "method"), Method)


def _settings(part: dict[str, Any]) -> Any:
    return _kind(part).Config.model_validate(
        {key: value for key, value in part.items() if key != "weight"}
    )


def _with_defaults(part: Any) -> Any:
    """A name, or a mapping with a name, with what is not said taken from the method's YAML."""
    part = {"name": part} if isinstance(part, str) else part
    if not isinstance(part, dict) or not isinstance(part.get("name"), str):
        raise ValueError(
            f"should be the name of a method or {{name: ..., weight: ..., its keys}}, got {str(part)[:100]!r}"
        )
    try:
        kind = _kind(part)
        given = {"weight": 1.0, **registry.defaults("method", part["name"]), **part}
        filled = {"weight": given["weight"], **_settings(given).model_dump()}
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"{part['name']}.{where}: {first['msg'].removeprefix('Value error, ')}"
        ) from error
    except UserError as error:
        raise ValueError(str(error).removeprefix("method.name: ")) from error
    if (
        not kind.needs_teacher
        or kind.views != 1
        or kind.mixed
        or kind.self_taught
        or kind.deploy is not Method.deploy
    ):
        raise ValueError(f"{part['name']} trains in a way of its own and cannot be a part")
    if kind is Sum:
        raise ValueError("sum cannot be a part of itself")
    return filled


def _check_weight(part: dict[str, Any]) -> dict[str, Any]:
    weight = part["weight"]
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1e6:
        raise ValueError(f"{part['name']}.weight: should be a number from 0 to 1e6, got {weight!r}")
    return part


Part = Annotated[dict[str, Any], BeforeValidator(_with_defaults), AfterValidator(_check_weight)]


class SumConfig(Settings):
    name: Literal["sum"]
    parts: Annotated[list[Part], Field(min_length=1, max_length=20)]


class Sum(Method):
    """loss = sum over the parts of weight * the part's loss.

    Each part is a method with its own keys; those not said are the defaults of conf/method. The hard loss appears once,
    with the sum of its weights; every other term is named by its method: `logits.soft`, and of a second `logits` part
    `logits2.soft`.
    """

    Config = SumConfig

    @classmethod
    def check(cls, config: Any, spec: MethodContext) -> None:
        for part in config.parts:
            try:
                _kind(part).check(_settings(part), spec)
            except ValueError as error:
                raise ValueError(f"parts: {part['name']}.{error}") from error

    @classmethod
    def needs_labels(cls, config: Any) -> bool:
        return any(_kind(part).needs_labels(_settings(part)) for part in config.parts)

    def __init__(self, config: SumConfig, spec: MethodContext):
        super().__init__(config, spec)
        self.parts = nn.ModuleList(_kind(part)(_settings(part), spec) for part in config.parts)
        self.names: list[str] = []
        for part in config.parts:
            again = sum(name.rstrip("0123456789") == part["name"] for name in self.names)
            self.names.append(f"{part['name']}{again + 1}" if again else part["name"])
        taps = [
            dict.fromkeys(tap for part in self.parts for tap in getattr(part, side))
            for side in ("student_taps", "teacher_taps")
        ]
        self.student_taps, self.teacher_taps = map(tuple, taps)

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        terms: Terms = {}
        for name, part, said in zip(self.names, self.parts, self.config.parts, strict=True):
            for term, (weight, value) in part(batch, student, teacher).items():
                weight = said["weight"] * weight
                if term == "hard":
                    terms["hard"] = (weight + (terms["hard"][0] if "hard" in terms else 0.0), value)
                else:
                    terms[f"{name}.{term}"] = (weight, value)
        return terms
