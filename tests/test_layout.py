"""The house has one way through it: what may import what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kd
from kd import registry

HERE = Path(kd.__file__).parent
ORDER = [
    "streams",
    "files",
    "locks",
    "stop",
    "settings",
    "wandb_rules",
    "wandb_env",
    "reader",
    "registry",
    "seeds",
    "pack",
    "views",
    "optim",
    "kernels",
    "models",
    "device",
    "methods",
    "data",
    "evaluate",
    "store",
    "config",
    "train",
    "teacher",
    "outputs",
    "record",
    "checkpoint",
    "console",
    "dashboard",
    "artifacts",
    "wandb_run",
    "tracker",
    "result",
    "run",
    "naming",
    "locate",
    "about",
    "table",
    "sweep_directory",
    "pool",
    "progress",
    "study",
    "compare",
    "published",
    "figures",
    "page",
    "report",
    "dry_run",
    "sweep",
    "overrides",
    "cli",
    "__main__",
]
ONLY_IN = {
    "hydra": {"cli", "overrides"},
    "omegaconf": {"cli", "overrides"},
    "wandb": {"artifacts", "dashboard", "wandb_run"},
}
FILES = sorted(HERE.rglob("*.py"))


def part(path: Path) -> str:
    return path.relative_to(HERE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(HERE).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    if path == HERE / "__init__.py":
        return  # kd.load, imported when it is used
    here = part(path)
    assert here in ORDER, f"give {here} its place in ORDER"
    for name in imported(path):
        words = name.split(".")
        if words[0] == "kd" and len(words) > 1 and words[1] != here:
            assert ORDER.index(words[1]) < ORDER.index(here), f"{here} must not import {words[1]}"
        if words[0] in ONLY_IN:
            assert here in ONLY_IN[words[0]], f"only {ONLY_IN[words[0]]} may import {words[0]}"


@pytest.mark.parametrize("kind", ["methods", "models", "data"])
def test_files_of_a_kind_do_not_know_each_other(kind: str) -> None:
    for path in (HERE / kind).glob("*.py"):
        if path.stem in ("__init__", "cifar100"):  # CIFAR-100 is CIFAR-10 with another name
            continue
        for name in imported(path):
            words = name.split(".")
            if words[:2] == ["kd", kind]:
                assert words[2] in registry.SHARED, f"{path.name} imports kd.{kind}.{words[2]}"


@pytest.mark.parametrize(
    "module",
    ["kd", "kd.cli", "kd.report", "kd.page", "kd.figures", "hydra_plugins._kd_launcher", "hydra_plugins._kd_sweeper"],
)
def test_help_and_tables_need_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
