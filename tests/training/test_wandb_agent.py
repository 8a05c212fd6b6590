"""Under an agent of a W&B sweep, its run is the student's, or the means over seeds.

No other run is the agent's.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL, is_one_line
from wandb_server import Server

from kd.runs import directory

WORDS = [*SMALL, "threads=1", "tracker.timeout=300"]


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """agent("trial-1", {"method.T": 4}): from now on the environment is an agent's for this run."""

    def begin(run_id: str, parameters: dict[str, Any] | None = None) -> None:
        path = tmp_path / f"config-{run_id}.yaml"
        nodes = {name: {"value": value} for name, value in (parameters or {}).items()}
        path.write_text(yaml.safe_dump({"wandb_version": 1, **nodes}))
        monkeypatch.setenv("WANDB_SWEEP_ID", "sweep-1")
        monkeypatch.setenv("WANDB_RUN_ID", run_id)
        monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(path))
        monkeypatch.setenv("WANDB_PROJECT", "agents-project")
        monkeypatch.setenv("WANDB_ENTITY", "agents-team")

    return begin


def results(method: str) -> list[dict[str, Any]]:
    paths = sorted(Path("runs").glob(f"{method}-cnn-1-*/result.json"))
    return [json.loads(path.read_text()) for path in paths]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.slow
def test_the_run_of_the_agent_is_the_students(
    server: Server, kd: Callable, agent: Callable
) -> None:
    agent("trial-1", {"method": "logits", "method.T": 4.0, "student": "cnn"})
    words = [*WORDS, "method=logits", "method.T=4.0", "student.epochs=2", "teacher.epochs=3"]
    assert kd(*words).code == 0
    (student,), (teacher,) = results("logits"), server.of("teacher")
    trial = server.runs["trial-1"]
    assert trial.sweep == "sweep-1"
    assert (trial.project, trial.entity, trial.job_type) == (
        "agents-project",
        "agents-team",
        "student",
    )
    assert trial.epochs() == [1, 2]
    assert trial.summary["val/accuracy"] == student["metrics"]["val_accuracy"]
    assert trial.summary["test/accuracy"] == student["metrics"]["test_accuracy"]
    chosen = {name: trial.config[name] for name in ("method", "method.T", "student")}
    assert chosen == {"method": "logits", "method.T": 4.0, "student": "cnn"}, (
        "as the sweep calls them"
    )
    assert trial.config["method.alpha"] == student["config"]["method"]["alpha"]
    assert trial.config["student.epochs"] == 2
    assert trial.config["teacher"]["epochs"] == 3, "as in every run of kd"
    assert teacher.sweep is None
    assert teacher.epochs() == [1, 2, 3]
    assert len(server.runs) == 2


@pytest.mark.slow
def test_a_repeated_configuration_reports_its_result_again(
    server: Server, kd: Callable, agent: Callable
) -> None:
    agent("trial-1")
    words = [*WORDS, "method=logits", "student.epochs=2"]
    assert kd(*words).code == 0
    agent("trial-2")
    again = kd(*words)
    assert again.code == 0
    assert "found in" in again.out
    first, second = server.runs["trial-1"], server.runs["trial-2"]
    (student,) = results("logits")
    assert second.sweep == "sweep-1"
    assert second.state == "finished"
    assert (
        second.summary["val/accuracy"]
        == student["metrics"]["val_accuracy"]
        == first.summary["val/accuracy"]
    )
    curves = [
        [(row["epoch"], row["val/accuracy"]) for row in run.rows() if "epoch" in row]
        for run in (first, second)
    ]
    assert curves[0] == curves[1] != []
    assert len(server.runs) == 3, "two trials and the teacher"


@pytest.mark.slow
def test_a_trial_that_goes_on_with_an_interrupted_run_has_all_its_epochs(
    server: Server, kd: Callable, agent: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = directory.RunDirectory.append_epoch

    def stopped(self: directory.RunDirectory, row: dict[str, Any]) -> None:
        epoch(self, row)
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    words = [*WORDS, "method=standard", "student.epochs=3"]
    agent("trial-1")
    with monkeypatch.context() as patch:
        patch.setattr(directory.RunDirectory, "append_epoch", stopped)
        assert kd(*words).code == 130
    assert server.runs["trial-1"].state == "failed"
    agent("trial-2")
    assert kd(*words).code == 0
    assert server.runs["trial-2"].epochs() == [1, 2, 3]
    assert server.runs["trial-2"].state == "finished"
    assert len(server.runs) == 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["hydra.launcher.slots=2", "hydra.launcher.jobs_per_worker=4"])
def test_a_trial_of_several_runs_is_the_mean_of_the_best_setting(
    launcher: str, server: Server, kd: Callable, agent: Callable
) -> None:
    agent("trial-1", {"optimizer.lr": 0.05})
    words = [
        "-m",
        *WORDS,
        "method=standard",
        "optimizer.lr=0.05,0.0001",
        "seed=0,1",
        launcher,
        "hydra.sweep.dir=sweep",
    ]
    assert kd(*words, "device=cpu").code == 0
    runs = results("standard")
    by_rate: dict[float, list[dict]] = {}
    for run in runs:
        by_rate.setdefault(run["config"]["optimizer"]["lr"], []).append(run["metrics"])
    values = {
        rate: mean([metrics["val_accuracy"] for metrics in found])
        for rate, found in by_rate.items()
    }
    best = max(values, key=lambda rate: values[rate])
    trial = server.runs["trial-1"]
    assert trial.sweep == "sweep-1"
    assert trial.summary["val/accuracy"] == pytest.approx(values[best], abs=1e-12)
    assert trial.summary["test/accuracy"] == pytest.approx(
        mean([m["test_accuracy"] for m in by_rate[best]])
    )
    assert trial.config["seeds"] == [0, 1]
    assert trial.config["optimizer"]["lr"] == best
    assert trial.epochs() == [1]
    assert trial.rows()[0]["val/accuracy"] == pytest.approx(values[best])
    students = server.of("student")
    assert len(students) == 4
    assert len(server.of("sweep-summary")) == 1
    assert len(server.runs) == 6
    assert [run.sweep for run in server.runs.values() if run is not trial] == [None] * 5
    assert {run.group for run in server.runs.values()} == {trial.group}
    assert trial.group is not None


@pytest.mark.slow
def test_several_settings_without_validation_images_are_no_trial(
    server: Server, kd: Callable, agent: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent("trial-1")
    words = [
        "-m",
        *WORDS,
        "method=standard",
        "data.val_size=0",
        "hydra.launcher.slots=1",
        "hydra.sweep.dir=sweep",
    ]
    said = kd(*words, "optimizer.lr=0.05,0.01", "seeds=[0,1]")
    assert is_one_line(
        said,
        "data.val_size: a trial of a W&B sweep reports the value of the setting that is best on ",
    )
    assert not Path("runs").exists()
    assert kd(*words, "optimizer.lr=0.05", "seeds=[0,1]").code == 0
    assert "test/accuracy" in server.runs["trial-1"].summary


@pytest.mark.slow
def test_a_trial_of_two_methods_has_the_loss_terms_of_the_better(
    server: Server, kd: Callable, agent: Callable
) -> None:
    agent("trial-1")
    words = ["-m", *WORDS, "method=logits,standard", "student.epochs=2", "hydra.launcher.slots=1"]
    assert kd(*words).code == 0
    rows = [row for row in server.runs["trial-1"].rows() if "epoch" in row]
    best = max(
        results("logits") + results("standard"),
        key=lambda result: result["metrics"]["val_accuracy"],
    )
    assert len(rows) == 2
    assert [row["val/accuracy"] for row in rows][-1] == pytest.approx(
        best["metrics"]["val_accuracy"]
    )
    assert ("train/kd" in rows[0]) == (best["method"] == "logits")
    assert all(value == value for row in rows for value in row.values()), "no NaN"


@pytest.mark.slow
def test_a_trial_with_a_failed_run_has_no_value(
    server: Server, kd: Callable, agent: Callable
) -> None:
    agent("trial-1")
    words = [
        "-m",
        *WORDS,
        "method=standard",
        "optimizer.lr=0.05,1e30",
        "seed=0,1",
        "hydra.launcher.slots=1",
    ]
    assert kd(*words).code == 1
    assert "trial-1" not in server.runs, (
        "the exit code tells the agent; half the seeds make no mean"
    )


@pytest.mark.slow
def test_seed_is_no_parameter_of_a_sweep(
    server: Server, kd: Callable, agent: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent("trial-1", {"seed": 2, "method.T": 1.0})
    said = kd(*WORDS, "method=standard", "seed=2")
    assert is_one_line(said, "seed: cannot be a parameter of a W&B sweep")
    assert "seeds=[0,1,2]" in said.err
    assert not Path("runs").exists()
    assert not server.requests
    monkeypatch.delenv("WANDB_SWEEP_ID")  # the file of an earlier agent
    assert kd(*WORDS, "method=standard", "seed=2").code == 0


@pytest.mark.slow
def test_an_offline_trial_keeps_the_agents_id(
    kd: Callable, agent: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    agent("trial-1")
    assert kd(*WORDS, "method=logits").code == 0
    (student,) = Path("runs").glob("logits-*/wandb/offline-run-*-trial-1")
    assert student.is_dir()
    assert len(list(Path("runs").glob("*/wandb/offline-run-*"))) == 2


def test_the_example_of_a_sweep_varies_no_seed() -> None:
    sweep = yaml.safe_load(
        (Path(__file__).parents[2] / "examples" / "wandb-sweep.yaml").read_text()
    )
    assert "seed" not in sweep["parameters"]
    assert "seeds=[0,1,2]" in sweep["command"]
