"""From a name in the configuration to the module of that name. Adding a file adds a choice; there is no list."""

import importlib
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from kd.core.errors import UserError

# no choices: what the files of a kind may import, and what is made of several
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
CONF = next(
    path for path in (_HERE / "conf", _HERE.parent / "conf") if path.is_dir()
)  # wheel, or source tree


def defaults(group: str, name: str) -> dict[str, Any]:
    """What `conf/<group>/<name>.yaml` says."""
    return dict(yaml.safe_load((CONF / group / f"{name}.yaml").read_text("utf-8")))


def choices(package: str) -> list[str]:
    """The modules of `kd.<package>` that can be chosen."""
    path = importlib.import_module(f"kd.{package}").__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if m.name not in SHARED)


def module(package: str, name: Any, key: str) -> ModuleType:
    """The module `kd.<package>.<name>`. **Raises:** UserError naming `key` when there is none."""
    full = f"kd.{package}.{name}"
    if isinstance(name, str) and name.isidentifier() and name not in SHARED and full in sys.modules:
        return sys.modules[full]  # without reading the directory for each of many jobs
    allowed = choices(package)
    if name not in allowed:
        raise UserError(f"{key}.name: {name!r} is not known; allowed: {', '.join(allowed)}")
    return importlib.import_module(full)


def defined(module: ModuleType, base: type) -> Any:
    """The one public subclass of `base` that `module` itself defines."""
    own = [
        v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__
    ]
    found = [v for v in own if issubclass(v, base)]
    if len(found) != 1:
        raise TypeError(
            f"{module.__name__} must define exactly one {base.__name__}; it has {len(found)}"
        )
    return found[0]
