"""Distillation methods, one module each; the module name is the name in the configuration."""

from typing import Any, get_args

from kd.core import registry
from kd.data.batch import Batch
from kd.methods.base import Method, MethodContext, Terms, WeightedConfig, cross_entropy
from kd.models.base import ModelOutput

_registered: dict[str, type[Method]] = {}


def register(method: type[Method]) -> type[Method]:
    """Make a method that is defined outside of kd known under the name in its `Config`.

    Use it as a decorator at the top level of a script that calls `kd.cli.main`, so that the worker
    processes of a sweep register the method as well. See examples/custom_method.py.

    Args:
        method: The class; its Config has a field `name: Literal["..."]`.

    Returns:
        The class.

    Raises:
        ValueError: The name is that of another method.
    """
    (name,) = get_args(method.Config.model_fields["name"].annotation)
    if name in registry.choices("methods"):
        raise ValueError(f"{name!r} is the name of a method of kd; choose another")
    _registered[name] = method
    return method


def find(name: Any) -> type[Method]:
    """Return the Method class of that name.

    Raises:
        UserError: If there is no method of that name.
    """
    if isinstance(name, str) and name in _registered:
        return _registered[name]
    kind: type[Method] = registry.defined(registry.module("methods", name, "method"), Method)
    return kind


__all__ = [
    "Batch",
    "Method",
    "MethodContext",
    "ModelOutput",
    "Terms",
    "WeightedConfig",
    "cross_entropy",
    "find",
    "register",
]
