"""What a sweep shows: a table on a terminal, few lines elsewhere, all of it in each kd.log."""

import io
import json
import logging
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import PATIENCE, Place
from conftest import SWEPT as SMALL
from rich.console import Console

from kd.core.console import EpochReport
from kd.runs import directory
from kd.runs.status import RunState, RunStatus
from kd.sweep import progress
from kd.sweep.progress import LiveProgress, SweepProgress
from kd.sweep.scheduler import LocalScheduler
from kd.sweep.worker_pool import Send

ONE = [*SMALL, "method=standard"]
FIXED = ["data=digits", "student.epochs=15"]


class Clock:
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def job(
    number: int, *words: str, method: str = "logits", folder: Path = Path("runs/x")
) -> dict[str, Any]:
    overrides = ["data=digits", f"method={method}", *words, "student.epochs=15"]
    config = {"method": {"name": method}, "rerun": False}
    return {"number": number, "overrides": overrides, "folder": str(folder), "config": config}


def finished(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch, val: float, test: float) -> None:
    """The job's result is there."""
    result = {"metrics": {"val_accuracy": val, "test_accuracy": test}}
    monkeypatch.setattr(progress.directory, "load_result", lambda path: result)


def live(
    width: int = 100, height: int = 25, total: int = 9
) -> tuple[LiveProgress, Clock, Callable[[], str]]:
    console, clock = (
        Console(file=io.StringIO(), force_terminal=True, width=width, height=height),
        Clock(),
    )
    shown = LiveProgress(total, FIXED, console, clock=clock)

    def drawn() -> str:
        with console.capture() as captured:
            console.print(shown.render())
        return re.sub(r"\x1b\[[0-9;]*m", "", captured.get())

    return shown, clock, drawn


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


# ---- the table


def test_the_table_has_a_row_for_each_running_job_and_the_counts_beneath(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown, clock, drawn = live()
    jobs = [job(n, f"seed={n}", "method.T=4") for n in range(9)]
    shown.job_already_done(jobs[8], {"metrics": {"val_accuracy": 0.5}})
    for one in jobs[:4]:
        shown.job_started(one)
    clock.seconds += 20
    finished(jobs[1], monkeypatch, 0.9817, 0.9787)
    shown.job_ended(jobs[1], RunStatus(RunState.DONE))
    shown.job_ended(jobs[3], RunStatus(RunState.FAILED, "boom"))
    shown.epoch_ended(0, EpochReport("student", 3, 15, 1.23456, 0.915, 80.0))
    shown.epoch_ended(2, EpochReport("teacher", 7, 20, 0.5, None, 13.0))
    clock.seconds += 5
    assert [" ".join(line.split()) for line in drawn().splitlines()] == [
        "job method settings epoch loss val, % left",
        "1 logits seed=0 method.T=4 3/15 1.2346 91.50 1:15",
        "3 logits seed=2 method.T=4 teacher 7/20 0.5000 > 0:08",
        "9 jobs: 2 running, 1 found, 1 done, 1 failed, 4 to do; left 1:15",
        "best so far: val 98.17 %, job 2 (method=logits seed=1 method.T=4)",
    ]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_the_table_fits_the_terminal(width: int) -> None:
    shown, _, drawn = live(width, height=12, total=500)
    for number in range(30):
        shown.job_started(
            job(
                number,
                "method.parts=[logits,{name:attention,weight:0.5}]",
                "optimizer.lr=0.001",
                "[red]",
            )
        )
        shown.epoch_ended(number, EpochReport("teacher 2", 113, 240, 1.5, 0.5, 40000.0))
    lines = drawn().splitlines()
    assert len(lines) <= 12
    assert max(map(len, lines)) <= width
    assert any("more running" in line for line in lines)
    assert lines[1].split()[0] == "1"
    if width >= 40:
        assert "teacher 2 113/240" in lines[1]
        assert "50.00" in lines[1]
    if width >= 60:
        assert "> 11:06:40" in lines[1]


def test_the_time_that_is_left_comes_from_the_jobs_that_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown, clock, _ = live(total=6)
    jobs = [job(n) for n in range(6)]
    assert shown.seconds_left() is None
    shown.job_started(jobs[0])
    shown.job_started(jobs[1])
    assert shown.seconds_left() is None
    clock.seconds += 10
    shown.epoch_ended(0, EpochReport("student", 1, 3, 1.0, 0.5, 20.0))
    assert shown.seconds_left() == pytest.approx((4 * 30 + 20 + 20) / 2)
    finished(jobs[0], monkeypatch, 0.5, 0.5)
    clock.seconds += 30
    shown.job_ended(jobs[0], RunStatus(RunState.DONE))
    shown.job_ended(jobs[1], RunStatus(RunState.DIVERGED, "nan"))
    shown.job_started(jobs[2])
    clock.seconds += 15
    assert shown.seconds_left() == pytest.approx((3 * 40 + 25) / 2)


def test_failures_stay_above_the_table(caplog: pytest.LogCaptureFixture) -> None:
    shown, _, _ = live()
    for number, state in enumerate(("failed", "diverged", "killed", "pruned")):
        shown.job_started(job(number, folder=Path(f"runs/{state}")))
        shown.job_ended(job(number, folder=Path(f"runs/{state}")), RunStatus(state, "why"))
    shown.line(4, logging.INFO, "an epoch of somebody")
    for number in (4, 5):
        shown.line(number, logging.WARNING, "the disk is nearly full")
    assert [r.getMessage() for r in caplog.records] == [
        "job 1 of 9 failed: why (runs/failed)",
        "job 2 of 9 diverged: why (runs/diverged)",
        "job 3 of 9 killed: why (runs/killed)",
        "[5] the disk is nearly full",
    ]


def test_what_kind_of_terminal_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    def kind(file: io.StringIO, **variables: str) -> type:
        console = Console(
            file=file, _environ=variables, force_jupyter=variables.pop("jupyter", None) == "1"
        )
        monkeypatch.setattr(progress, "get_console", lambda: console)
        return type(progress.sweep_progress(3))

    assert kind(Tty(), TERM="xterm") is LiveProgress
    assert kind(Tty(), TERM="xterm", NO_COLOR="1") is LiveProgress
    assert kind(Tty(), TERM="dumb") is SweepProgress
    assert kind(io.StringIO(), TERM="xterm", FORCE_COLOR="1") is SweepProgress
    assert kind(Tty(), TERM="xterm", jupyter="1") is SweepProgress


# ---- lines


def test_a_slow_job_gives_a_sign_of_life_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    shown = SweepProgress(2, FIXED, clock)
    shown.job_started(job(0, "seed=0"))
    for second in range(200):
        clock.seconds += 1
        if second == 70:
            shown.epoch_ended(0, EpochReport("teacher", 1, 20, 1.5, 0.25, 1000.0))
        shown.tick()
    assert [r.getMessage() for r in caplog.records] == [
        "job 1 of 2: method=logits seed=0",
        "job 1 of 2 has been in its first epoch for 1:00",
        "job 1 of 2 at teacher  epoch 1/20  loss 1.5000  val 25.00 %  left 15:51",
        "job 1 of 2 at teacher  epoch 1/20  loss 1.5000  val 25.00 %  left 14:51",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra", [[], ["hydra.launcher.jobs_per_worker=3"]], ids=["workers", "a pack"]
)
def test_a_sweep_through_a_pipe_has_a_line_for_the_start_and_the_end_of_a_job(
    extra: list[str], kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd.report.figures.draw", lambda *_, **__: ([], []))
    words = ["-m", *ONE, "student.epochs=3", "seed=0,1,2", "hydra.launcher.slots=1", *extra]
    code, out, err = kd(*words)
    assert (code, err) == (0, "")
    assert "epoch" not in out
    before, _, _ = out.partition("\n\n")
    results = {
        path.parent: directory.load_result(path.parent)
        for path in Path().glob("runs/*/result.json")
    }
    ends = re.findall(r"^job (\d) of 3 done: val (\S+) %  test (\S+) %  \d+:\d\d$", before, re.M)
    assert {(int(n) - 1, val, test) for n, val, test in ends} == {
        (
            r["seed"],
            f"{100 * r['metrics']['val_accuracy']:.2f}",
            f"{100 * r['metrics']['test_accuracy']:.2f}",
        )
        for r in results.values()
        if r
    }
    assert sorted(re.findall(r"^job (\d) of 3: seed=\d$", before, re.M)) == ["1", "2", "3"]
    assert len(before.splitlines()) == 6
    for path in results:
        lines = [
            line for line in (path / "kd.log").read_text().splitlines() if "student  epoch" in line
        ]
        epochs = [re.search(r"epoch +(\d+)/3", line)[1] for line in lines]  # type: ignore[index]
        assert epochs == [str(n) for n in range(1, 4)]
    again = "" if extra else kd(*words).out
    assert extra or len(re.findall(r"^job \d of 3: found in runs/standard-", again, re.M)) == 3


@pytest.mark.slow
def test_another_launcher_keeps_its_lines(kd: Callable) -> None:
    code, out, err = kd("-m", *ONE, "student.epochs=2", "seed=0,1", "hydra/launcher=basic")
    assert code == 0, err
    assert re.findall(r"^student  epoch (\d)/2  loss ", out, re.M) == ["1", "2", "1", "2"]
    for log in Path().glob("runs/*/kd.log"):
        assert log.read_text().count("student  epoch") == 2


@pytest.mark.slow
def test_a_real_terminal_is_drawn_and_left_as_it_was(place: Place) -> None:
    """The table comes and goes, errors and the report stay, and the cursor is shown again."""
    parent, child = pty.openpty()
    words = ["-m", *ONE, "student.epochs=2", "optimizer.lr=0.05,1e30", "hydra.launcher.slots=1"]
    environment = {
        **os.environ,
        "WANDB_MODE": "disabled",
        "TERM": "xterm",
        "COLUMNS": "100",
        "LINES": "30",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "kd", *words],
        cwd=place.folder,
        env=environment,
        stdin=child,
        stdout=child,
        stderr=child,
    )
    place.started.append(process)
    os.close(child)
    content = b""
    while True:
        try:
            content += os.read(parent, 65536)
        except OSError:  # the other end is closed
            break
    os.close(parent)
    assert process.wait(PATIENCE) == 1
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", content.decode())
    assert "2 jobs: 1 running, 1 to do" in text
    assert re.search(r"^ *1 +standard +optimizer\.lr=0\.05 +(-|[12]/2)", text, re.M)
    assert "best so far: val " in text
    assert text.count("job 2 of 2 diverged: epoch 1, step ") == 1, (
        "it is printed, not drawn again and again"
    )
    assert "student  epoch" not in text
    assert content.rfind(b"\x1b[?25h") > content.rfind(b"\x1b[?25l") > 0
    after = text[text.rindex("2 jobs: 1 done, 1 diverged") :]
    assert "report   multirun/" in after


# ---- enough is enough


def act(jobs: dict[int, str], tell: Send) -> RunStatus:
    """Ends as the job says."""
    tell("started")
    (state,) = jobs.values()
    return RunStatus(state, "why")


@pytest.mark.slow
def test_after_so_many_failures_no_other_is_started(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that diverged or was pruned has not failed."""
    states = ["diverged", "pruned", "failed", "done", "failed", "done", "failed"]
    jobs = [job(n, folder=tmp_path / str(n)) for n in range(len(states))]
    units = iter([[(one, state)] for one, state in zip(jobs, states, strict=True)])
    ended: list[int] = []
    scheduler = LocalScheduler(
        lambda: next(units, None),
        act,
        [{}],
        SweepProgress(len(states)),
        stop_after=2,
        on_job_end=lambda job, _: ended.append(job["number"]),
    )
    scheduler.run()
    assert ended == [0, 1, 2, 3, 4]
    assert directory.read_status(tmp_path / "5").state == "planned"
    assert scheduler.failures == 2
    assert [r.getMessage() for r in caplog.records].count(
        "2 jobs failed: no more jobs will be started (hydra.launcher.stop_after=2)"
    ) == 1


@pytest.mark.slow
def test_a_sweep_that_stopped_after_a_failure_is_taken_up_again(
    place: Place, kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["-m", *ONE, "student.epochs=10", "seed=0,1", "hydra.launcher.slots=1"]
    process = place.start(*words, "hydra.launcher.stop_after=1")
    place.wait(lambda: list(place.folder.glob("runs/*/history.csv")))
    (folder,) = place.runs()
    os.kill(json.loads((folder / "status.json").read_text())["pid"], signal.SIGKILL)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "1 job failed: no more jobs will be started (hydra.launcher.stop_after=1)" in out
    assert err == "kd: 2 of 2 jobs are not done: 1, 2\n"
    (sweep,) = place.folder.glob("multirun/*/*")
    assert pd.read_csv(sweep / "runs.csv")["status"].tolist() == ["killed", "planned"]
    monkeypatch.setattr("kd.report.figures.draw", lambda *_, **__: ([], []))
    monkeypatch.chdir(place.folder)
    assert kd(*words, "hydra.launcher.stop_after=1").code == 0
    assert [directory.read_status(path).state for path in place.runs()] == ["done", "done"]


@pytest.mark.slow
@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", "[1]"])
def test_the_number_of_failures_is_checked(value: str, kd: Callable) -> None:
    said = kd("-m", *ONE, "seed=0,1", f"hydra.launcher.stop_after={value}")
    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert "stop_after" in said.err
    assert list(Path().iterdir()) == []
