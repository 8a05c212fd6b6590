"""Which file may import which framework; what a file of a kind may share."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kd
from kd.core import registry

HERE = Path(kd.__file__).parent
ONLY_IN = {
    "hydra": {"cli.py", "config/overrides.py"},
    "omegaconf": {"cli.py", "config/overrides.py"},
    "wandb": {"training/artifacts.py", "training/dashboard.py", "training/wandb_run.py"},
}
FILES = sorted(HERE.rglob("*.py"))


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
def test_frameworks_are_imported_in_one_place(path: Path) -> None:
    """Which layer may import which is in pyproject.toml, for lint-imports."""
    here = path.relative_to(HERE).as_posix()
    for name in imported(path):
        framework = name.split(".")[0]
        assert here in ONLY_IN.get(framework, {here}), (
            f"only {ONLY_IN[framework]} may import {framework}"
        )


@pytest.mark.parametrize("kind", ["methods", "models", "data"])
def test_files_of_a_kind_do_not_know_each_other(kind: str) -> None:
    for path in (HERE / kind).glob("*.py"):
        if path.stem in ("__init__", "cifar100"):  # CIFAR-100 is CIFAR-10 with another name
            continue
        for name in imported(path):
            words = name.split(".")
            if words[:2] == ["kd", kind] and len(words) > 2:
                assert words[2] in registry.SHARED, f"{path.name} imports kd.{kind}.{words[2]}"


@pytest.mark.parametrize(
    "module",
    [
        "kd",
        "kd.cli",
        "kd.report.build",
        "kd.report.html",
        "kd.report.figures",
        "kd.runs.directory",
        "hydra_plugins._kd_launcher",
        "hydra_plugins._kd_sweeper",
    ],
)
def test_help_and_tables_need_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pages_include_files_that_exist() -> None:
    """A formatter once broke the directives, and mkdocs showed them as text."""
    root = HERE.parent
    pages = {path.name: path.read_text() for path in (root / "docs").glob("*.md")}
    included = [name for text in pages.values() for name in re.findall(r'--8<-- "([^":]+)', text)]
    assert len(included) >= 8
    assert [name for name in included if not (root / name).is_file()] == []
    assert [name for name, text in pages.items() if "--8 <" in text] == []
