"""Knowledge distillation sweeps whose numbers can be trusted. See `python -m kd --help`."""

from typing import TYPE_CHECKING, Any

from kd.core.version import __version__

if TYPE_CHECKING:
    from kd.models.weights import load

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":  # imported on first use: torch takes seconds, and --help should not
        from kd.models.weights import load

        return load
    raise AttributeError(f"module 'kd' has no attribute {name!r}")
