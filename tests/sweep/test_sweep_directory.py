"""hydra.sweep.dir=DIR: its plan gives way to no other jobs, and one sweep at a time runs there."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import LONG, SMALL, Place, is_one_line

from kd.report.tables import read_plan
from kd.sweep.directory import SweepDirectory
from kd.sweep.optuna_study import Study

GRID = ["-m", *SMALL, "method=standard", "hydra.sweep.dir=out"]
SEARCH = [
    "-m",
    *SMALL,
    "method=logits",
    "hydra/sweeper=optuna",
    "hydra.sweep.dir=out",
    "hydra.sweeper.n_trials=2",
]
T = "method.T=interval(1.0,8.0)"


def files(folder: str = "out") -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }


def seeds(folder: str = "out") -> list[int]:
    return [job["config"]["seed"] for job in read_plan(Path(folder))]


OTHERS = ["seed=2", "seed=0", "seed=0,2", "seed=0,1 optimizer.lr=0.01"]
OTHERS += ["seed=0,1 paths.runs=elsewhere"]


@pytest.mark.slow
def test_other_jobs_are_refused(kd: Callable, launched: list) -> None:
    """Other ones, fewer, or the same ones kept elsewhere: nothing in the directory changes."""
    assert kd(*GRID, "seed=0,1").code == 0
    before = files()
    for other in OTHERS:
        said = kd(*GRID, *other.split())
        assert is_one_line(
            said,
            f"hydra.sweep.dir: {Path('out').absolute()} holds a sweep with other jobs "
            "(standard-cnn-1-s",
        ), other
        assert said.err.endswith("; choose another directory, or move that one away\n")
        assert (files(), len(launched)) == (before, 2), other


@pytest.mark.slow
def test_the_same_jobs_and_more_are_resumed(kd: Callable, launched: list) -> None:
    for words, expected in (
        ("seed=0,1", [0, 1]),
        ("seed=1,0", [1, 0]),
        ("seed=2,1,0", [2, 1, 0]),
        ("seeds=[0,1,2]", [0, 1, 2]),
    ):
        assert kd(*GRID, words).code == 0
        assert seeds() == expected
        assert pd.read_csv("out/runs.csv")["seed"].tolist() == expected
    assert len(launched) == 3


@pytest.mark.slow
def test_names_of_one_directory_are_one(kd: Callable, launched: list, tmp_path: Path) -> None:
    assert kd(*GRID, "seed=0").code == 0
    Path("link").symlink_to("out")
    (tmp_path / "runs of mine").symlink_to(Path("runs").absolute())
    for name in ("link", str(Path("out").absolute()), "./link/../out", "out/"):
        assert is_one_line(kd(*GRID, "seed=1", f"hydra.sweep.dir={name}"), "hydra.sweep.dir: "), (
            name
        )
        assert kd(*GRID, "seed=0", f"hydra.sweep.dir={name}").code == 0, name
    assert kd(*GRID, "seed=0", f"paths.runs='{tmp_path / 'runs of mine'}'").code == 0, (
        "the same runs"
    )
    assert len(launched) == 1


MISTAKES = [["seed=0,-1"], ["seed=0,1", "nothing=1,2"], ["method=standard,none"]]


@pytest.mark.slow
def test_a_mistake_changes_nothing(kd: Callable, launched: list) -> None:
    """Nor is the report on the jobs that are there written again, as if they were those typed."""
    assert kd(*GRID, "seed=0,1").code == 0
    before = files()
    for mistake in MISTAKES:
        said = kd(*GRID, *mistake)
        assert (said.code, said.out) == (2, ""), mistake
        assert files() == before, mistake
    shutil.rmtree("out")
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    for mistake in MISTAKES:
        assert kd(*GRID, *mistake).code == 2, mistake
        assert files() == {"out/notes.txt": b"mine"}, mistake


def damaged(change: Callable[[Any], Any]) -> Callable[[], None]:
    def act() -> None:
        plan = Path("out/jobs.json")
        plan.write_text(json.dumps(change(json.loads(plan.read_text()))))

    return act


def without(key: str) -> Callable[[], None]:
    return damaged(lambda jobs: [{k: v for k, v in job.items() if k != key} for job in jobs])


DAMAGES: list[tuple[Callable[[], Any], str]] = [
    (lambda: Path("out/jobs.json").write_text("[{"), "a sweep whose jobs.json is damaged: "),
    (lambda: Path("out/jobs.json").write_text("{}"), "a sweep whose jobs.json is damaged: "),
    (without("folder"), "a sweep whose jobs.json is damaged: job 1: folder is missing"),
    (
        lambda: Path("out/jobs.json").unlink(),
        "multirun.yaml, which does not belong to a sweep that can be resumed",
    ),
]


@pytest.mark.slow
def test_a_damaged_plan_is_not_replaced(kd: Callable, launched: list) -> None:
    assert kd(*GRID, "seed=0,1").code == 0
    plan = Path("out/jobs.json").read_bytes()
    for damage, reason in DAMAGES:
        Path("out/jobs.json").write_bytes(plan)
        damage()
        before = files()
        said = kd(*GRID, "seed=0,1")
        line = f"hydra.sweep.dir: {Path('out').absolute()} holds {reason}"
        assert is_one_line(said, line), said.err
        assert files() == before
    assert len(launched) == 2


@pytest.mark.slow
def test_the_plan_of_another_version_counts(kd: Callable, launched: list) -> None:
    """An older one wrote fewer keys; one with other numbers gave the jobs other directories."""
    assert kd(*GRID, "seed=0,1").code == 0
    for key in ("teachers", "content", "baseline"):
        without(key)()
    assert kd(*GRID, "seed=0,1").code == 0
    damaged(lambda jobs: [job | {"folder": job["folder"][:-12] + "0" * 12} for job in jobs])()
    assert is_one_line(kd(*GRID, "seed=0,1"), "hydra.sweep.dir: ")


@pytest.mark.parametrize("name", ["index.html", "summary.csv", "figures", "multirun.yaml"])
def test_what_a_user_has_there_is_not_replaced(name: str, kd: Callable, launched: list) -> None:
    Path("out").mkdir()
    Path("out", name).write_text("mine")
    said = kd(*GRID, "seed=0,1")
    assert is_one_line(said, f"hydra.sweep.dir: {Path('out').absolute()} holds {name}, ")
    assert (files(), launched) == ({f"out/{name}": b"mine"}, [])


def test_a_run_is_no_directory_for_a_sweep(kd: Callable, launched: list) -> None:
    Path("out").mkdir()
    for name in ("config.yaml", "status.json"):
        Path("out", name).write_text("")
    assert "holds the files of a run" in kd(*GRID, "seed=0,1").err
    assert len(files()) == 2


@pytest.mark.slow
def test_other_things_may_lie_there(kd: Callable, launched: list) -> None:
    Path("out/sub").mkdir(parents=True)
    Path("out/notes.txt").write_text("mine")
    assert kd(*GRID, "seed=0,1").code == 0
    assert Path("out/notes.txt").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written(kd: Callable, launched: list) -> None:
    Path("out").mkdir(mode=0o500)
    assert is_one_line(kd(*GRID, "seed=0,1"), "cannot write to ")


@pytest.mark.slow
def test_searches_and_grids_do_not_mix(kd: Callable, launched: list) -> None:
    assert kd(*SEARCH, T).code == 0
    before = files()
    for words, reason in {
        (*GRID, "seed=0,1"): "but this sweep is a grid",
        (*SEARCH, T, "hydra.sweeper.study=other"): "holds another search, ",
        (*SEARCH, "method.T=1,2"): "holds another search, ",
    }.items():
        said = kd(*words)
        assert is_one_line(said, "hydra.sweep.dir: "), said.err
        assert reason in said.err
    assert files() == before
    assert kd(*SEARCH, T, "hydra.sweeper.n_trials=3").code == 0
    assert len(read_plan(Path("out"))) == 3
    assert len(launched) == 3
    assert kd(*GRID, "seed=0,1", "hydra.sweep.dir=grid").code == 0
    assert "holds a grid, but this sweep is a search" in kd(*SEARCH, T, "hydra.sweep.dir=grid").err
    assert seeds("grid") == [0, 1]


@pytest.mark.slow
def test_a_search_whose_study_is_gone_is_not_replaced(kd: Callable, launched: list) -> None:
    assert kd(*SEARCH, T).code == 0
    before = files()
    Path("runs/search.db").unlink()
    said = kd(*SEARCH, T)
    assert is_one_line(
        said,
        f"hydra.sweep.dir: {Path('out').absolute()} holds a sweep with other jobs "
        "(logits-cnn-1-s0-",
    )
    assert files() == before


@pytest.mark.slow
def test_a_search_that_was_killed_is_resumed(kd: Callable, launched: list, ends: dict) -> None:
    """Its plan is never ahead of its study, nor shorter after the next start."""
    ends[1] = "kill"
    assert kd(*SEARCH, T).code == 130
    assert len(read_plan(Path("out"))) == 2
    assert kd(*SEARCH, T).code == 0
    assert len(read_plan(Path("out"))) == 2
    assert pd.read_csv("out/runs.csv")["status"].tolist() == ["done", "done"]


@pytest.mark.slow
def test_a_search_without_a_trial_yet_is_resumed(
    kd: Callable, launched: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Study, "ask_trial", stop)
        assert kd(*SEARCH, T).code == 130
    assert read_plan(Path("out")) == []
    assert kd(*SEARCH, T).code == 0
    assert len(read_plan(Path("out"))) == 2


@pytest.mark.slow
def test_directories_that_were_there_stay(
    kd: Callable, launched: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("mine/empty").mkdir(parents=True)
    assert kd(*GRID, "seed=0,-1", "hydra.sweep.dir=mine/empty").code == 2
    assert kd(*GRID, "seed=0,-1", "hydra.sweep.dir=mine/empty/of/kd").code == 2
    assert [str(path) for path in Path().rglob("*")] == ["mine", "mine/empty"]
    monkeypatch.chdir("mine/empty")
    assert kd(*GRID, "seed=0,-1", "hydra.sweep.dir=.").code == 2
    assert Path.cwd().exists()


def test_a_link_to_nowhere_is_no_place_for_sweeps(kd: Callable, launched: list) -> None:
    Path("multirun").symlink_to("/nonexistent/scratch")
    said = kd("-m", *SMALL, "method=standard", "seed=0,1")
    assert is_one_line(said, "cannot write to multirun")


@pytest.mark.slow
def test_a_second_sweep_waits_for_no_first(
    place: Place, kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused while the first one runs, by whatever name or jobs; kill -9 ends that."""
    words = ["-m", *LONG, "hydra.sweep.dir=out"]
    first = place.start(*words, "seed=0")
    place.wait(lambda: list(place.folder.glob("runs/*/history.csv")))
    (place.folder / "link").symlink_to("out")
    plan = (place.folder / "out" / "jobs.json").read_bytes()
    monkeypatch.chdir(place.folder)
    for more in (["seed=0"], ["seed=0,1", f"hydra.sweep.dir={place.folder / 'link'}"]):
        code, out, err = kd(*words, *more)
        assert (code, out) == (2, "")
        assert err.startswith("kd: hydra.sweep.dir: another sweep is running in ")
    assert (place.folder / "out" / "jobs.json").read_bytes() == plan
    first.kill()
    first.wait()
    SweepDirectory(place.folder / "out").claim()


@pytest.mark.slow
def test_sweeps_that_start_at_one_moment_do_not_share_a_directory(place: Place) -> None:
    """Each of them reports on its own jobs, or says that it may not have the directory."""
    words = ["-m", *SMALL, "tracker.mode=disabled", "method=standard", "hydra.sweep.dir=out"]
    processes = [place.start(*words, f"seed={seed}") for seed in (0, 1)]
    ended = [process.communicate() for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 2], ended
    won = codes.index(0)
    assert "kd: hydra.sweep.dir: " in ended[1 - won][1]
    assert [job["config"]["seed"] for job in read_plan(place.folder / "out")] == [won]
    assert pd.read_csv(place.folder / "out" / "runs.csv")["seed"].tolist() == [won]
