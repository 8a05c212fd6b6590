"""`seeds=[0,1,2]`: one setting over several seeds, in grids and in searches."""

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from conftest import SMALL, is_one_line, result_of, run

from kd.core.errors import UserError
from kd.core.io import write_json
from kd.report.tables import read_plan
from kd.runs import directory
from kd.runs.status import RunState, RunStatus
from kd.sweep.optuna_study import Study, description
from kd.sweep.scheduler import LocalScheduler

GRID = ["method=logits", "hydra.sweep.dir=out"]
SEARCH = [
    "hydra/sweeper=optuna",
    "method=logits",
    "method.T=interval(1.0,8.0)",
    "hydra.sweep.dir=out",
]


@pytest.fixture(autouse=True)
def _without_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd.report.figures.draw", lambda *_, **__: ([], []))


def plan() -> list[dict[str, Any]]:
    return read_plan(Path("out"))


def stored() -> optuna.Study:
    storage = optuna.storages.RDBStorage(f"sqlite:///{Path('runs/search.db').absolute()}")
    (study,) = optuna.get_all_study_summaries(storage)
    return optuna.load_study(study_name=study.study_name, storage=storage)


def trials() -> list[Any]:
    return stored().trials


# ---- a grid


@pytest.mark.slow
def test_each_job_of_a_grid_is_run_once_per_seed(
    kd: Callable, composed: Callable, launched: list
) -> None:
    said = kd("-m", *SMALL, *GRID, "method.T=1,2", "seeds=[0,1,5]")
    assert said.code == 0, said.err
    settings = [(T, seed) for T in (1, 2) for seed in (0, 1, 5)]
    ids = [
        composed("method=logits", f"method.T={T}", f"seed={seed}").identity()
        for T, seed in settings
    ]
    assert [job["id"] for job in plan()] == ids
    assert [Path(job["folder"]).name for job in launched] == [
        f"logits-cnn-1-s{s}-{i}" for (_, s), i in zip(settings, ids, strict=True)
    ]
    for job, (T, seed) in zip(plan(), settings, strict=True):
        assert (job["config"]["seed"], job["config"]["seeds"], job["config"]["method"]["T"]) == (
            seed,
            None,
            T,
        )
        assert job["overrides"][-2:] == [f"method.T={T}", f"seed={seed}"]
    assert pd.read_csv("out/summary.csv")["n"].tolist() == [3, 3]


@pytest.mark.slow
def test_it_makes_a_command_a_multirun(kd: Callable) -> None:
    """Trained in truth: the runs are those of seed=0 and seed=1, one of which was there before."""
    assert kd(*SMALL, "method=standard", "seed=1").code == 0
    (first,) = Path("runs").glob("*/result.json")
    before = first.stat().st_mtime_ns
    said = kd(*SMALL, "method=standard", "seeds=[0,1]", "hydra.sweep.dir=out")
    assert said.code == 0, said.err
    assert first.stat().st_mtime_ns == before
    assert sorted(path.name[:17] for path in Path("runs").glob("s*")) == [
        "standard-cnn-1-s0",
        "standard-cnn-1-s1",
    ]
    assert pd.read_csv("out/summary.csv")[["n", "planned"]].to_numpy().tolist() == [[2, 2]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [["hydra/launcher=basic"], ["hydra.launcher.jobs_per_worker=2", "hydra.launcher.slots=1"]],
    ids=["basic", "packed"],
)
def test_with_other_launchers(words: list[str], kd: Callable) -> None:
    said = kd(*SMALL, "method=standard", "seeds=[3,4]", "hydra.sweep.dir=out", *words)
    assert said.code == 0, said.err
    results = [json.loads((Path(job["folder"]) / "result.json").read_text()) for job in plan()]
    assert [result["config"]["seed"] for result in results] == [3, 4]
    assert {result["time"]["packed"] for result in results} == {1 if "basic" in words[0] else 2}


@pytest.mark.slow
def test_an_experiment_may_set_them(kd: Callable, composed: Callable, launched: list) -> None:
    folder = Path("conf/experiment")
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\nseeds: [0, 1]\nmethod: {T: 2.0}\n")
    (folder / "grid.yaml").write_text(
        "# @package _global_\n"
        "hydra: {mode: MULTIRUN, sweeper: {params: {seed: '0,1', method.T: '1,2'}}}\n"
    )
    words = ["--config-dir=conf", *SMALL, "method=logits"]

    def planned(name: str, *more: str) -> list[tuple[float, int]]:
        said = kd(*words, *more, f"hydra.sweep.dir={name}")
        assert said.code == 0, said.err
        return [
            (job["config"]["method"]["T"], job["config"]["seed"]) for job in read_plan(Path(name))
        ]

    assert planned("a", "+experiment=mine") == [(2.0, 0), (2.0, 1)]
    assert planned("b", "+experiment=mine", "seeds=[7]") == [(2.0, 7)]
    assert planned("c", "+experiment=mine", "seeds=null", "seed=7", "-m") == [(2.0, 7)]
    assert planned("d", "+experiment=grid", "seeds=[7,8]") == [(1, 7), (1, 8), (2, 7), (2, 8)]
    assert sorted(planned("e", "+experiment=grid")) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    said = kd(*words, "+experiment=mine", "seed=3")
    assert is_one_line(said, "seeds: seed=3 and seeds=[0, 1] are both given; give only one of them")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["seeds=3"], ["seeds=[]"], ["seeds=[1,1]"], ["seeds=[-1]"], ["seeds=[0.5]"],
        ["seeds=[true]"], ["seeds=[a]"], ["seeds=[0,null]"], ["seeds={a: 1}"], ["-m", "seeds=0,1"],
        ["-m", "seeds=range(3)"], [f"seeds=[{2**63}]"], ["seeds=[0,1]", "seed=3"],
        ["-m", "seeds=[0,1]", "seed=3,4"], ["seeds=[0,1]", "++seed=3"],
        ["seeds=[0,1]", "hydra.mode=RUN"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_is_no_list_of_seeds_is_refused(words: list[str], kd: Callable) -> None:
    said = kd(*SMALL, "method=standard", *words)
    assert is_one_line(said, "seeds: "), said.err
    assert list(Path().iterdir()) == []


def test_it_is_no_part_of_the_identity_and_of_no_single_run(composed: Callable) -> None:
    several = composed("method=standard", "seeds=[0,1]")
    assert several.identity() == composed("method=standard").identity()
    with pytest.raises(UserError, match=r"^seeds: several seeds need a multirun; add -m"):
        run(several)
    assert not Path(several.paths.runs).exists()


# ---- a search


@pytest.mark.slow
def test_a_trial_is_worth_the_mean_over_its_seeds(kd: Callable, launched: list) -> None:
    words = [*SMALL, *SEARCH, "seeds=[0,1,2]", "hydra.sweeper.n_trials=2"]
    said = kd(*words)
    assert said.code == 0, said.err
    assert [job["config"]["seed"] for job in launched] == [0, 1, 2, 0, 1, 2]
    assert [job["number"] for job in plan()] == list(range(6))
    for number, trial in enumerate(trials()):
        jobs = launched[3 * number : 3 * number + 3]
        assert {job["config"]["method"]["T"] for job in jobs} == {trial.params["method.T"]}
        results = [json.loads((Path(job["folder"]) / "result.json").read_text()) for job in jobs]
        assert trial.value == pytest.approx(sum(r["metrics"]["val_accuracy"] for r in results) / 3)
    assert pd.read_csv("out/summary.csv")["n"].tolist() == [3, 3]
    assert kd(*words).code == 0
    assert len(launched) == 6, "the same command has nothing left to do"


@pytest.mark.slow
def test_a_free_worker_takes_the_next_seed_of_a_trial(
    kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def run(scheduler: LocalScheduler) -> None:
        units = [scheduler.source() for _ in range(3)]
        taken.extend((job["config"]["method"]["T"], words[-3]) for ((job, words),) in units)
        for ((job, _),) in units:
            scheduler.on_job_end(job, RunStatus(RunState.FAILED, "of a test"))
        assert scheduler.progress.total == 2
        assert scheduler.source() is None

    monkeypatch.setattr(LocalScheduler, "run", run)
    kd(*SMALL, *SEARCH, "seeds=[0,1]", "hydra.sweeper.n_trials=1", "hydra.launcher.slots=2")
    assert [seed for _, seed in taken] == ["seed=0", "seed=1"]


@pytest.mark.slow
def test_a_failed_seed_fails_its_trial(kd: Callable, launched: list, ends: dict) -> None:
    ends[1] = "failed"
    said = kd(*SMALL, *SEARCH, "seeds=[0,1,2]", "hydra.sweeper.n_trials=2")
    assert (said.code, said.err.splitlines()[-1]) == (1, "kd: 1 of 6 jobs are not done: 2")
    assert [job["config"]["seed"] for job in launched] == [0, 1, 0, 1, 2]
    assert [trial.state.name for trial in trials()] == ["FAIL", "COMPLETE"]
    states = [directory.read_status(Path(job["folder"])) for job in plan()]
    assert [state.state for state in states] == ["done", "failed", "pruned", "done", "done", "done"]
    assert states[2].reason == "not started: another seed of its trial failed"


@pytest.mark.slow
def test_a_killed_seed_is_tried_again_and_the_others_are_not(
    kd: Callable, launched: list, ends: dict
) -> None:
    ends[1] = "killed"
    said = kd(*SMALL, *SEARCH, "seeds=[0,1,2]", "hydra.sweeper.n_trials=1")
    assert said.code == 0, said.err
    assert [job["config"]["seed"] for job in launched] == [0, 1, 1, 2]
    first, again = trials()
    assert (first.state.name, first.user_attrs["lost"], again.state.name) == (
        "FAIL",
        True,
        "COMPLETE",
    )
    assert first.params == again.params
    assert len(plan()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_half_done_trial_is_resumed(
    how: str, kd: Callable, launched: list, ends: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C gives the trial back at once; after kill -9 the next process finds that it is lost."""
    words = [*SMALL, *SEARCH, "seeds=[0,1,2]", "hydra.sweeper.n_trials=1"]
    ends[1] = how
    with monkeypatch.context() as patch:
        if how == "kill":
            patch.setattr(Study, "close", lambda self: None)
        assert kd(*words).code == 130
    states = [trial.state.name for trial in trials()]
    assert states == (["RUNNING"] if how == "kill" else ["FAIL", "WAITING"])
    if how == "kill":
        (trial,) = trials()
        stored()._storage.set_trial_user_attr(
            trial._trial_id, "owner", [platform.node(), 2**22 + 1, 1.0]
        )
    assert kd(*words).code == 0
    assert [job["config"]["seed"] for job in launched] == [0, 1, 1, 2]
    lost, done = trials()
    assert (lost.params, done.state.name) == (done.params, "COMPLETE")
    assert done.value == pytest.approx((0.01 + 0.03 + 0.04) / 3)


def test_the_pruner_reads_the_first_seed_only(tmp_path: Path, jobs: Callable) -> None:
    study = opened(tmp_path)
    study.study.pruner = optuna.pruners.ThresholdPruner(lower=0.5)
    trial = study.ask_trial()
    study.begin_trial(trial, jobs(3))
    first, second = study.next_job(), study.next_job()
    assert not study.report_epoch(second, {"epoch": 1, "val_accuracy": 0.1}), (
        "the pruner has not seen the first"
    )
    assert not study.report_epoch(first, {"epoch": 1, "val_accuracy": 0.9})
    assert study.report_epoch(first, {"epoch": 2, "val_accuracy": 0.2})
    assert study.report_epoch(second, {"epoch": 2, "val_accuracy": 0.9}), "its trial is given up"
    study.finish_trial(first, RunStatus(RunState.PRUNED))
    assert study.next_job() is None
    assert study.study.trials[0].state.name == "RUNNING"
    study.finish_trial(second, RunStatus(RunState.PRUNED))
    (told,) = study.study.trials
    assert (told.state.name, told.intermediate_values) == ("PRUNED", {1: 0.9, 2: 0.2})
    assert directory.read_status(tmp_path / "run2") == (
        "pruned",
        "not started: another seed of its trial was pruned",
    )


def test_one_seed_that_was_pruned_too_late_counts(tmp_path: Path, jobs: Callable) -> None:
    study = opened(tmp_path)
    study.study.pruner = optuna.pruners.ThresholdPruner(lower=0.5)
    study.begin_trial(study.ask_trial(), jobs(1))
    job = study.next_job()
    assert study.report_epoch(job, {"epoch": 1, "val_accuracy": 0.1})
    write_json(tmp_path / "run0" / "result.json", result_of(0.1))
    study.finish_trial(job, RunStatus(RunState.DONE))
    assert (study.study.trials[0].state.name, study.study.trials[0].value) == ("COMPLETE", 0.1)


def opened(folder: Path) -> Study:
    search = description("val_accuracy", [0, 1, 2], {}, {"": {}})
    return Study(f"{folder}/search.journal", "name", 9, search, "random", "none", 0)


@pytest.fixture
def jobs(tmp_path: Path) -> Callable:
    def make(count: int) -> list[dict[str, Any]]:
        for number in range(count):
            (tmp_path / f"run{number}").mkdir()
        return [{"number": n, "folder": str(tmp_path / f"run{n}")} for n in range(count)]

    return make


@pytest.mark.parametrize(
    "words",
    [["seed=0,1"], ["seed=range(3)"], ["seeds=[0],[1]"], ["seed=interval(0,4)"], ["++seed=0,1"]],
    ids=" ".join,
)
def test_seeds_are_not_searched(words: list[str], kd: Callable, launched: list) -> None:
    said = kd("-m", *SMALL, *SEARCH, *words)
    assert said.code == 2
    assert "seeds are not searched" in said.err
    assert "seeds=[0,1,2]" in said.err
    assert launched == [] == list(Path().iterdir())
