"""Experiments in multiruns: each keeps its grid, and its choices of launcher and sweeper hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from conftest import is_one_line, write
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.plugins import Plugins
from hydra.types import RunMode

from hydra_plugins import _kd_grid as kd_grid
from hydra_plugins._kd_search_path import DIRECTORIES
from kd import cli

Planned = Callable[..., list[dict[str, Any]]]
BASIC = "hydra/launcher=basic"  # in this process
OWN = ("-m", "--config-dir", "own")


def experiment(name: str, text: str) -> None:
    write(f"own/experiment/{name}.yaml", f"# @package _global_\n{text}")


@pytest.fixture
def own(kd: Callable) -> Callable:
    """Experiments of the user's, in own/."""
    experiment(
        "hot",
        "hydra: {mode: MULTIRUN, "
        "sweeper: {params: {method: logits, method.T: '5,6', seed: '0,1'}}}\n",
    )
    experiment(
        "methods",
        "hydra: {mode: MULTIRUN, sweeper: {params: {method: 'standard,logits', seed: '7'}}}\n",
    )
    experiment(
        "deep/more",
        "defaults: [/experiment/methods, _self_]\nhydra: {sweeper: {params: {seed: '8'}}}\n",
    )
    experiment("plain", "defaults: [override /method: standard]\nseed: 9\n")
    return kd


HOT = [("hot", "logits", T, seed) for T in "56" for seed in "01"]
METHODS = [("methods", "standard", None, "7"), ("methods", "logits", None, "7")]
SWEPT = {  # what is typed: experiment, method, T and seed of each job, where they are swept
    "listed": ("+experiment=hot,methods", [*HOT, *METHODS]),
    "in the other order": ("+experiment=methods,hot", [*METHODS, *HOT]),
    "a choice": ("+experiment=choice(methods,hot)", [*METHODS, *HOT]),
    "a glob": ("+experiment=glob([hot,me*])", [*HOT, *METHODS]),
    "a glob that excludes": ("+experiment=glob(*,exclude=[c*,f*,o*,p*,s*,t*])", [*HOT, *METHODS]),
    "one without a grid": ("+experiment=plain,methods", [("plain", None, None, None), *METHODS]),
    "in a folder, with defaults": (
        "+experiment=deep/more,plain",
        [
            ("deep/more", "standard", None, "8"),
            ("deep/more", "logits", None, "8"),
            ("plain", None, None, None),
        ],
    ),
    "a key over all": (
        "+experiment=hot,methods seed=2",
        [
            ("hot", "logits", "5", "2"),
            ("hot", "logits", "6", "2"),
            ("methods", "standard", None, "2"),
            ("methods", "logits", None, "2"),
        ],
    ),
    "a swept key over all": (
        "seed=2,3 +experiment=methods,plain",
        [
            ("methods", "standard", None, "2"),
            ("methods", "standard", None, "3"),
            ("methods", "logits", None, "2"),
            ("methods", "logits", None, "3"),
            ("plain", None, None, "2"),
            ("plain", None, None, "3"),
        ],
    ),
    "a forced key": (
        "+experiment=hot,methods method=logits ++method.T=3",
        [("hot", "logits", "3", "0"), ("hot", "logits", "3", "1"), ("methods", "logits", "3", "7")],
    ),
    "a group beside": (
        "+experiment=hot,methods method=dkd,nkd seed=1 method.T=2",
        [(name, method, "2", "1") for name in ("hot", "methods") for method in ("dkd", "nkd")],
    ),
    "one alone": ("+experiment=hot", HOT),
    "no experiment": (
        "seed=0,1 method=standard,logits",
        [(None, method, None, seed) for seed in "01" for method in ("standard", "logits")],
    ),
    "kd's own": (
        "+experiment=temperature,compare seed=3",
        [
            *(("temperature", None, T, "3") for T in ("1", "2", "4", "8", "16")),
            *(("compare", method, None, "3") for method in ("standard", "logits", "feature")),
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(("words", "expected"), SWEPT.values(), ids=SWEPT)
def test_swept_experiments_keep_their_grids(
    words: str, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Plugins.instance()
    monkeypatch.setenv(DIRECTORIES, json.dumps([str(Path("own").absolute())]))
    loader = ConfigLoaderImpl(create_config_search_path(str(cli.CONF)))
    version.setbase("1.3")
    config = loader.load_configuration("config", words.split(), RunMode.MULTIRUN)
    jobs = kd_grid.jobs(loader, config, kd_grid.choices(loader, config))
    keys = ("experiment", "method", "method.T", "seed")
    swept = [dict(word.lstrip("+").split("=") for word in job) for job in jobs]
    assert [tuple(job.get(key) for key in keys) for job in swept] == expected


@pytest.mark.slow
@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    "words",
    [
        ["--config-dir=own", "experiment=hot,methods"],
        ["hydra.searchpath=[file://own]", "+experiment=hot,methods"],
    ],
    ids=["without the +, in --config-dir", "on the search path"],
)
def test_swept_experiments_are_run(words: list[str], planned: Planned) -> None:
    jobs = [job["config"] for job in planned("-m", *words, BASIC, "seed=2")]
    assert [(one["method"]["name"], one["method"].get("T")) for one in jobs] == [
        ("logits", 5.0),
        ("logits", 6.0),
        ("standard", None),
        ("logits", 4.0),
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("swept", [False, True])
def test_an_experiment_chooses_the_launcher(swept: bool, planned: Planned) -> None:
    """Only Hydra's basic launcher runs jobs in this process, which is where `planned` sees them."""
    for name, seed in (("a", 1), ("b", 2)):
        grid_ = (
            "hydra: {mode: MULTIRUN, sweep: {dir: out}, "
            f"sweeper: {{params: {{seed: '{seed}'}}}}}}\n"
        )
        experiment(
            name,
            f"defaults: [override /method: standard, override /hydra/launcher: basic]\n{grid_}",
        )
    jobs = planned(
        "--config-dir", "own", *(["-m", "+experiment=a,b"] if swept else ["+experiment=b"])
    )
    assert [job["config"]["seed"] for job in jobs] == ([1, 2] if swept else [2])
    assert Path("out/jobs.json").exists(), "an experiment's own directory, though it is swept"


@pytest.mark.usefixtures("own")
def test_the_command_line_wins_over_an_experiments_launcher(planned: Planned) -> None:
    experiment(
        "cluster", "defaults: [override /hydra/launcher: submitit_slurm]\nmethod: {alpha: 0.2}\n"
    )
    assert [
        job["config"]["method"]["alpha"] for job in planned(*OWN, "+experiment=cluster", BASIC)
    ] == [0.2]


@pytest.mark.parametrize(
    "directory", ["--config-dir=own", "hydra.searchpath=[file://own]", "--config-name=mine"]
)
def test_an_experiments_choices_hold(directory: str, own: Callable) -> None:
    experiment(
        "cluster",
        """
defaults:
  - override /method: dkd
  - override /model@teacher: resnet20
  - override /optimizer@teacher.optimizer: adamw
  - override /schedule: step
  - override /hydra/launcher: submitit_slurm
  - override /hydra/sweeper: optuna
hydra:
  launcher: {partition: gpu, timeout_min: 7}
  sweeper: {n_trials: 3, params: {method.T: 'interval(1,4)'}}
""",
    )
    words = [directory, "+experiment=cluster"]
    if directory == "--config-name=mine":
        write(
            "own/mine.yaml",
            "defaults: [config, _self_]\nhydra: {searchpath: [file://own]}\nseed: 5\n",
        )
        words.append("--config-dir=own")
    composed = yaml.safe_load(own(*words, "--cfg", "all").out)
    assert composed["hydra"]["launcher"]["_target_"].endswith("SlurmLauncher")
    assert (
        composed["hydra"]["launcher"]["partition"],
        composed["hydra"]["launcher"]["timeout_min"],
    ) == ("gpu", 7)
    assert composed["hydra"]["sweeper"]["n_trials"] == 3
    assert composed["hydra"]["sweeper"]["params"] == {"method.T": "interval(1,4)"}
    assert composed["method"]["name"] == "dkd"
    assert (composed["teacher"]["name"], composed["teacher"]["optimizer"]["name"]) == (
        "resnet",
        "adamw",
    )
    assert composed["schedule"]["name"] == "step"


def test_launchers_of_swept_experiments_differ(own: Callable) -> None:
    experiment("cluster", "defaults: [override /hydra/launcher: submitit_slurm]\n")
    said = own(*OWN, "data=digits", "+experiment=plain,cluster")
    assert is_one_line(
        said, "hydra.launcher: +experiment=plain and +experiment=cluster set it differently"
    )
    assert not list(Path().glob("multirun/*/*/*"))


def test_experiments_that_search_are_not_swept(own: Callable) -> None:
    search = (
        "defaults: [override /hydra/sweeper: optuna]\n"
        "hydra: {sweeper: {params: {method.T: 'interval(1,4)'}}}\n"
    )
    for name in ("one", "two"):
        experiment(name, search)
    assert is_one_line(own(*OWN, "data=digits", "+experiment=one,two"), "hydra/sweeper: ")
    assert is_one_line(
        own(*OWN, "hydra/sweeper=optuna", "+experiment=hot,methods"), "experiment: each choice has "
    )


@pytest.mark.slow
def test_a_search_by_an_experiment_from_another_directory(own: Callable) -> None:
    """Optuna is chosen in YAML; there is one study, below where it began.

    An interval over a key of integers gives integers.
    """
    experiment(
        "search",
        """
defaults: [override /method: standard, override /hydra/sweeper: optuna]
hydra:
  mode: MULTIRUN
  job: {chdir: true}
  sweeper:
    n_trials: 2
    params: {student.epochs: 'interval(1,2)', student.dropout: 'interval(0,0.5)'}
""",
    )
    words = ["data=digits", "student.scale=1", "device=cpu", "threads=1", "tracker.mode=disabled"]
    said = own("--config-dir", "own", "+experiment=search", *words, "hydra.launcher.slots=1")
    assert said.code == 0, said.err
    (sweep,) = Path().glob("multirun/*/*")
    runs = pd.read_csv(sweep / "runs.csv")
    assert runs["status"].tolist() == ["done", "done"]
    assert set(runs["epochs"]) <= {1, 2}
    assert not list(Path().glob("runs/*/runs")), "no run lies inside another"
    assert Path("runs/search.db").exists()
