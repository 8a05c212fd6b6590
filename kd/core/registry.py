"""Find the module that a name in the configuration selects; adding a file adds a choice."""

import importlib
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from kd.core.errors import UserError

# Modules that cannot be selected: helpers, which the other modules of their package may import, and
# models made of several others
SHARED = {
    "augment",
    "base",
    "batch",
    "cache",
    "ensemble",
    "grafted",
    "kernels",
    "loader",
    "paired",
    "weights",
    "wrapped",
}

_HERE = Path(__file__).resolve().parents[1]
# In an installed wheel, or in the source tree
CONF = next(path for path in (_HERE / "conf", _HERE.parent / "conf") if path.is_dir())


def defaults(group: str, name: str) -> dict[str, Any]:
    """Return the contents of `conf/<group>/<name>.yaml`."""
    return dict(yaml.safe_load((CONF / group / f"{name}.yaml").read_text("utf-8")))


def choices(package: str) -> list[str]:
    """Return the names of the modules of `kd.<package>` that can be selected."""
    path = importlib.import_module(f"kd.{package}").__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if m.name not in SHARED)


def module(package: str, name: Any, key: str) -> ModuleType:
    """Import and return the module `kd.<package>.<name>`.

    Args:
        package: Name of the subpackage, such as "methods".
        name: Name of the module.
        key: The configuration key to name in the error.

    Raises:
        UserError: There is no such module.
    """
    full = f"kd.{package}.{name}"
    if isinstance(name, str) and name.isidentifier() and name not in SHARED and full in sys.modules:
        return sys.modules[full]  # avoids listing the directory for each of many jobs
    allowed = choices(package)
    if name not in allowed:
        raise UserError(f"{key}.name: {name!r} is not known; allowed: {', '.join(allowed)}")
    return importlib.import_module(full)


def defined(module: ModuleType, base: type) -> Any:
    """Return the only subclass of `base` that `module` itself defines.

    Raises:
        TypeError: It defines none or several.
    """
    own_classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    ]
    subclasses = [cls for cls in own_classes if issubclass(cls, base)]
    if len(subclasses) != 1:
        raise TypeError(
            f"{module.__name__} must define exactly one {base.__name__}; "
            f"it defines {len(subclasses)}"
        )
    return subclasses[0]
