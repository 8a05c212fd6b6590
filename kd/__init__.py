"""kd: knowledge distillation whose numbers can be trusted. `python -m kd --help` shows what it does."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd.store import load

__all__ = ["load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":  # imported when it is used: torch takes seconds, --help should not
        from kd.store import load

        return load
    raise AttributeError(f"module 'kd' has no attribute {name!r}")
