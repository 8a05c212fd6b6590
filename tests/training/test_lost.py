"""What a machine does to a run: full disks, unwritable folders, and rivals for the same thing."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, Place, run
from safetensors.torch import load_file

from kd.config.schema import run_dir
from kd.core import io
from kd.core.errors import UserError
from kd.runs import directory

WORDS = [
    "data=digits",
    "student.scale=1",
    "teacher.scale=1",
    "student.epochs=2",
    "teacher.epochs=1",
    "device=cpu",
]
WORDS += ["method=logits"]


# ---- disks


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["/proc/nowhere", "/dev/null/x"])
def test_a_cache_that_cannot_be_written_costs_time_only(
    cache: str, kd: Callable, monkeypatch: Any
) -> None:
    monkeypatch.setenv("KD_CACHE", cache)
    said = kd(*WORDS)
    assert said.code == 0
    assert f"cannot write the decoded images to {cache} (" in said.out


@pytest.mark.slow
def test_runs_that_cannot_be_written_are_refused(kd: Callable) -> None:
    Path("file").write_text("")
    for place in ("/proc/x", "file", "a" * 300, "file/x"):
        said = kd(*WORDS, f"paths.runs={place}")
        assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
        assert said.err.startswith("kd: cannot write to ")
        assert "choose another folder with paths.runs=PATH" in said.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kilobytes", "code", "lines"),
    [
        (
            40,
            0,
            [
                "cannot write checkpoints to ",
                "outputs cannot be cached in ",
                "; training continues",
            ],
        ),
        (
            12,
            2,
            [
                "kd: paths.runs: cannot write to ",
                "(File too large); the result is lost: no space elsewhere",
            ],
        ),
        (1, 2, ["kd: cannot write to "]),
    ],
)
def test_a_disk_becomes_full(kilobytes: int, code: int, lines: list[str], tmp_path: Path) -> None:
    """Files may not grow beyond a limit: what fits is kept, what does not is named.

    Nothing is half written.
    """
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kilobytes, resource.RLIM_INFINITY))

    done = subprocess.run(
        [sys.executable, "-m", "kd", *WORDS],
        cwd=tmp_path,
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    for line in lines:
        assert line in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.part"))
    found = list(tmp_path.glob("runs/*/result.json"))
    assert len(found) == (2 if code == 0 else 0)
    for path in tmp_path.glob("runs/*/student.safetensors"):
        load_file(path)


def full(folder: Path, monkeypatch: pytest.MonkeyPatch, *spared: str) -> None:
    """From now on nothing can be written below `folder` but files of these names."""
    replace = os.replace

    def refuse(source: Any, target: Any) -> None:
        if Path(target).is_relative_to(folder) and Path(target).name not in spared:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr("kd.core.io.os.replace", refuse)


@pytest.mark.slow
def test_a_result_for_which_there_is_no_room_is_kept_elsewhere(
    composed: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = composed("method=feature", "student.epochs=2")
    run(config.as_teacher())
    (tmp_path / "other").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "other"))
    full(run_dir(config), monkeypatch, "status.json", "config.yaml")
    with pytest.raises(
        UserError,
        match=r"No space left on device\); the finished run was saved to .*; free some space",
    ) as told:
        run(config)
    monkeypatch.undo()
    assert directory.load_result(run_dir(config)) is None
    assert directory.read_status(run_dir(config)).reason == str(told.value)
    (kept,) = (tmp_path / "other").iterdir()
    names = {path.name for path in kept.iterdir()}
    assert names >= {
        "result.json",
        "history.csv",
        "config.yaml",
        "student.safetensors",
        "method.safetensors",
        "test_outputs.safetensors",
    }
    for path in kept.iterdir():  # as the message says
        path.rename(run_dir(config) / path.name)
    assert (
        run(config)["metrics"]
        == json.loads((run_dir(config) / "result.json").read_text())["metrics"]
    )


def test_a_history_for_which_there_was_no_room_is_written_when_there_is(
    composed: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = composed("method=standard", "student.epochs=3")
    caplog.set_level(logging.WARNING)

    def tell(kind: str, row: dict[str, Any]) -> bool:
        monkeypatch.undo()
        if row["epoch"] == 1:
            full(run_dir(config), monkeypatch)
        return False

    run(config, report=tell)
    assert (
        "history.csv cannot be written (No space left on device); training continues" in caplog.text
    )
    assert "cannot write checkpoints to" in caplog.text
    assert len((run_dir(config) / "history.csv").read_text().splitlines()) == 4


# ---- others


BUILD = """
import os, sys, time
from pathlib import Path
import torch
from kd.data.base import Arrays
from kd.data.cache import cached
folder = Path(sys.argv[1])

def decode():
    print("decodes", flush=True)
    time.sleep(float(sys.argv[2]))
    x, y = torch.full((8, 4, 4, 3), 7, dtype=torch.uint8), torch.arange(8)
    return Arrays(x, y, x.clone(), y.clone())

found = cached(folder, "key", decode)
assert found.train_images.eq(7).all() and found.train_labels.tolist() == list(range(8))
print("has it", flush=True)
"""


@pytest.mark.slow
def test_images_are_decoded_by_one_of_many_and_a_dead_one_is_replaced_at_once(
    tmp_path: Path,
) -> None:
    def start(seconds: float) -> subprocess.Popen:
        command = [sys.executable, "-c", BUILD, str(tmp_path / "cache"), str(seconds)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    first = start(60.0)
    assert first.stdout is not None
    assert first.stdout.readline() == "decodes\n"
    others = [start(0.5) for _ in range(3)]
    (tmp_path / "cache" / ".key.safetensors.1.part").write_bytes(b"half")
    time.sleep(4)  # they wait
    first.kill()
    killed = time.monotonic()
    said = [process.communicate(timeout=PATIENCE)[0] for process in others]
    assert time.monotonic() - killed < 60  # not a time after which a lock is taken to be stale
    first.communicate()
    assert sorted(said) == ["decodes\nhas it\n", *["has it\n"] * 2]
    assert not list((tmp_path / "cache").glob("*.part"))


@pytest.mark.slow
def test_a_teacher_whose_trainer_dies_is_trained_on_by_another_at_once(place: Place) -> None:
    words = [*WORDS, "teacher.epochs=8", "threads=1", "tracker.mode=disabled"]
    first = place.start(*words, "seed=0")
    place.wait(lambda: list(place.folder.glob("runs/standard-*/checkpoints/*.pt")))
    first.send_signal(signal.SIGSTOP)  # it is alive, but does not end before the others wait
    (teacher,) = place.folder.glob("runs/standard-*")
    others = [place.start(*words, f"seed={seed}") for seed in (1, 2)]
    place.wait(lambda: len(list(place.folder.glob("runs/logits-*/status.json"))) == 3)
    time.sleep(1)
    assert directory.load_result(teacher) is None, "too quick to be killed"
    first.send_signal(signal.SIGKILL)
    said = [process.communicate(timeout=PATIENCE) for process in others]
    assert [process.returncode for process in others] == [0, 0], said
    assert sum("teacher: resuming after epoch" in out for out, _ in said) == 1
    assert sum("teacher: found in" in out for out, _ in said) == 1
    result = directory.load_result(teacher)
    assert result is not None
    assert result["time"]["resumed"] == 1
    assert (teacher / "history.csv").read_text().count("\n") == 9
    assert (
        directory.read_status(next(place.folder.glob("runs/logits-cnn-1-s0-*"))).state == "killed"
    )


def test_a_file_is_synchronised_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr("kd.core.io.os.fsync", lambda fd: order.append("sync") or sync(fd))
    monkeypatch.setattr(
        "kd.core.io.os.replace", lambda a, b: order.append("rename") or replace(a, b)
    )
    io.write_json(tmp_path / "a.json", {"a": 1})
    assert order == ["sync", "rename"]
    assert io.read_json(tmp_path / "a.json") == {"a": 1}
