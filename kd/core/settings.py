"""The base class and the field types of all typed settings."""

from collections.abc import Mapping
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
