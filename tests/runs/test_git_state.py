"""The commit that a run records is kd's own or none, whatever repository kd is installed in."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kd
from kd.runs import directory
from kd.training import device, environment

GIT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("GIT_")},
    "GIT_AUTHOR_NAME": "t",
    "GIT_AUTHOR_EMAIL": "t@example.org",
    "GIT_COMMITTER_NAME": "t",
    "GIT_COMMITTER_EMAIL": "t@example.org",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
}


def git(where: Path, *arguments: str) -> str:
    command = ["git", "-c", "protocol.file.allow=always", *arguments]
    return subprocess.run(
        command, cwd=where, env=GIT, check=True, capture_output=True, text=True
    ).stdout.strip()


def repository(where: Path, ignored: str = "") -> str:
    """Make a user's repository with one commit. Return the commit."""
    where.mkdir(parents=True)
    git(where, "init", "--quiet")
    (where / "train.py").write_text("print()\n")
    (where / ".gitignore").write_text(ignored)
    git(where, "add", "-A")
    git(where, "commit", "--quiet", "-m", "mine")
    return git(where, "rev-parse", "HEAD")


def copied(into: Path) -> Path:
    """Copy kd's files into a directory, as an installation does. Return the package's folder."""
    shutil.copytree(
        Path(kd.__file__).parent, into / "kd", ignore=shutil.ignore_patterns("__pycache__")
    )
    return into / "kd"


def state(package: Path, **environment: str) -> Any:
    """Return what the copy in `package` takes for its commit, asked in a process of its own."""
    code = "import json, kd.runs.directory as r; print(json.dumps([r.__file__, r.git_state()]))"
    path = {**GIT, "PYTHONPATH": str(package.parent), **environment}
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=package.parent,
        env=path,
        check=True,
        capture_output=True,
        text=True,
    )
    file, found = json.loads(said.stdout)
    assert Path(file).resolve() == (package / "runs" / "directory.py").resolve(), (
        "another kd was imported"
    )
    return found


INSTALLED = ".venv/lib/python3.12/site-packages"


@pytest.mark.parametrize("ignored", [".venv/\n", ""], ids=["ignored", "untracked"])
def test_a_kd_installed_in_the_users_repository_has_not_the_users_commit(
    tmp_path: Path, ignored: str
) -> None:
    repository(tmp_path / "mine", ignored)
    assert state(copied(tmp_path / "mine" / INSTALLED)) is None


def test_nor_has_one_in_a_worktree_or_a_submodule_of_theirs(tmp_path: Path) -> None:
    repository(tmp_path / "mine", ".venv/\n")
    git(tmp_path / "mine", "worktree", "add", "--quiet", str(tmp_path / "tree"))
    assert state(copied(tmp_path / "tree" / INSTALLED)) is None
    repository(tmp_path / "outer")
    git(tmp_path / "outer", "submodule", "--quiet", "add", str(tmp_path / "mine"), "inner")
    assert state(copied(tmp_path / "outer" / "inner" / INSTALLED)) is None


def tracked(where: Path) -> str:
    repository(where)
    copied(where)
    (where / "conf").mkdir()
    (where / "conf" / "config.yaml").write_text("seed: 0\n")
    git(where, "add", "-A")
    git(where, "commit", "--quiet", "-m", "kd")
    return git(where, "rev-parse", "HEAD")


def own(tmp_path: Path) -> tuple[Path, str]:
    return tmp_path / "kd-source", tracked(tmp_path / "kd-source")


def worktree(tmp_path: Path) -> tuple[Path, str]:
    commit = tracked(tmp_path / "kd-source")
    git(tmp_path / "kd-source", "worktree", "add", "--quiet", str(tmp_path / "tree"))
    return tmp_path / "tree", commit


def submodule(tmp_path: Path) -> tuple[Path, str]:
    commit = tracked(tmp_path / "kd-source")
    users = repository(tmp_path / "mine")
    git(
        tmp_path / "mine",
        "submodule",
        "--quiet",
        "add",
        str(tmp_path / "kd-source"),
        "libraries/kd-source",
    )
    assert users != commit
    return tmp_path / "mine" / "libraries" / "kd-source", commit


def linked(tmp_path: Path) -> tuple[Path, str]:
    """The user's repository holds a link to kd's source tree."""
    commit = tracked(tmp_path / "kd-source")
    repository(tmp_path / "mine")
    (tmp_path / "mine" / "kd").symlink_to(tmp_path / "kd-source" / "kd")
    return tmp_path / "mine", commit


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["kd/runs/directory.py", "conf/config.yaml"])
@pytest.mark.parametrize("make", [own, worktree, submodule, linked])
def test_a_source_tree_of_kd_has_its_own_commit(
    tmp_path: Path, make: Callable, changed: str
) -> None:
    where, commit = make(tmp_path)
    assert state(where / "kd") == {"commit": commit, "dirty": False}
    with open((where / "kd").resolve().parent / changed, "a") as file:
        file.write("# changed\n")
    assert state(where / "kd") == {"commit": commit, "dirty": True}


def test_a_git_hook_of_the_user_does_not_lend_its_repository(tmp_path: Path) -> None:
    commit = tracked(tmp_path / "kd-source")
    repository(tmp_path / "mine")
    hook = {"GIT_DIR": str(tmp_path / "mine" / ".git"), "GIT_WORK_TREE": str(tmp_path / "mine")}
    assert state(tmp_path / "kd-source" / "kd", **hook) == {"commit": commit, "dirty": False}
    assert state(copied(tmp_path / "mine" / INSTALLED), **hook) is None


def test_without_a_repository_or_git_there_is_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = copied(tmp_path / "site-packages")
    assert state(package, GIT_CEILING_DIRECTORIES=str(tmp_path)) is None
    assert state(package, PATH=str(tmp_path)) is None
    (tmp_path / "empty" / ".git").mkdir(parents=True)
    assert state(copied(tmp_path / "empty")) is None


def test_the_environment_names_the_version_of_kd(tmp_path: Path) -> None:
    found = environment.environment(device.resolve("cpu", "fp32", tmp_path))
    assert found["kd"] == kd.__version__
    assert found["git"] == directory.git_state()
