"""Interrupted runs on a fake W&B server that keeps what it is sent: every epoch is there once."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb_server import Server

from kd.runs import directory
from kd.training import tracking

EPOCHS = 4
WORDS = [
    "data=digits",
    "student.scale=1",
    f"student.epochs={EPOCHS}",
    "method=standard",
    "device=cpu",
    "threads=1",
    "tracker.timeout=300",
]


@pytest.mark.slow
def test_runs_of_like_ids_are_apart(
    kd: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "W"))
    for run_id, rate in (("exp10", 0.05), ("exp1", 0.01), ("[e]*", 0.02)):
        monkeypatch.setenv("WANDB_RUN_ID", run_id)
        assert kd(*WORDS, f"optimizer.lr={rate}", "student.epochs=1").code == 0
    kept = sorted(
        path.name.split("-", 3)[3] for path in (tmp_path / "W" / "wandb").glob("offline-run-*")
    )
    assert kept == ["[e]*", "exp1", "exp10"]
    for folder in Path("runs").iterdir():
        known = json.loads((folder / "wandb.json").read_text())
        assert (folder / known["offline"] / f"run-{known['id']}.wandb").exists()


@pytest.mark.slow
def test_a_run_that_cannot_note_its_id_goes_on(
    kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(tracking, "write_json", full)
    said = kd(*WORDS, "student.epochs=1")
    assert said.code == 0
    assert "No space left on device" in said.out
    assert len(list(Path("runs").glob("*/wandb/offline-run-*"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_an_interrupted_run_is_one_run_with_every_epoch_once(
    mode: str, server: Server, kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = directory.RunDirectory.append_epoch

    def stopped(after: int) -> Callable:
        def write(self: directory.RunDirectory, row: dict[str, Any]) -> None:
            epoch(self, row)
            if row["epoch"] == after:
                raise KeyboardInterrupt

        return write

    def sync() -> None:
        segments = [str(path) for path in Path("runs").glob("*/wandb/offline-run-*")]
        command = [sys.executable, "-m", "wandb", "sync", *segments]
        said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        assert "ERROR" not in said.stdout + said.stderr, "it ends with 0 even so"

    # all starts are of one second, and in time's order all the same
    monkeypatch.setattr(wandb.Settings, "timespec", "20260101_000000")
    for after in (2, 3):
        with monkeypatch.context() as patch:
            patch.setattr(directory.RunDirectory, "append_epoch", stopped(after))
            assert kd(*WORDS, f"tracker.mode={mode}").code == 130
        if mode == "offline":
            sync()
        (history,) = server.history.values()
        assert [history[line]["epoch"] for line in sorted(history)] == list(range(1, after)), (
            "what was told so far"
        )
    said = kd(*WORDS, f"tracker.mode={mode}")
    assert said.code == 0
    assert "Tried to log to step" not in said.out + said.err
    if mode == "offline":
        sync()
    ((name, history),) = server.history.items()
    rows = [history[line] for line in sorted(history)]
    assert [row["epoch"] for row in rows if "epoch" in row] == list(range(1, EPOCHS + 1))
    assert [row["_step"] for row in rows][:EPOCHS] == list(range(1, EPOCHS + 1))
    (folder,) = Path("runs").glob("standard-*")
    (segment,) = folder.glob("wandb/*run-*")
    seen = (
        {"url": f"{server.url}/me/kd/runs/{name}"}
        if mode == "online"
        else {"offline": f"wandb/{segment.name}"}
    )
    assert json.loads((folder / "wandb.json").read_text()) == {"id": name, **seen}
    assert len(list(folder.glob("wandb/superseded/*"))) == 2
