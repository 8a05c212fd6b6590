"""benchmarks/gpu.sh: packed images come back as they were; a failed part stops no other.

A part that fails is recorded.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu, packed_images

ROOT = Path(__file__).parents[2]


def test_packed_images_come_back_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    packed_images.pack(folder, tmp_path / "images.npz")
    count = packed_images.unpack(tmp_path / "images.npz", tmp_path / "again")
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.png")}
    after = {
        path.relative_to(tmp_path / "again"): path.read_bytes()
        for path in (tmp_path / "again").rglob("*.png")
    }
    assert after == before
    assert count == len(before)
    with np.load(tmp_path / "images.npz") as arrays:
        assert arrays["content"].dtype == np.uint8


def test_a_file_that_cannot_travel_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_images, "LIMIT", 1000)
    with pytest.raises(ValueError, match="the limit is"):
        packed_images.pack(folder, tmp_path / "images.npz")
    assert not (tmp_path / "images.npz").exists()
    with pytest.raises(ValueError, match="holds no images"):
        packed_images.pack(tmp_path, tmp_path / "images.npz")


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    names = np.frombuffer(b"../escaped.png", dtype=np.uint8)
    np.savez(tmp_path / "bad.npz", content=np.zeros(3, np.uint8), sizes=np.array([3]), names=names)
    with pytest.raises(ValueError, match="leads out of the folder"):
        packed_images.unpack(tmp_path / "bad.npz", tmp_path / "inside")
    assert not (tmp_path / "escaped.png").exists()


def test_a_failed_part_is_recorded_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(bench: gpu.Bench) -> dict[str, Any]:
        raise gpu.PartError("no such kernel")

    monkeypatch.setitem(gpu.PARTS, "device", gpu.Part(fail, 1))
    monkeypatch.setitem(gpu.PARTS, "tests", gpu.Part(lambda bench: {"tests": 3}, 1))
    monkeypatch.setattr(
        sys, "argv", ["gpu", "--dry", "--parts", "device,tests", "--out", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    parts = json.loads((tmp_path / "out" / "summary.json").read_text())["parts"]
    assert parts["device"]["error"] == "PartError: no such kernel"
    assert parts["tests"]["passed"]
    assert json.loads((tmp_path / "out" / "tests.json").read_text()) == {"tests": 3}


def test_a_part_that_hangs_is_ended(tmp_path: Path) -> None:
    bench = gpu.Bench("cpu", True, None, tmp_path, tmp_path, deadline=0.0)
    with pytest.raises(gpu.PartError, match="it did not end"):
        bench.python("-c", "import time; time.sleep(600)")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["--parts", "device,warp"], ["--device", "cuda:9", "--parts", "device"]]
)
def test_what_cannot_be_run_is_one_line(words: list[str], tmp_path: Path) -> None:
    command = ["bash", "benchmarks/gpu.sh", *words, "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
