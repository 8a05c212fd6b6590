"""A W&B server that is not there, is slow, answers errors or goes away.

The training goes on, and nothing is lost.
"""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL
from wandb_server import Server

from kd.runs import directory
from kd.training import wandb_run

WORDS = [*SMALL, "threads=1", "method=standard", "student.epochs=3"]
ABOUT = wandb_run.RunSettings("run", "student")
STATUS = {"401": 401, "403": 403, "404": 404, "409": 409, "500": 500}


def sync(*options: str) -> None:
    segments = [str(path) for path in Path("runs").glob("*/wandb/*run-*")]
    assert len(segments) == 1
    command = [sys.executable, "-m", "wandb", "sync", *options, *segments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    assert "ERROR" not in done.stdout + done.stderr, "it ends with 0 even so"


def check(server: Server) -> None:
    """The server has all of the one run."""
    (path,) = Path("runs").glob("*/result.json")
    result = directory.load_result(path.parent)
    assert result is not None
    ((id_, run),) = server.runs.items()
    assert directory.read_json(path.parent / "wandb.json")["id"] == id_
    assert run.epochs() == [1, 2, 3]
    assert "test/confusion_table" in {name for row in run.rows() for name in row}
    assert run.summary["val/accuracy"] == result["metrics"]["val_accuracy"]
    assert run.config["method"]["name"] == "standard"
    assert run.state == "finished"


def break_(server: Server, how: str) -> None:
    if how == "slow":
        server.gate.clear()
    elif how == "gone":
        server.go_away()
    else:
        server.errors["*"] = STATUS[how], "not for you"


def mend(server: Server) -> None:
    server.gate.set()
    server.come_back()
    server.errors.clear()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["refused", "slow", "401", "403", "500"])
def test_what_a_server_refuses_is_whole_offline(
    how: str, server: Server, kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "refused":
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    else:
        break_(server, how)
    said = kd(*WORDS, "tracker.timeout=2")
    assert said.code == 0
    assert said.out.count("logging offline") == 1
    assert "in use" not in said.out + said.err
    assert "wandb:" not in said.out + said.err, "W&B itself prints nothing"
    mend(server)
    server.runs.clear()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    sync()
    check(server)


@pytest.mark.slow
def test_an_error_in_the_middle_of_a_start_is_not_the_end(server: Server, kd: Callable) -> None:
    server.errors["UpsertBucket"] = 404, "project not found"
    assert kd(*WORDS, "tracker.timeout=300").code == 0
    mend(server)
    sync()
    check(server)


@pytest.mark.slow
def test_an_interrupted_run_keeps_its_id_when_the_server_is_gone(
    server: Server, kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = directory.RunDirectory.append_epoch

    def stopped(self: directory.RunDirectory, row: dict[str, Any]) -> None:
        epoch(self, row)
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(directory.RunDirectory, "append_epoch", stopped)
        assert kd(*WORDS, "tracker.timeout=300").code == 130
    server.go_away()
    assert kd(*WORDS, "tracker.timeout=2").code == 0
    mend(server)
    sync()
    check(server)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["slow", "401", "gone"])
def test_a_server_that_goes_away_takes_nothing_along(
    how: str, server: Server, kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = directory.RunDirectory.append_epoch

    def breaking(self: directory.RunDirectory, row: dict[str, Any]) -> None:
        epoch(self, row)
        if row["epoch"] == 2:
            break_(server, how)

    monkeypatch.setattr(directory.RunDirectory, "append_epoch", breaking)
    monkeypatch.setattr(wandb_run, "FINISH_FACTOR", 0.05)
    said = kd(*WORDS, "tracker.timeout=300")
    assert said.code == 0
    note = (
        "some of the data did not reach the server; to upload it: wandb sync --include-online runs/"
    )
    assert said.out.count(note) == 1
    mend(server)
    sync("--include-online")
    check(server)


@pytest.mark.parametrize(("timeout", "seconds"), [(1, 20), (5, 20), (15, 60), (100, 400)])
def test_the_end_of_a_run_is_bounded(
    timeout: int, seconds: int, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float | None] = []
    finish_within = wandb_run._finish_within

    def finish(run: Any, code: int, most: float | None) -> bool:
        waited.append(most)
        return finish_within(run, code, 300)

    monkeypatch.setattr(wandb_run, "_finish_within", finish)
    with wandb_run.started(
        record_settings().model_copy(update={"timeout": timeout}), tmp_path, ABOUT
    ) as run:
        pass
    assert waited == [None if run.offline else seconds]


def test_a_finish_that_never_ends_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, killed = threading.Event(), []

    class Run:
        def finish(self, exit_code: int) -> None:
            ended.wait()

    monkeypatch.setattr(wandb_run, "_kill_service", killed.append)
    run = Run()
    assert not wandb_run._finish_within(run, 0, 0.1)
    assert killed == [run]
    ended.set()


@pytest.mark.slow
def test_a_server_that_takes_all_is_not_doubted(server: Server, kd: Callable) -> None:
    said = kd(*WORDS, "tracker.timeout=300")
    check(server)
    assert "did not take" not in said.out
    assert f"W&B      {server.url}/me/kd/runs/" in said.out


@pytest.mark.slow
def test_the_runs_beside_one_that_fails_to_start_go_on(server: Server, tmp_path: Path) -> None:
    """As in a pack: a new service would end them."""
    settings = record_settings()
    first = wandb_run.RunSettings("first", "student")
    second = wandb_run.RunSettings("second", "student")
    with wandb_run.started(settings, tmp_path / "a", first) as one:
        server.errors["UpsertBucket"] = 403, "full"
        with wandb_run.started(settings, tmp_path / "b", second) as other:
            assert other.offline
            one.log({"x": 1})
        server.errors.clear()
    assert server.runs[first.id].state == "finished"
    assert [row["x"] for row in server.runs[first.id].rows()] == [1]


@pytest.mark.slow
def test_a_known_run_keeps_its_id_beside_one_that_found_no_server(
    server: Server, tmp_path: Path
) -> None:
    """As in a pack that is started again when the server is gone.

    An id that was tried in vain could not be kept.
    """
    settings = record_settings().model_copy(update={"timeout": 2})
    server.go_away()
    with (
        wandb_run.started(
            settings, tmp_path / "a", wandb_run.RunSettings("first", "student", id="a", resume=True)
        ) as one,
        wandb_run.started(
            settings,
            tmp_path / "b",
            wandb_run.RunSettings("second", "student", id="b", resume=True),
        ) as other,
    ):
        assert [(run.id, run.offline) for run in (one, other)] == [("a", True), ("b", True)]


def record_settings() -> Any:
    from kd.core.execution import TrackerSettings

    names = dict.fromkeys(("project", "entity", "group", "tags", "notes"))
    return TrackerSettings(mode="online", **names, samples=0, artifacts=False, timeout=300)
