"""A sweep whose processes are killed in the middle of training, and which loses nothing.

KD_KILLS=50 python -m pytest -m slow tests/sweep/test_torture.py -s     says how it went
"""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from conftest import Place
from safetensors.torch import load_file

from kd.core import io
from kd.runs import directory

KILLS = int(os.environ.get("KD_KILLS", "3"))
MANY = KILLS >= 20
JOBS, EPOCHS = 3 * max(1, KILLS // 8), 60 if MANY else 10
WORDS = [
    "-m", "data=digits", "teacher.epochs=2", "student.scale=2", "teacher.scale=2", "device=cpu",
    "threads=1", "tracker.mode=disabled", f"batch_size={32 if MANY else 64}",
    f"student.epochs={EPOCHS}",
    "method=standard,logits,feature", f"seed={','.join(map(str, range(JOBS // 3)))}",
    "hydra.sweep.dir=out",
]  # fmt: skip
LOCAL = ["hydra.launcher.slots=2", "hydra.launcher.max_retries=1000"]


def check(place: Place, done: dict[Path, int]) -> None:
    """Whatever was just killed: what is there is whole, and what was finished still is."""
    for path in place.folder.glob("runs/**/*.json"):
        json.loads(path.read_text())
    for path in place.folder.glob("runs/*/history.csv"):
        epochs = pd.read_csv(path)["epoch"].tolist()
        assert epochs == list(range(1, len(epochs) + 1)), f"{path}: {epochs}"
    for path in place.folder.glob("runs/*/checkpoints/*.pt"):
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # a worker that lives has written its next
            continue
        assert hashlib.sha256(content).hexdigest()[:16] == path.stem.rpartition("-")[2]
    for path in place.folder.glob("runs/*/student.safetensors"):
        load_file(path)
    for path, when in done.items():
        assert path.stat().st_mtime_ns == when, f"{path} was finished, and is gone or was run again"
    done |= {path: path.stat().st_mtime_ns for path in place.folder.glob("runs/*/result.json")}


def danger(
    place: Place, draw: random.Random, over: Callable[[], bool], writing: bool
) -> int | None:
    """Return at a moment of training, with the worker that is `writing` a checkpoint, if asked."""

    def epochs() -> int:
        return sum(path.stat().st_size for path in place.folder.glob("runs/*/history.csv"))

    before = epochs()
    place.wait(lambda: over() or epochs() > before)
    time.sleep(draw.uniform(0.0, 8.0 if MANY else 0.5))
    deadline = time.monotonic() + 5
    while writing and time.monotonic() < deadline and not over():
        for path in place.folder.glob("runs/*/checkpoints/.*.part"):
            return int(path.name.split(".")[-2])
        time.sleep(0.001)
    return None


def kill(place: Place, parent: subprocess.Popen, victim: int | None) -> str:
    """SIGKILL one of the workers, or the parent."""
    if victim is None:
        parent.kill()
        parent.communicate()
        place.wait(lambda: not place.workers(), 60)  # none is left behind
        return "parent"
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        return ""
    return "worker"


@pytest.mark.slow
@pytest.mark.timeout(6000)
def test_killed_again_and_again_it_ends_as_if_it_had_not_been(
    place: Place, kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd.report.figures.draw", lambda *_, **__: ([], []))
    said = kd(*WORDS, "hydra/launcher=basic")
    assert said.code == 0, said.err
    whole = Path.cwd()

    draw, killed, done = random.Random(KILLS), [], dict[Path, int]()
    parent = place.start(*WORDS, *LOCAL)
    while len(killed) < KILLS and parent.poll() is None:
        turn = len(killed)
        victim = danger(place, draw, lambda parent=parent: parent.poll() is not None, turn % 2 == 0)
        if turn % 3 != 1 and (workers := place.workers()):
            victim = victim if victim in workers else draw.choice(workers)
        else:
            victim = None
        killed_now = kill(place, parent, victim)
        killed += [killed_now] if killed_now else []
        check(place, done)
        if killed_now == "parent":
            parent = place.start(*WORDS, *LOCAL)
    _, err = parent.communicate(timeout=3000)
    assert parent.returncode == 0, err
    check(place, done)
    assert len(killed) > KILLS / 2, "it was over too soon"
    assert set(killed) == {"parent", "worker"}

    assert len(done) == JOBS + 1
    assert {directory.read_status(path).state for path in place.runs()} == {"done"}
    weights = list(whole.glob("runs/*/*.safetensors"))
    assert len(weights) > JOBS
    for path in weights:
        assert path.read_bytes() == (place.folder / path.relative_to(whole)).read_bytes()
    for name in ("summary", "history"):
        # and what depends on how many outputs of the teacher other runs, or it itself, had left
        times = ["train_seconds", "images_per_second", "seconds", "teacher_flops"]
        ends = [
            pd.read_csv(at / "out" / f"{name}.csv").drop(columns=times, errors="ignore")
            for at in (place.folder, whole)
        ]
        pd.testing.assert_frame_equal(*ends)
    assert not list(place.folder.glob("runs/**/*.part"))
    assert not list(place.folder.glob("runs/**/checkpoints"))
    assert not place.workers()

    said = [
        re.findall(r"student  epoch +\d+/", path.read_text())
        for path in place.folder.glob("runs/*/kd.log")
    ]
    # Epochs that were told and then lost; others were lost half done
    again = sum(map(len, said)) - JOBS * EPOCHS
    work = 1 + (again + 2 * len(killed)) / (JOBS * EPOCHS)
    print(
        f"{len(killed)} kills ({killed.count('parent')} of the parent), {JOBS} jobs, "
        f"{again} epochs told twice, ",
        end="",
    )
    print(f"at most {work:.2f} x the work")
    assert again >= 0
    assert work <= 1.5


def test_a_half_written_file_is_not_seen_and_is_removed(tmp_path: Path) -> None:
    def half(number: int) -> None:
        with io.atomic_write(tmp_path / "a.json") as part:
            part.write_text(str(number))
            if number == 2:
                raise KeyboardInterrupt

    half(1)
    with pytest.raises(KeyboardInterrupt):
        half(2)
    assert (tmp_path / "a.json").read_text() == "1"
    (tmp_path / ".a.json.77.part").write_text("of a process that was killed")
    io.remove_partial_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
