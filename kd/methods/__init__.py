"""Distillation methods, one module each; the module name is the name in the configuration."""

from typing import Any

from kd.core import registry
from kd.data.batch import Batch
from kd.methods.base import Method, MethodContext, Terms


def find(name: Any) -> type[Method]:
    """Return the Method class of that name.

    Raises:
        UserError: If there is no method of that name.
    """
    kind: type[Method] = registry.defined(registry.module("methods", name, "method"), Method)
    return kind


__all__ = ["Batch", "Method", "MethodContext", "Terms", "find"]
