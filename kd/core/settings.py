"""The base class and the field types of all typed settings."""

from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings with dotted keys: {"a": {"b": 1}} becomes {"a.b": 1}.

    Lists are converted to strings.
    """
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = str(value) if isinstance(value, list) else value
    return flat


class Settings(BaseModel):
    """Immutable typed settings; unknown keys, wrong types, NaN and infinity are rejected."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Effect(Enum):
    """What the value of a configuration field changes, as an annotation of the field.

    A field without this annotation can change a run's result and is part of its identity. This is
    the only place where the difference is made; every list of such keys derives from it.
    """

    NONE = "none"  # where and how to run, and what to record
    ROUNDING = "rounding"  # at most the last bits of the numbers; an interrupted run keeps it


def keys_with(settings: type[Settings], *effects: Effect) -> tuple[str, ...]:
    """Return the names of the fields that are annotated with one of `effects`, in their order."""
    return tuple(
        name
        for name, field in settings.model_fields.items()
        if any(isinstance(mark, Effect) and mark in effects for mark in field.metadata)
    )


def result_values(settings: Settings) -> dict[str, Any]:
    """Return the values of all fields that can change a result."""
    return settings.model_dump(exclude=set(keys_with(type(settings), *Effect)))


def is_under(key: str, nodes: Iterable[str]) -> bool:
    """Return whether a dotted key is one of `nodes`, or lies under one of them."""
    return any(key == node or key.startswith(f"{node}.") for node in nodes)


def _validate_home(path: str) -> str:
    try:
        Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"unknown user in {path!r}") from None
    return path


# Unlike a plain str, one with a constraint is rejected if it is not valid UTF-8
Text = Annotated[str, Field(max_length=10_000)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(_validate_home)]
