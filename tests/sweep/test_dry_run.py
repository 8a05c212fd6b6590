"""dry_run=true prints what a command would do, and neither trains nor writes."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SWEPT, is_one_line

from kd.config.schema import run_dir
from kd.runs import directory

DRY = "dry_run=true"


def state(*folders: Path) -> dict[str, tuple[int, int]]:
    """Every path in these directories, and they themselves, with its size and time of change."""
    found = {}
    for folder in folders:
        for path in [folder, *folder.rglob("*")]:
            about = path.lstat()
            found[str(path)] = about.st_size, about.st_mtime_ns
    return found


def rows(out: str) -> list[list[str]]:
    """The columns of the table: number, state, time, overrides."""
    return [
        re.split(r"\s{2,}", line)
        for line in out.splitlines()
        if re.match(r"\d+ +(?!jobs: )\D", line)
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of `kd`'s commands, which nothing may change."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("KD_CACHE", str(cache))
    return tmp_path


@pytest.mark.parametrize("words", [["-m"], []], ids=["sweep", "without -m"])
def test_it_writes_nothing(words: list[str], kd: Callable, folder: Path) -> None:
    before = state(folder)
    done = kd(*words, *SWEPT, "method=logits", DRY)
    assert (done.code, done.err) == (0, "")
    assert state(folder) == before
    assert [row[1:3] for row in rows(done.out)] == [["to train", "unknown"]]


def test_it_writes_nothing_for_a_cluster(kd: Callable, folder: Path) -> None:
    before = state(folder)
    done = kd("-m", *SWEPT, "method=standard", "seed=0,1", "hydra/launcher=submitit_local", DRY)
    assert (done.code, state(folder)) == (0, before)
    assert len(rows(done.out)) == 2


@pytest.mark.slow
def test_an_experiment_is_listed_job_by_job(kd: Callable, folder: Path) -> None:
    before = state(folder)
    done = kd(*SWEPT, "+experiment=temperature", DRY)
    assert (done.code, state(folder)) == (0, before)
    listed = rows(done.out)
    assert [row[0] for row in listed] == [str(n) for n in range(1, 16)]
    assert [row[3] for row in listed[:4]] == [
        "method.T=1 seed=0",
        "method.T=1 seed=1",
        "method.T=1 seed=2",
        "method.T=2 seed=0",
    ]
    assert len(re.findall(r"^teacher .*runs/standard-cnn-2-s1000-", done.out, re.M)) == 1, (
        "the teacher once"
    )


@pytest.mark.slow
def test_what_is_there_is_told_from_what_is_to_do(
    kd: Callable, composed: Callable, folder: Path
) -> None:
    """One run is done and one was interrupted; the others take the time of their kind."""
    runs = f"paths.runs={folder / 'runs'}"
    sweep = ["-m", *SWEPT, runs, "student.epochs=4", "method=standard,logits", "seed=0,1"]
    assert kd(*SWEPT, runs, "student.epochs=2", "method=standard").code == 0
    (path,) = (folder / "runs").glob("*/result.json")
    result = json.loads(path.read_text())
    result["time"]["epoch_seconds"] = [90.0, 100.0, 110.0]
    path.write_text(json.dumps(result))

    first = kd(*sweep, DRY)
    assert [row[:3] for row in rows(first.out)] == [
        ["1", "to train", "6:40"],
        ["2", "to train", "6:40"],
        ["3", "to train", "unknown"],
        ["4", "to train", "unknown"],
    ]
    assert "time     about 15:00, plus 2 runs of unknown duration (nothing similar" in first.out, (
        "the teacher is of a known kind"
    )

    interrupted = run_dir(
        composed(*SWEPT, "student.epochs=4", "method=standard", "seed=1", small=False)
    )
    (interrupted / "checkpoints").mkdir(parents=True)
    (interrupted / "checkpoints" / "000001-00000000-0.pt").write_bytes(b"")
    (interrupted / "status.json").write_text(json.dumps({"state": "killed"}))
    before = state(folder)
    second = kd("-m", *SWEPT, runs, "student.epochs=2,4", "method=standard", "seed=0,1", DRY)
    assert state(folder) == before
    assert second.code == 0
    assert {row[-1]: row[1:-1] for row in rows(second.out)} == {
        "student.epochs=2 seed=0": ["found"],
        "student.epochs=2 seed=1": ["to train", "3:20"],
        "student.epochs=4 seed=0": ["to train", "6:40"],
        "student.epochs=4 seed=1": ["to resume, 1 of 4 epochs done", "5:00"],
    }
    assert "4 jobs: 1 found, 2 to train, 1 to resume" in second.out
    assert "time     about 15:00" in second.out


def test_a_refused_job_ends_in_one_line(kd: Callable, folder: Path) -> None:
    before = state(folder)
    done = kd("-m", *SWEPT, "method=logits", "method.T=1,2,0", DRY)
    assert is_one_line(done, "method.T: should be greater than or equal to 0.001, got 0 (job 3: ")
    assert state(folder) == before


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["dry_run=maybe"], "dry_run: should be true or false, got 'maybe'"),
        (["-m", "dry_run=1"], "dry_run: should be true or false, got 1"),
        (["-m", "dry_run=true,false"], "dry_run: applies to the whole command"),
        (["hydra.mode=RUN", DRY], "dry_run: applies to the whole command"),
        (
            ["-m", "--cfg", "job"],
            "--cfg prints a single configuration, without -m; "
            "use dry_run=true to list the jobs of a sweep",
        ),
    ],
)
def test_a_mistake_trains_nothing(words: list[str], line: str, kd: Callable, folder: Path) -> None:
    before = set(state(folder))
    assert is_one_line(kd(*SWEPT, "method=standard", *words), line)
    assert set(state(folder)) == before


def test_it_is_no_part_of_a_run(composed: Callable) -> None:
    """Neither of its identity nor of the configuration that its directory keeps."""
    plain = composed("dry_run=false").to_dict()
    assert "dry_run" not in plain
    assert composed().identity() == composed("dry_run=false").identity()


SEARCH = [
    "-m",
    *SWEPT,
    "hydra/sweeper=optuna",
    "method=logits",
    "method.alpha=interval(0.0,1.0)",
    "hydra.sweeper.n_trials=8",
]


@pytest.mark.slow
def test_a_search_is_described(kd: Callable, folder: Path) -> None:
    """With its trials where there are some; neither study nor storage is made."""
    optuna = pytest.importorskip("optuna")
    before = state(folder)
    new = kd(*SEARCH, DRY)
    assert (new.code, new.err, state(folder)) == (0, "", before)
    assert "method.alpha=interval(0.0,1.0)" in new.out
    assert "trials   8: 8 remain\n" in new.out

    storage = f"sqlite:///{folder}/search.db"
    study = optuna.create_study(study_name="mine", storage=storage, direction="maximize")
    for value in (0.5, 0.6, 0.7):
        study.tell(study.ask(), value)
    before = state(folder)
    for name, line in {"mine": "8: 5 remain (3 complete)", "other": "8: 8 remain"}.items():
        done = kd(*SEARCH, DRY, f"hydra.sweeper.storage={storage}", f"hydra.sweeper.study={name}")
        assert (done.code, state(folder)) == (0, before)
        assert f"trials   {line}\n" in done.out
    assert directory.read_status(folder) == ("planned", "")
    assert os.listdir(folder / "cwd") == []
    Path("new.db").touch()
    done = kd(*SEARCH, DRY, "hydra.sweeper.storage=sqlite:///new.db")
    assert done.code == 0, "a database without tables has no trials"
    assert "trials   8: 8 remain\n" in done.out
    assert os.listdir() == ["new.db"]
    assert Path("new.db").stat().st_size == 0
    line = "hydra.sweeper.n_trials: should be 1 or more, got 0"
    assert is_one_line(kd(*SEARCH, DRY, "hydra.sweeper.n_trials=0"), line)
