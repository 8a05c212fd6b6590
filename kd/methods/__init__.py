"""Distillation methods: one file each. A name in the configuration is the name of a file here."""

from typing import Any

from kd.core import registry
from kd.data.batch import Batch
from kd.methods.base import Method, MethodContext, Terms


def find(name: Any) -> type[Method]:
    """The Method class of that name. **Raises:** UserError."""
    return registry.defined(registry.module("methods", name, "method"), Method)


__all__ = ["Batch", "Method", "MethodContext", "Terms", "find"]
