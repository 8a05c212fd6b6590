"""kd adds its launcher and sweepers only where it is the application; others stay as they are."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import is_one_line
from hydra import compose, initialize_config_dir
from omegaconf.errors import ValidationError

from kd import cli

APP = """
import sys
import hydra

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config):
    print("groups", config.local.value, config.grid.value)
    names = ("kd", "torch", "pydantic")
    print("imported", sorted(m for m in sys.modules if m.split(".")[0] in names or "_kd" in m))

main()
"""
# as the official hydra-optuna-sweeper registers itself: the same group and name as kd's, other keys
OFFICIAL = """
from dataclasses import dataclass
from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper

@dataclass
class OfficialConf:
    _target_: str = "hydra_plugins.official_optuna.OfficialSweeper"
    n_jobs: int = 2
    n_trials: int = 20

ConfigStore.instance().store(
    group="hydra/sweeper", name="optuna", node=OfficialConf, provider="official"
)

class OfficialSweeper(Sweeper):
    def __init__(self, n_jobs, n_trials):
        self.n_trials = n_trials

    def setup(self, *, hydra_context, task_function, config):
        pass

    def sweep(self, arguments):
        print("official sweeper", self.n_trials, arguments)
"""


@pytest.fixture
def app(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """app(...): what another application of this environment does with these words."""
    for name in ("local", "grid"):
        (tmp_path / "app" / "conf" / name).mkdir(parents=True)
        (tmp_path / "app" / "conf" / name / "mine.yaml").write_text("value: 1\n")
    (tmp_path / "app" / "conf" / "config.yaml").write_text(
        "defaults: [{local: mine}, {grid: mine}, _self_]\n"
    )
    (tmp_path / "app" / "app.py").write_text(APP)

    def run(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(tmp_path / "app" / "app.py"), *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True
        )

    return run


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """Another package with a sweeper named optuna."""
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "official_optuna.py").write_text(OFFICIAL)
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
    }


def listed(text: str) -> Counter[str]:
    """The plugin classes that `--info plugins` lists."""
    return Counter(
        line.strip() for line in text.split("Profiling")[0].splitlines() if line.startswith("\t\t")
    )


def test_another_app_neither_sees_nor_imports_kd(tmp_path: Path, app: Callable) -> None:
    theirs = app("--info", "plugins")
    assert theirs.returncode == 0, theirs.stderr
    ours = subprocess.run(
        [sys.executable, "-m", "kd", "--info", "plugins"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    extra = listed(ours.stdout) - listed(theirs.stdout)
    own = ["LocalLauncher", "GridSweeper", "OptunaSweeper", "UserSource", "UserDirectoriesFirst"]
    assert extra == Counter(own)
    assert listed(theirs.stdout) - listed(ours.stdout) == Counter()
    assert app().stdout.splitlines() == ["groups 1 1", "imported []"]


@pytest.mark.parametrize(
    "word", ["hydra/launcher=local", "hydra/sweeper=grid", "hydra/sweeper=optuna"]
)
def test_the_names_of_kd_do_not_exist_in_another_app(word: str, app: Callable) -> None:
    group, name = word.split("=")
    refused = app(word, "--cfg", "hydra")
    assert refused.returncode == 1
    assert f"Could not find '{group}/{name}'" in refused.stderr
    available = refused.stderr.split("Available options")[1].split("Config search path")[0].split()
    assert not {"local", "grid", "optuna"} & set(available)


def test_the_official_optuna_sweeper_is_that_of_another_app(official: Path, app: Callable) -> None:
    done = app("-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "local.value=1,2")
    assert (done.returncode, done.stdout) == (0, "official sweeper 3 ['local.value=1,2']\n"), (
        done.stderr
    )


@pytest.mark.slow
def test_kd_has_its_own_optuna_beside_the_official_one(official: Path) -> None:
    """The words are those that `python -m kd` documents; kd's sweeper refuses n_trials=0."""
    words = ["-m", "hydra/sweeper=optuna", "method=logits", "data=digits", "method.T=interval(1,4)"]
    command = [sys.executable, "-m", "kd", *words, "hydra.sweeper.n_trials=0"]
    done = subprocess.run(
        command, cwd=official, env=environment(official), capture_output=True, text=True
    )
    line = "kd: hydra.sweeper.n_trials: should be 1 or more, got 0\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_the_official_keys_are_no_keys_of_kds_optuna(official: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "kd",
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_jobs=2",
        "--cfg",
        "hydra",
    ]
    done = subprocess.run(
        command, cwd=official, env=environment(official), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("kd: hydra.sweeper.n_jobs: unknown key; ")


@pytest.mark.parametrize(
    ("words", "launcher", "sweeper"),
    [
        ([], "_kd_launcher.LocalLauncher", "_kd_sweeper.GridSweeper"),
        (["hydra/sweeper=optuna"], "_kd_launcher.LocalLauncher", "_kd_optuna.OptunaSweeper"),
        (["hydra/launcher=basic", "hydra/sweeper=basic"], None, None),
    ],
)
def test_compose_has_typed_nodes(
    words: list[str], launcher: str | None, sweeper: str | None
) -> None:
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        hydra = compose("config", words, return_hydra_config=True).hydra
        for node, target in ((hydra.launcher, launcher), (hydra.sweeper, sweeper)):
            assert target is None or node._target_ == f"hydra_plugins.{target}"
        if launcher:
            with pytest.raises(ValidationError):
                hydra.launcher.slots = "two"


def test_a_wrong_type_is_refused_also_by_a_single_run(kd: Callable) -> None:
    assert is_one_line(
        kd("data=digits", "hydra.launcher.jobs_per_worker=two"),
        "hydra.launcher.jobs_per_worker: Value 'two' of type 'str'",
    )


@pytest.mark.parametrize(
    "first", ["hydra_plugins._kd_sweeper", "kd.cli", "hydra_plugins._kd_launcher"]
)
def test_the_sweeper_works_whatever_is_imported_first(first: str) -> None:
    """Hydra's scan executes modules again that were imported before it.

    The base of kd's sweeper is among them.
    """
    code = (
        f"import {first}, kd.cli, hydra_plugins._kd_sweeper as s; "
        "s.GridSweeper(max_batch_size=None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
