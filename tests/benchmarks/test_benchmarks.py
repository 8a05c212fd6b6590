"""The benchmarks run and say what they promise; how fast is theirs to say, never a test's."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from benchmarks import aggregate, plain, readme, throughput
from benchmarks import methods as library
from benchmarks.networks import MEAN, STD, network
from benchmarks.throughput import PATHS, memory, pictures
from kd.core import registry

ROOT = Path(__file__).parents[2]


def said_by(module: str, *words: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.{module}", "--device", "cpu", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment
    ).stdout


@pytest.mark.slow
def test_throughput_compares_both_loops_on_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The memory of each path is that of a process of its own; here each loop is measured once."""
    measured: dict[bool, int] = {}

    def once(words: list[str], asked: Any) -> int:
        ours = "--kept" in words
        return measured.get(ours) or measured.setdefault(ours, memory(words, asked))

    out = tmp_path / "throughput.json"
    words = [
        "--images",
        "600",
        "--steps",
        "2",
        "--repeats",
        "1",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", ["throughput", *words])
    monkeypatch.setattr(throughput, "memory", once)
    monkeypatch.setattr(throughput.devices, "configure_process", lambda _: None)
    throughput.main()
    said = capfd.readouterr().out
    found = json.loads(out.read_text())
    assert [row["path"] for row in found["rows"]] == [path.title for path in PATHS]
    for row, path in zip(found["rows"], PATHS, strict=True):
        assert row["ratio"] > 0
        assert row["path"] in said
        taught = {"teacher"} if path.teacher else set()
        assert (
            set(row["ms_a_step"]) == {"data", "forward", "loss", "backward", "optimizer"} | taught
        )
        assert (row["disk_mb"] > 0) == bool(path.teacher)
        assert min(row["memory_mb"].values()) > 100 or not Path("/proc/self/smaps_rollup").exists()
    assert found["environment"]["device"] == "cpu"


@pytest.mark.slow
def test_a_sweep_is_compared_with_as_many_plain_runs(tmp_path: Path) -> None:
    out = tmp_path / "sweep.json"
    words = [
        "--images",
        "300",
        "--epochs",
        "1",
        "--plain-runs",
        "1",
        "--temperatures",
        "1",
        "--starts",
        "1",
    ]
    said = said_by("sweep", *words, "--out", str(out))
    found = json.loads(out.read_text())
    assert len(found["plain_seconds"]) == 1
    for row in found["rows"]:
        assert row["ratio"] == pytest.approx(
            4 * found["plain_seconds"][0] / row["seconds"], rel=0.02
        )
        assert row["disk_mb"] > 0
        assert row["path"] in said
    assert found["startup_seconds"] > 0
    assert found["imported_for_nothing"] == [], "a run does not need these"
    throughput = json.loads((ROOT / "benchmarks" / "throughput.json").read_text())
    assert readme.section(throughput, found).count(", command to report | ") == 2


@pytest.mark.slow
def test_a_report_on_many_runs_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "aggregate.json"
    monkeypatch.setattr(sys, "argv", ["aggregate", "--runs", "33", "--out", str(out)])
    aggregate.main()
    found = json.loads(out.read_text())
    assert found["runs"] == 33
    assert found["seconds"] > 0
    assert found["memory_mb"] > 50
    assert "33 runs of 15 epochs: " in capfd.readouterr().out


def test_the_plain_loop_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a reference: what it is timed on must be a training.

    There are two classes, told apart by brightness.
    """
    monkeypatch.setattr(
        torch.utils.data.DataLoader,
        "__init__",
        _without_workers(torch.utils.data.DataLoader.__init__),
    )
    torch.manual_seed(0)
    labels = torch.arange(256) % 2
    images = (torch.rand(256, 32, 32, 3) * 60 + labels[:, None, None, None] * 120).to(torch.uint8)
    found = plain.Images(images, labels, MEAN, STD)
    steps = plain.steps(network(2), network(4), None, found, 64, torch.device("cpu"), alpha=1.0)
    losses = [next(steps) for _ in range(24)]
    assert sum(losses[-4:]) < 0.3 * sum(losses[:4])


def _without_workers(init):  # type: ignore[no-untyped-def]
    return lambda self, *given, **said: init(
        self, *given, **(said | {"num_workers": 0, "persistent_workers": False})
    )


def test_performance_page_says_what_was_measured() -> None:
    text = (ROOT / "docs" / "performance.md").read_text()
    assert readme.written(text, readme.measured()) == text, (
        "python -m benchmarks.readme writes it anew"
    )
    numbers = re.findall(r"\*\*(\d+\.\d)×\*\*", text)
    assert len(numbers) == len(PATHS) + 2


def test_pictures_are_the_same_for_both() -> None:
    a, b = pictures(10), pictures(10)
    assert torch.equal(a.images, b.images)


@pytest.mark.slow
def test_the_cost_of_every_method_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "methods.json"
    words = [
        "--images",
        "128",
        "--steps",
        "1",
        "--repeats",
        "1",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", ["methods", *words])
    library.main()
    found = json.loads(out.read_text())
    assert found["rows"]["standard"]["ratio"] == 1
    assert all(row["ratio"] > 0 and row["ms"] > 0 for row in found["rows"].values())
    assert found["rows"]["reviewkd"]["parameters"] > found["rows"]["feature"]["parameters"] > 0
    assert set(found["rows"]) <= set(registry.choices("methods"))
    assert len(capfd.readouterr().out.splitlines()) == len(found["rows"])


def test_the_page_of_methods_is_what_their_files_say() -> None:
    text = library.page(json.loads(library.MEASURED.read_text()), library.kept_runs())
    assert library.PAGE.read_text() == text, "python -m benchmarks.methods --page writes it anew"


def test_runs_of_several_sweeps_are_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later of two of one method and seed counts.

    What diverged or was not run is said, and not left out.
    """
    monkeypatch.setattr(library, "TABLE", tmp_path / "methods.csv")

    def runs(*rows: tuple[str, int, str, float]) -> pd.DataFrame:
        same = {
            "student": "cnn-16",
            "epochs": 15,
            "budget": "15 x 100",
            "overrides": "data.root=/a/path",
        }
        some = [
            {
                "method": m,
                "setting": f"{m} x=1",
                "seed": s,
                "status": state,
                "test_accuracy": a,
                "val_accuracy": a,
                "teacher": "cnn-32",
                "teacher_test_accuracy": 0.85,
                **same,
            }
            for m, s, state, a in rows
        ]
        return pd.DataFrame(some)

    library.merge(
        runs(
            ("standard", 0, "done", 0.8),
            ("logits", 0, "done", 0.1),
            ("dkd", 0, "diverged", math.nan),
        )
    )
    library.merge(
        runs(
            ("logits", 0, "done", 0.82),
            ("logits", 1, "done", 0.84),
            ("standard", 1, "done", 0.81),
            ("feature", 0, "failed", math.nan),
        )
    )
    library.merge(runs(("dkd", 0, "done", 0.79)), "optimizer.lr=0.01")
    kept = library.kept_runs()
    assert "a/path" not in library.TABLE.read_text()
    assert len(kept) == 6
    text = library.page(json.loads(library.MEASURED.read_text()), kept)
    lines = [line for line in text.splitlines() if line.startswith("| [`")]
    cells = {line.split("`")[1]: [cell.strip() for cell in line.split("|")[4:-1]] for line in lines}
    half = 0.127062 / (0.83 * 0.17)  # Student's t for 2 values, on the scale of logits
    low, high = (100 / (1 + 0.17 / 0.83 * math.exp(sign * half)) for sign in (1, -1))
    assert cells["logits"][:4] == ["2", "83.00", f"83.00 ({low:.2f} to {high:.2f})", "+2.50"]
    assert cells["standard"][:2] == ["2", "80.50"]
    assert cells["dkd"][2] == "diverged"
    assert cells["feature"][2] == "not run yet"
    assert "| with `optimizer.lr=0.01` |  |  | 1 | 79.00 | 79.00 | -1.00 |" in text
    assert "method=dkd optimizer.lr=0.01 seed=0" in text
    assert "method=logits,standard seed=1,2" in text


@pytest.mark.slow
def test_the_documented_method_is_added_by_three_files(tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("no git")
    text = (ROOT / "docs" / "adding-a-method.md").read_text()
    (tmp_path / "adding.diff").write_text(text.partition("```diff\n")[2].partition("```\n")[0])
    place = tmp_path / "kd"
    shutil.copytree(
        ROOT, place, ignore=shutil.ignore_patterns(".*", "multirun", "__pycache__", "*.egg-info")
    )
    subprocess.run(
        ["git", "apply", "-v", "../adding.diff"], cwd=place, check=True, capture_output=True
    )
    environment = {**os.environ, "PYTHONPATH": str(place)}
    wanted = ["tests/methods/test_methods.py", "tests/methods/test_library.py"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n0",
        *wanted,
        "-k",
        "mse or every_method_has",
    ]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
