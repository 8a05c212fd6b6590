"""Sweeps as real processes: killed, interrupted, resumed, in parallel.

Nothing is lost and nothing is left running.
"""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import LONG, PATIENCE, Place, result_of
from conftest import SWEPT as SMALL

from kd.core.io import write_json
from kd.report.tables import read_plan
from kd.runs import directory
from kd.sweep.progress import SweepProgress
from kd.sweep.scheduler import order_by_teacher
from kd.training.checkpoint import Checkpoints


def measured(folder: Path) -> pd.DataFrame:
    """What a sweep's summary says, times aside.

    Nor does it say how many of the teacher's outputs were computed: others may have left them.
    """
    (path,) = folder.glob("multirun/*/*/summary.csv")
    times = ["train_seconds", "images_per_second", "teacher_flops"]
    return pd.read_csv(path).drop(columns=times, errors="ignore")


@pytest.fixture
def _without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd.report.figures.draw", lambda *_, **__: ([], []))


@pytest.mark.slow
@pytest.mark.usefixtures("_without_figures")
def test_killed_in_the_middle_and_started_again_ends_in_the_same_tables(
    place: Place, kd: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["-m", *SMALL, "method=standard,logits", "seed=0,1"]
    assert kd(*words).code == 0
    whole = Path.cwd()
    process = place.start(*words)
    place.wait(lambda: list(place.folder.glob("runs/*/result.json")))
    process.kill()
    place.wait(lambda: not place.workers(), 60)
    done = {path: path.stat().st_mtime_ns for path in place.folder.glob("runs/*/result.json")}
    assert len(done) < 5
    (first,) = place.folder.glob("multirun/*/*")
    first.rename(tmp_path / "first")
    monkeypatch.chdir(place.folder)
    said = kd(*words)
    assert said.code == 0, said.err
    assert said.out.count("found in runs/standard-cnn-2-s0") == 1
    assert {path: path.stat().st_mtime_ns for path in done} == done, "a finished run was run again"
    pd.testing.assert_frame_equal(measured(place.folder), measured(whole))
    assert {s.state for s in map(directory.read_status, place.runs())} == {"done"}


@pytest.mark.slow
def test_one_diverges_one_crashes_and_two_finish(place: Place) -> None:
    words = [
        "-m",
        *SMALL,
        "method=standard",
        "optimizer.lr=0.05,1e30,0.01,0.02",
        "student.epochs=10",
    ]
    process = place.start(*words)

    def third() -> Path | None:
        return next(
            (p for p in place.runs() if "0.01" in (p / "config.yaml").read_text() and running(p)),
            None,
        )

    def running(path: Path) -> bool:
        return directory.read_status(path).state == "running" and (path / "history.csv").exists()

    place.wait(third)
    os.kill(json.loads((third() / "status.json").read_text())["pid"], signal.SIGKILL)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "4 jobs: 2 done, 1 diverged, 1 killed" in out
    assert err.splitlines()[-1] == "kd: 2 of 4 jobs are not done: 2, 3"
    (sweep,) = place.folder.glob("multirun/*/*")
    runs = pd.read_csv(sweep / "runs.csv")
    assert runs["status"].tolist() == ["done", "diverged", "killed", "done"]
    assert "the loss term 'hard' is" in runs["reason"][1]
    assert runs["reason"][2] == "its process was killed by SIGKILL"
    page = (sweep / "index.html").read_text()
    assert "its process was killed by SIGKILL" in page


@pytest.mark.slow
@pytest.mark.usefixtures("_without_figures")
def test_four_jobs_at_once_train_their_teacher_once(kd: Callable) -> None:
    words = [
        "-m",
        *SMALL,
        "method=logits",
        "method.T=1,2,4,8",
        "teacher.epochs=6",
        "hydra.launcher.slots=4",
    ]
    said = kd(*words)
    assert said.code == 0, said.err
    logs = [path.read_text() for path in Path().glob("runs/logits-*/kd.log")]
    assert sum(log.count("teacher  epoch 6/6") for log in logs) == 1
    assert said.out.count("teacher: waiting for the process that trains it") >= 1
    assert len(list(Path().glob("runs/standard-*"))) == 1
    assert len(list(Path().glob("runs/logits-*/result.json"))) == 4


@pytest.mark.slow
@pytest.mark.usefixtures("_without_figures")
def test_a_teacher_is_trained_beside_what_needs_none(kd: Callable) -> None:
    """And where it is there, jobs are started as they were typed."""
    words = ["-m", *SMALL, "method=standard,logits", "seed=0,1", "hydra.launcher.slots=2"]
    said = kd(*words)
    assert said.code == 0, said.err
    started = re.findall(r"^job (\d) of 4: ", said.out, re.M)
    assert set(started[:2]) == {"3", "1"}
    assert started[2:] == ["2", "4"]
    (folder,) = Path().glob("multirun/*/*")
    jobs = read_plan(folder)
    (teacher,) = Path.cwd().glob("runs/standard-cnn-2-s1000-*")
    assert [job["teachers"] for job in jobs] == [[], [], [str(teacher)], [str(teacher)]]
    assert [unit[0]["number"] for unit in order_by_teacher([[job] for job in jobs])] == [0, 1, 2, 3]
    (teacher / "result.json").unlink()
    assert [unit[0]["number"] for unit in order_by_teacher([[job] for job in jobs])] == [2, 0, 1, 3]


def test_a_free_worker_waits_for_no_teacher_while_another_is_there(tmp_path: Path) -> None:
    """The first of two teachers takes long: its students come last, not in the order typed."""
    slow, quick = tmp_path / "slow", tmp_path / "quick"
    jobs = [{"number": n, "teachers": [str(slow if n < 3 else quick)]} for n in range(6)]
    turns = order_by_teacher([[job] for job in jobs])
    assert [next(turns)[0]["number"] for _ in range(2)] == [0, 3]
    quick.mkdir()
    write_json(quick / "result.json", result_of(0.5))
    assert [next(turns)[0]["number"] for _ in range(2)] == [4, 5]
    assert [unit[0]["number"] for unit in turns] == [1, 2]


@pytest.mark.slow
def test_two_sweeps_of_one_second_have_two_directories(kd: Callable, launched: list) -> None:
    """Other sweeps have begun in each of the seconds in which this one can begin."""
    now = datetime.now()
    taken = {
        Path("multirun") / (now + timedelta(seconds=s)).strftime("%Y-%m-%d/%H-%M-%S")
        for s in range(60)
    }
    for path in taken:
        path.mkdir(parents=True)
    assert kd("-m", *SMALL, "method=standard").code == 0
    (own,) = set(Path().glob("multirun/*/*")) - taken
    assert own.name.endswith("-2")
    assert (own / "runs.csv").exists()
    assert not any(list(path.iterdir()) for path in taken)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)],
    ids=["Ctrl-C", "SIGTERM", "SIGKILL"],
)
def test_the_parent_is_stopped(
    sent: signal.Signals, code: int, place: Place, kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soon nothing runs; the interrupted job says so; the next start runs what is left.

    A checkpoint of that moment is left, by the worker where its parent was killed.
    """
    words = ["-m", "batch_size=8", *LONG, "seed=0,1"]
    words += ["checkpoint.every_n_epochs=null", "checkpoint.every_n_minutes=null"]
    process = place.start(*words)
    place.wait(lambda: list(place.folder.glob("runs/*/history.csv")))
    process.send_signal(sent)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code
    place.wait(lambda: not place.workers(), 60)
    (interrupted,) = place.runs()
    assert directory.read_status(interrupted).state == "killed"
    assert "Traceback" not in err
    if sent != signal.SIGKILL:
        (sweep,) = place.folder.glob("multirun/*/*")
        assert pd.read_csv(sweep / "runs.csv")["status"].tolist() == ["killed", "planned"]
    found = Checkpoints(interrupted).load()
    assert found is not None
    assert found["epoch"] == len(pd.read_csv(interrupted / "history.csv"))

    states = []

    def stop(*_: Any) -> None:
        states.append(directory.read_status(interrupted).state)
        raise KeyboardInterrupt

    monkeypatch.setattr(SweepProgress, "epoch_ended", stop)
    monkeypatch.chdir(place.folder)
    assert kd(*words).code == 130
    assert (states, place.runs()) == (["running"], [interrupted])
    assert (interrupted / "kd.log").read_text().count("resuming after epoch") == 1


@pytest.mark.slow
def test_a_sweep_with_a_mistake_leaves_nothing(kd: Callable) -> None:
    said = kd("-m", *SMALL, "method=logits", "method.T=1,0")
    assert (said.code, said.out) == (2, "")
    assert "method.T: should be greater than or equal to 0.001, got 0 (job 2: " in said.err
    said = kd("-m", *SMALL, "method=standard", "hydra.launcher.slots=0")
    assert (said.code, said.err) == (2, "kd: hydra.launcher.slots: should be 1 or more, got 0\n")
    assert list(Path().iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("_without_figures")
def test_a_run_that_is_planned_twice_is_run_once_and_counted_once(kd: Callable) -> None:
    """`standard` has no teacher that could differ."""
    said = kd("-m", *SMALL, "method=standard", "teacher.scale=2,3", "seed=0,1")
    assert said.code == 0, said.err
    assert said.out.count("found in") == 2
    assert measured(Path())["n"].tolist() == [2]


@pytest.mark.slow
@pytest.mark.usefixtures("_without_figures")
def test_another_launcher_ends_in_the_same_report(kd: Callable) -> None:
    words = [
        "-m",
        *SMALL,
        "method=standard",
        "optimizer.lr=0.05,1e30",
        "hydra/launcher=submitit_local",
    ]
    said = kd(*words, "hydra.launcher.timeout_min=5")
    assert said.code == 1, said.err
    assert "2 jobs: 1 done, 1 diverged" in said.out
    assert said.err.splitlines()[-1] == "kd: 1 of 2 jobs are not done: 2"
    (sweep,) = Path().glob("multirun/*/*")
    assert pd.read_csv(sweep / "runs.csv")["status"].tolist() == ["done", "diverged"]


@pytest.mark.slow
@pytest.mark.usefixtures("_without_figures")
@pytest.mark.parametrize("launcher", ["hydra/launcher=basic", "hydra/launcher=submitit_local"])
def test_with_another_launcher_a_failed_batch_ends_neither_the_next_nor_the_report(
    launcher: str, kd: Callable, folder: Path
) -> None:
    """Also where the job fails with an error that the user can mend."""
    whole = shutil.copytree(folder, Path.cwd() / "whole")
    image = min((folder / "train" / "dark").iterdir())
    image.write_bytes(image.read_bytes()[:50])
    words = [
        "-m",
        "data=imagefolder",
        "data.size=16",
        "student.scale=1",
        "student.epochs=1",
        "method=standard",
    ]
    words += ["batch_size=8", "device=cpu", "hydra.sweeper.max_batch_size=1", launcher]
    said = kd(*words, f"data.root={folder},{whole}")
    assert said.code == 1, said.err
    (sweep,) = Path().glob("multirun/*/*")
    assert pd.read_csv(sweep / "runs.csv")["status"].tolist() == ["failed", "done"]
    assert said.err.splitlines()[-1] == "kd: 1 of 2 jobs are not done: 1"


def test_slots_share_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from kd.sweep.scheduler import worker_environments

    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert worker_environments(None, 9, "cpu") == [{"OMP_NUM_THREADS": "1"}] * 8, "a core a worker"
    assert worker_environments(None, 2, "auto") == [{"OMP_NUM_THREADS": "4"}] * 2
    assert (
        worker_environments(None, 9, "cpu", each_core=False)
        == worker_environments(None, 9, "mps")
        == worker_environments(None, 9, "cuda:1")
        == [{}]
    )
    assert worker_environments(4, 9, "cpu") == [{"OMP_NUM_THREADS": "2"}] * 4
    assert len(worker_environments(4, 2, "cpu")) == 2, "no more workers than jobs"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [s["CUDA_VISIBLE_DEVICES"] for s in worker_environments(None, 9, "auto")] == ["0", "1"]
    assert [s["CUDA_VISIBLE_DEVICES"] for s in worker_environments(4, 9, "cuda")] == [
        "0",
        "1",
        "0",
        "1",
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [s["CUDA_VISIBLE_DEVICES"] for s in worker_environments(3, 9, "auto")] == ["5", "7", "5"]
    assert worker_environments(2, 9, "cpu")[0] == {"OMP_NUM_THREADS": "4"}


# ---- a search


SEARCH = ["-m", *SMALL, "hydra/sweeper=optuna", "method=logits", "method.alpha=interval(0.0,1.0)"]
SEARCH += ["method.T=tag(log,interval(1.0,16.0))"]


def trials(folder: Path) -> list[Any]:
    import optuna

    storage = f"sqlite:///{folder}/runs/search.db"
    (study,) = optuna.get_all_study_summaries(storage)
    return optuna.load_study(study_name=study.study_name, storage=storage).get_trials()


@pytest.mark.slow
@pytest.mark.usefixtures("_without_figures")
def test_two_processes_search_one_study_and_one_is_killed(
    place: Place, kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SEARCH, "hydra.sweeper.n_trials=8"]
    first = place.start(*words)
    place.wait(lambda: list(place.folder.glob("runs/search.db")))
    second = place.start(*words)
    place.wait(lambda: len(list(place.folder.glob("runs/logits-*/result.json"))) >= 4)
    first.kill()
    assert second.wait(PATIENCE) == 0
    monkeypatch.chdir(place.folder)
    said = kd(*words)  # what the killed one had begun
    assert said.code == 0, said.err
    found = trials(place.folder)
    lost = [t for t in found if t.user_attrs.get("lost")]
    counted = [t for t in found if not t.user_attrs.get("lost") and not t.user_attrs.get("surplus")]
    assert [t.state.name for t in found].count("RUNNING") == 0
    assert len(counted) == 8
    assert {t.state.name for t in counted} <= {"COMPLETE", "PRUNED"}
    again = [t for t in counted if "again" in t.user_attrs]
    assert len(again) == len(lost), "none is lost"
    for new, old in zip(
        again, lost, strict=True
    ):  # a kill may fall between two draws: what was drawn is kept
        assert new.params.items() >= old.params.items()
    drawn = [str(t.params) for t in counted]
    assert len(set(drawn)) == 8, "two processes drew the same values"
    last = max(place.folder.glob("multirun/*/*"), key=lambda path: path.stat().st_mtime)
    assert len(pd.read_csv(last / "runs.csv")) == 8, (
        "the report is on the study, whoever ran its trials"
    )


@pytest.mark.slow
def test_a_search_is_checked_and_never_looks_at_the_test_images(kd: Callable) -> None:
    for words, line in {
        (
            "hydra.sweeper.objective=test_accuracy",
        ): "'test_accuracy' is not known; allowed: val_accuracy, ",
        (
            "hydra.sweeper.pruner=axe",
        ): "hydra.sweeper.pruner: 'axe' is not known; allowed: median, hyperband, none",
        ("method.T=interval(0,4)",): "method.T: should be greater than or equal to 0.001, got 0",
        (
            "method.T=tag(log,interval(0.0,4.0))",
        ): "method.T: interval(a,b) needs a <= b, and a > 0 with tag(log,...)",
        ("data.val_size=0",): "data.val_size: a search needs validation images, got 0",
        (
            "hydra.sweeper.storage=nodriver://x",
        ): "hydra.sweeper.storage: nodriver://x cannot be opened (",
    }.items():
        code, out, err = kd(*SEARCH, *words)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert line in err
    assert not list(Path().glob("*/*"))


@pytest.mark.slow
def test_a_hopeless_trial_is_pruned(kd: Callable) -> None:
    words = ["-m", *SMALL, "hydra/sweeper=optuna", "method=standard", "student.epochs=4"]
    words += [
        "optimizer.lr=tag(log,interval(0.000001,0.1))",
        "hydra.sweeper.n_trials=9",
        "hydra.sweeper.sampler=random",
    ]
    said = kd(*words)
    assert said.code == 0, said.err
    assert "PRUNED" in [t.state.name for t in trials(Path.cwd())]
    (sweep,) = Path().glob("multirun/*/*")
    assert "pruned" in pd.read_csv(sweep / "runs.csv")["status"].tolist()
    assert (sweep / "figures" / "search-history.png").exists()
