"""kd: knowledge distillation whose numbers can be trusted. `python -m kd --help` shows what it does."""

from typing import TYPE_CHECKING, Any

from kd.core.version import __version__

if TYPE_CHECKING:
    from kd.models.weights import load

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":  # imported when it is used: torch takes seconds, --help should not
        from kd.models.weights import load

        return load
    raise AttributeError(f"module 'kd' has no attribute {name!r}")
