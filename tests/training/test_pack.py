"""Packed runs have the bits, files and ends that they have alone; not all runs go together."""

import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import PATIENCE, Place, run
from conftest import SWEPT as SMALL
from safetensors.torch import load_file

from kd.config.schema import run_dir
from kd.core.interleave import RunCache, Steps, run_interleaved
from kd.data import loader
from kd.runs import directory
from kd.sweep.scheduler import group_compatible_jobs
from kd.training import run as run_module
from kd.training.run import TrainingRun
from kd.training.teacher import TeacherForward

DROPPING = [*SMALL, "student.dropout=0.5"]
SWEEP = ["-m", *DROPPING, "method=logits", "method.T=1,4", "seed=0,1"]


@pytest.fixture
def _without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd.report.figures.draw", lambda *_, **__: ([], []))


@pytest.mark.slow
@pytest.mark.usefixtures("_without_figures")
def test_packed_runs_end_with_the_bits_and_files_that_they_have_alone(
    kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four runs of two seeds, with dropout and batch norm: in one pack, in two, and each alone."""
    packs = {"apart": (1, 1), "whole": (4, 1), "split": (2, 2)}
    place = Path.cwd()
    for name, (size, slots) in packs.items():
        (place / name).mkdir()
        monkeypatch.chdir(place / name)
        launcher = [f"hydra.launcher.jobs_per_worker={size}", f"hydra.launcher.slots={slots}"]
        said = kd(*SWEEP, *launcher)
        assert said.code == 0, said.err
        assert "4 jobs: 4 done" in said.out
    found = list(place.glob("apart/runs/logits-*"))
    assert len(found) == 4
    for path in found:
        alone = directory.load_result(path)
        assert alone
        assert alone["time"]["packed"] == 1
        for other in ("whole", "split"):
            packed = place / other / "runs" / path.name
            result = directory.load_result(packed)
            assert result
            assert result["time"]["packed"] == packs[other][0]
            assert result["metrics"] == alone["metrics"]
            weights = load_file(path / "student.safetensors")
            for name, value in load_file(packed / "student.safetensors").items():
                assert torch.equal(value, weights[name]), name
            rows = [
                pd.read_csv(p / "history.csv").drop(columns=["seconds", "images_per_second"])
                for p in (path, packed)
            ]
            pd.testing.assert_frame_equal(*rows)
            names = [{str(f.relative_to(p)) for f in p.rglob("*")} for p in (path, packed)]
            assert names[0] == names[1]
            assert "kd.log" in names[0]
            said = (packed / "kd.log").read_text()
            assert said.count("student  epoch") == 2, "another's lines"
            composed = (packed / ".hydra" / "config.yaml").read_text()
            assert composed == (path / ".hydra" / "config.yaml").read_text()


@pytest.mark.slow
def test_one_batch_and_one_teacher_pass_serve_all_of_a_seed(
    composed: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "method=logits", "batch_size=128"
    configs = [
        composed(*words, f"method.T={T}.0", f"seed={seed}") for T in (1, 2, 3) for seed in (0, 1)
    ]
    run(configs[0].as_teacher())
    shown, taught = [], []
    show, of = loader.views.apply_view, TeacherForward.of
    monkeypatch.setattr(loader.views, "apply_view", lambda *given: shown.append(1) or show(*given))
    monkeypatch.setattr(TeacherForward, "of", lambda self, x: taught.append(1) or of(self, x))
    shared = RunCache()
    ends = run_interleaved(
        [TrainingRun(config, cache=shared, packed=6).steps() for config in configs]
    )
    batches = (1437 - 200) // 128
    assert all(end["metrics"]["test_accuracy"] > 0 for end in ends)
    assert len(shown) == 2 * batches
    # Once a batch, and once a run to see whether the table still holds
    assert 2 * batches <= len(taught) <= 2 * batches + 2


@pytest.mark.slow
@pytest.mark.usefixtures("_without_figures")
def test_one_that_diverges_does_not_touch_the_others(kd: Callable) -> None:
    words = ["-m", *DROPPING, "method=standard"]
    pack = ["hydra.launcher.jobs_per_worker=3", "hydra.launcher.slots=1"]
    said = kd(*words, "optimizer.lr=0.05,1e30,0.01", *pack)
    assert said.code == 1
    assert "3 jobs: 2 done, 1 diverged" in said.out
    kept = {p: result for p in Path("runs").iterdir() if (result := directory.load_result(p))}
    assert [result["time"]["packed"] for result in kept.values()] == [3, 3]
    assert kd(*words, "optimizer.lr=0.05,0.01", "rerun=true", "hydra/launcher=basic").code == 0
    for path, before in kept.items():
        after = directory.load_result(path)
        assert after
        assert after["time"]["packed"] == 1
        assert after["metrics"] == before["metrics"]


@pytest.mark.slow
def test_an_interrupt_reaches_every_member(place: Place) -> None:
    words = [
        *DROPPING,
        "method=standard",
        "student.epochs=100000",
        "seed=0,1,2",
        "hydra.launcher.jobs_per_worker=3",
    ]
    process = place.start("-m", *words)
    place.wait(lambda: len([p for p in place.runs() if (p / "history.csv").exists()]) == 3)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert {directory.read_status(path).state for path in place.runs()} == {"killed"}
    assert not place.workers()


def test_an_interrupted_member_has_its_own_random_state() -> None:
    """Its checkpoint must hold the state of its own generators, not those of the member before."""
    drawn: dict[int, float] = {}

    def member(seed: int) -> Steps:
        torch.manual_seed(seed)
        try:
            while True:
                torch.rand(3)
                yield
        except KeyboardInterrupt:
            drawn[seed] = torch.rand(1).item()
            raise

    def interrupting() -> Steps:
        yield
        yield
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_interleaved([member(1), member(2), interrupting()])
    for seed in (1, 2):
        torch.manual_seed(seed)
        for _ in range(3):
            torch.rand(3)
        assert drawn[seed] == torch.rand(1).item()


def test_what_cannot_be_packed_runs_alone_and_why_is_said(
    composed: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    typed = [
        ["method=logits", "method.T=1.0"],
        ["method=logits", "method.T=2.0", "seed=1"],
        ["method=logits", "student.scale=2"],
        ["method=logits", "optimizer.lr=0.2", "schedule=cosine"],
        ["method=logits", "method.alpha=0.3", "seed=1"],
    ]
    # The same run twice: it waits, outside
    typed.append(["method=logits", "method.T=1.0", "tracker.notes=again"])
    configs = [composed(*words) for words in typed]
    jobs = [
        {"number": n, "config": c.to_dict(), "folder": str(run_dir(c))}
        for n, c in enumerate(configs)
    ]
    with caplog.at_level(logging.INFO):
        found = group_compatible_jobs(jobs, 8)
    assert [[job["number"] for job in pack] for pack in found] == [[0, 3, 1, 4], [2], [5]]
    assert "job 3 is not packed: no other job has the same student.scale" in caplog.text
    assert [len(pack) for pack in group_compatible_jobs(jobs, 3)] == [3, 1, 1, 1]


def test_members_take_turns_and_each_has_its_own_chance() -> None:
    def member(name: str, count: int) -> Iterator[None]:
        torch.manual_seed(7)
        drawn = []
        for _ in range(count):
            turns.append(name)
            drawn.append(torch.rand(1).item())
            yield
        if name == "b":
            raise ValueError("b fails")
        return drawn

    turns: list[str] = []
    a, b, c = run_interleaved([member("a", 3), member("b", 1), member("c", 2)])  # type: ignore[list-item]
    assert turns == ["a", "b", "c", "a", "c", "a"]
    assert isinstance(b, ValueError)
    assert a[:2] == c


def test_shared_keeps_only_the_last_of_a_kind() -> None:
    made: list[Any] = []
    shared = RunCache()
    for key in (1, 1, 2, 1):
        shared.get_or_create("images", key, lambda key=key: made.append(key))
    shared.get_or_create("step/10", 5, lambda: made.append("x"))
    shared.get_or_create("step/1", 5, lambda: made.append("y"))  # a name that begins like another's
    shared.get_or_create("step/10", 5, lambda: made.append("again"))
    assert made == [1, 2, 1, "x", "y"]
    shared.forget("step/")
    assert list(shared.entries) == ["images"]


@pytest.mark.slow
def test_a_second_run_of_a_process_reads_neither_images_nor_teacher_again(
    composed: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, loaded = RunCache(), []
    load = run_module.data.load
    monkeypatch.setattr(run_module.data, "load", lambda *given: loaded.append(1) or load(*given))
    for T in (1, 2, 3):
        config = composed("method=logits", f"method.T={T}.0")
        run(config, cache=shared)
        assert (
            json.loads((run_dir(config) / "result.json").read_text())["teacher"]["metrics"][
                "val_accuracy"
            ]
            >= 0
        )
    assert len(loaded) == 1, "nor for the teacher's own run"
