"""A sweep whose processes are killed at random moments, many times, and which loses nothing.

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
from pathlib import Path

import pandas as pd
import pytest
from conftest import Place
from safetensors.torch import load_file

from kd.core import io
from kd.runs import directory

KILLS = int(os.environ.get("KD_KILLS", "5"))
JOBS, EPOCHS = 3 * max(2, KILLS // 8), 30 if KILLS < 20 else 60
SWEEP = [
    "-m", "data=digits", "teacher.epochs=2", "student.scale=2", "teacher.scale=2", "device=cpu",
    "threads=1", "tracker.mode=disabled", "batch_size=32", f"student.epochs={EPOCHS}",
    "method=standard,logits,feature", f"seed={','.join(map(str, range(JOBS // 3)))}",
    "hydra.sweep.dir=out", "hydra.launcher.slots=2", "hydra.launcher.max_retries=1000",
]  # fmt: skip


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


def kill(place: Place, parent: subprocess.Popen, draw: random.Random) -> str:
    """SIGKILL the parent, or one of its workers."""
    workers = place.workers()
    if not workers or draw.random() < 0.3:
        parent.kill()
        parent.communicate()
        place.wait(lambda: not place.workers(), 60)  # none is left behind
        return "parent"
    try:
        os.kill(draw.choice(workers), signal.SIGKILL)
    except ProcessLookupError:
        return ""
    return "worker"


@pytest.mark.slow
@pytest.mark.timeout(6000)
def test_killed_again_and_again_it_ends_as_if_it_had_not_been(place: Place, tmp_path: Path) -> None:
    whole = Place(tmp_path / "whole")
    process = whole.start(*SWEEP)
    process.communicate(timeout=3000)
    assert process.returncode == 0

    draw, killed, done = random.Random(KILLS), [], dict[Path, int]()
    parent = place.start(*SWEEP)
    while len(killed) < KILLS and parent.poll() is None:
        place.wait(lambda parent=parent: place.workers() or parent.poll() is not None)
        time.sleep(draw.uniform(0.2, 8.0))
        killed.append(kill(place, parent, draw))
        check(place, done)
        if killed[-1] == "parent":
            parent = place.start(*SWEEP)
    _, err = parent.communicate(timeout=3000)
    assert parent.returncode == 0, err
    check(place, done)
    assert len(killed) > KILLS / 2, "it was over too soon"

    assert len(done) == JOBS + 1
    assert {directory.read_status(path).state for path in place.runs()} == {"done"}
    for path in whole.folder.glob("runs/*/*.safetensors"):
        assert path.read_bytes() == (place.folder / path.relative_to(whole.folder)).read_bytes()
    for name in ("summary", "history"):
        times = ["train_seconds", "images_per_second", "seconds"]
        ends = [
            pd.read_csv(at.folder / "out" / f"{name}.csv").drop(columns=times, errors="ignore")
            for at in (place, whole)
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
