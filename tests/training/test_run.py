"""Whole runs, as typed: what they leave, that they repeat bit for bit and are not done twice."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run

import kd as package
from kd.config.schema import run_dir
from kd.core.errors import UserError
from kd.core.io import read_json
from kd.report.images import load_outputs
from kd.runs.directory import TEST_OUTPUTS, RunDirectory, archive_previous_run, load_result
from kd.training import finalize, metrics, wandb_run

SMALL = [
    "data=digits",
    "student.epochs=2",
    "teacher.epochs=1",
    "student.scale=2",
    "teacher.scale=2",
    "device=cpu",
]
SMALL += ["threads=1"]


def result(runs: str, method: str) -> dict:
    (folder,) = Path(runs).glob(f"{method}-cnn-2-s[01]-*")
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["standard", "feature"])
def test_the_same_command_gives_the_same_bits_and_another_seed_does_not(
    method: str, kd: Callable
) -> None:
    for runs in ("a", "b"):
        assert kd(*SMALL, f"method={method}", f"paths.runs={runs}").code == 0
    assert kd(*SMALL, f"method={method}", "paths.runs=c", "seed=1").code == 0
    a, b, c = (result(runs, method) for runs in "abc")
    assert a["metrics"] == b["metrics"]
    assert a["id"] == b["id"] != c["id"]
    assert a["metrics"] != c["metrics"]
    weights = [
        next(Path(runs).glob(f"{method}-cnn-2-s0-*/student.safetensors")).read_bytes()
        for runs in "ab"
    ]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(kd: Callable) -> None:
    said = kd(*SMALL, "method=feature")
    assert said.code == 0
    (folder,) = Path("runs").glob("feature-*")
    names = {
        "result.json",
        "history.csv",
        "student.safetensors",
        "method.safetensors",
        "test_outputs.safetensors",
        "config.yaml",
        "kd.log",
    }
    assert names <= {p.name for p in folder.iterdir()}
    assert (folder / ".hydra" / "config.yaml").exists()
    assert not list(Path().rglob("*.part"))
    found = result("runs", "feature")
    expected = {
        "test_accuracy",
        "test_nll",
        "test_brier",
        "test_ece",
        "test_agreement",
        "test_teacher_kl",
        "val_accuracy",
    }
    assert expected <= set(found["metrics"])
    assert found["size"] == {"params": 17_428, "macs": 164_480, "method_params": 20}
    assert found["samples"] == {"train": 1237, "val": 200, "test": 360}
    assert found["environment"]["torch"] == torch.__version__
    assert found["config"]["method"]["T"] == 4.0
    history = pd.read_csv(folder / "history.csv")
    assert history["epoch"].tolist() == [1, 2]
    assert {
        "loss",
        "hard",
        "feature",
        "soft",
        "val_accuracy",
        "val_teacher_kl",
        "lr",
        "seconds",
    } <= set(history.columns)
    assert read_json(folder / "status.json")["state"] == "done"
    for line in (
        "teacher  cnn-2",
        "student  cnn-2",
        "baseline standard   not run yet",
        f"files    {folder}",
    ):
        assert line in said.out
    assert "epoch 2/2" in (folder / "kd.log").read_text()


@pytest.mark.slow
def test_load_gives_the_student_that_was_measured(kd: Callable) -> None:
    assert kd(*SMALL, "method=standard").code == 0
    (folder,) = Path("runs").glob("standard-*")
    student = package.load(folder)
    assert not student.training
    from kd import data
    from kd.data.digits import Config

    config = Config(**result("runs", "standard")["config"]["data"])
    test = data.find("digits").read(config)
    with torch.no_grad():
        logits = student(student.preprocess(test.test_images))
    accuracy = (logits.argmax(1) == test.test_labels).double().mean().item()
    assert accuracy == result("runs", "standard")["metrics"]["test_accuracy"]
    assert student.classes == tuple("0123456789")
    with pytest.raises(UserError, match="no finished run here"):
        package.load("nowhere")


@pytest.mark.slow
def test_a_command_repeated_is_not_trained_again_unless_asked(kd: Callable) -> None:
    words = [*SMALL, "method=logits"]
    assert "teacher  epoch 1/1" in kd(*words).out
    first = result("runs", "logits")
    again = kd(*words)
    assert again.code == 0
    assert "student: found in" in again.out
    assert "epoch" not in again.out.replace("epochs)", "")
    assert result("runs", "logits") == first
    other = kd(*words, "method.T=2", "seed=1")
    assert "teacher: found in" in other.out
    assert "student  epoch" in other.out
    rerun = kd(*words, "rerun=true")
    assert "student  epoch 2/2" in rerun.out
    assert "teacher: found in" in rerun.out
    (kept,) = Path("runs").glob("logits-cnn-2-s0-*/superseded/1/result.json")
    assert json.loads(kept.read_text()) == first


@pytest.mark.slow
def test_the_gap_is_told_once_the_baseline_is_there(kd: Callable) -> None:
    assert kd(*SMALL, "method=standard").code == 0
    said = kd(*SMALL, "method=logits")
    assert "baseline standard   test" in said.out
    assert "points" in said.out


@pytest.mark.slow
def test_weights_of_ones_own_can_teach(kd: Callable) -> None:
    assert kd(*SMALL, "method=standard").code == 0
    (weights,) = Path("runs").glob("standard-*/student.safetensors")
    weights.rename("mine.safetensors")
    words = [*SMALL, "method=logits", "teacher.checkpoint=mine.safetensors", "teacher.dropout=0.2"]
    said = kd(*words)
    assert said.code == 0
    assert "teacher  epoch" not in said.out
    assert result("runs", "logits")["teacher"]["source"] == "mine.safetensors"


@pytest.mark.slow
def test_a_teacher_with_nothing_to_teach_is_told(kd: Callable) -> None:
    words = [*SMALL, "teacher.epochs=1", "teacher.optimizer.lr=1e-9", "student.epochs=3"]
    assert kd(*words, "method=standard").code == 0
    assert "the teacher is no better, so expect no gain" in kd(*words, "method=logits").out


@pytest.mark.slow
def test_a_teacher_whose_weights_changed_is_refused(kd: Callable) -> None:
    assert kd(*SMALL, "method=logits").code == 0
    (weights,) = Path("runs").glob("standard-cnn-2-s1000-*/student.safetensors")
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(weights)
    tensors["stages.head.1.weight"] = tensors["stages.head.1.weight"].flip(0).contiguous()
    card = json.loads(metadata["kd"])
    for kept, line in (
        (card, "is damaged"),
        (
            {k: v for k, v in card.items() if k != "sha256"},
            "it had when it was trained; its weights or the data",
        ),
    ):
        save_file(tensors, weights, {"kd": json.dumps(kept)})
        said = kd(*SMALL, "method=logits", "seed=1")
        assert said.code == 2
        assert line in said.err


@pytest.mark.slow
def test_a_sweep_ends_in_a_table_whatever_happens_to_its_jobs(kd: Callable) -> None:
    said = kd(
        "-m",
        *SMALL,
        "method=standard",
        "optimizer.lr=0.05,1e30",
        "seed=0,1",
        "hydra.sweep.dir=sweep",
    )
    assert said.code == 1
    assert "4 jobs: 2 done, 2 diverged" in said.out
    assert said.err == "kd: 2 of 4 jobs are not done: 3, 4\n"
    runs = pd.read_csv("sweep/runs.csv")
    assert runs["status"].tolist() == ["done", "done", "diverged", "diverged"]
    assert runs["reason"].tolist()[2].startswith("epoch 1, step ")
    summary = pd.read_csv("sweep/summary.csv")
    assert summary["setting"].tolist() == ["standard optimizer.lr=0.05"]
    assert summary["n"].tolist() == [2]
    again = kd(
        "-m",
        *SMALL,
        "method=standard",
        "optimizer.lr=0.05,1e30",
        "seed=0,1",
        "hydra.sweep.dir=again",
    )
    assert again.out.count("found in") == 2


@pytest.mark.slow
def test_without_validation_images(kd: Callable) -> None:
    assert kd(*SMALL, "method=logits", "data.val_size=0").code == 0
    found = result("runs", "logits")
    assert not [name for name in found["metrics"] if name.startswith("val_")]
    assert found["samples"] == {"train": 1437, "val": 0, "test": 360}


# ---- Weights & Biases


@pytest.mark.slow
def test_an_offline_mirror_says_where_to_look(
    kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(Path().absolute()))  # no key
    said = kd(*SMALL, "method=standard")
    assert said.code == 0
    assert "W&B      offline; to see it: wandb leet runs/standard-" in said.out
    assert "to upload it: wandb sync runs/standard-" in said.out
    (mirrored,) = Path("runs").glob("standard-*/wandb/offline-run-*/run-*.wandb")
    assert mirrored.stat().st_size > 2000


@pytest.mark.slow
def test_a_server_that_is_not_there_stops_nothing(
    kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    said = kd(*SMALL, "method=standard", "tracker.mode=auto", "tracker.timeout=1")
    assert said.code == 0
    assert "logging offline" in said.out
    assert result("runs", "standard")["metrics"]["test_accuracy"] > 0


def test_errors_of_the_tracker_are_told_once_and_stop_nothing(
    kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        id, offline, dir = "i", True, "x"
        summary: dict = {}  # noqa: RUF012

        def define_metric(self, *_: object, **__: object) -> None:
            pass

        def log(self, *_: object, **__: object) -> None:
            raise ValueError("no more disk")

        def finish(self, **_: object) -> None:
            raise ValueError("still none")

    monkeypatch.setattr(wandb_run, "_start", lambda *_: Broken())
    said = kd(*SMALL, "method=standard", "tracker.mode=offline")
    assert said.code == 0
    assert said.out.count("W&B: no more disk; logging to W&B stops, training continues") == 1


# ---- the outputs for the test images


def test_a_run_keeps_its_outputs_for_the_test_images(composed: Callable) -> None:
    config = composed("method=standard", "student.scale=2")
    result = run(config)
    outputs, problem = load_outputs(run_dir(config))
    assert outputs is not None, problem
    assert outputs.classes == config.description.classes
    assert len(outputs.labels) == result["samples"]["test"]
    right = outputs.predictions == outputs.labels
    assert right.mean() == result["metrics"]["test_accuracy"]
    assert outputs.logits is not None
    logits, labels = torch.from_numpy(outputs.logits), torch.from_numpy(outputs.labels).long()
    again = metrics.metrics(logits.float(), labels)
    assert again["nll"] == pytest.approx(result["metrics"]["test_nll"], abs=1e-3)
    assert again["brier"] == pytest.approx(result["metrics"]["test_brier"], abs=1e-3)


def test_outputs_beyond_the_bound_are_left_out(composed: Callable) -> None:
    """The bound does not identify a run, and no file of an earlier attempt survives."""
    words = ["method=standard", "rerun=true"]
    config = composed(*words, "test_outputs.max_mb=1e-6")
    result = run(config)
    outputs, problem = load_outputs(run_dir(config))
    assert outputs is not None, problem
    assert outputs.logits is None
    assert (outputs.predictions == outputs.labels).mean() == result["metrics"]["test_accuracy"]
    none = composed(*words, "test_outputs.max_mb=0")
    assert run_dir(none) == run_dir(config)
    run(none)
    assert load_outputs(run_dir(none)) == (None, "")
    assert load_outputs(run_dir(none) / "superseded" / "1")[0] is not None
    (run_dir(none) / "result.json").unlink()
    (run_dir(none) / TEST_OUTPUTS).write_bytes(b"of an earlier attempt")
    run(composed("method=standard", "test_outputs.max_mb=0"))
    assert not (run_dir(none) / TEST_OUTPUTS).exists()


def test_the_file_of_outputs_stays_within_its_bound(tmp_path: Path) -> None:
    logits = torch.tensor([[1e9, -1e9, 0.5], [0.0, 1.0, 1.0]])
    labels, names = torch.tensor([2, 1]), ["a", 'é "', "漢" * 1000]
    path = tmp_path / TEST_OUTPUTS
    finalize.save_test_outputs(tmp_path, logits, labels, names, 1e6)
    outputs, _ = load_outputs(tmp_path)
    assert outputs is not None
    assert outputs.logits is not None
    assert outputs.logits.tolist() == [[65504, -65504, 0.5], [0, 1, 1]]
    assert (outputs.labels.tolist(), outputs.predictions.tolist()) == ([2, 1], [0, 1])
    assert outputs.classes == tuple(names)
    size = path.stat().st_size
    for bound in (size - 50, size - 1, *range(size, size + 1000, 100)):
        finalize.save_test_outputs(tmp_path, logits, labels, names, bound)
        outputs, _ = load_outputs(tmp_path)
        assert outputs is not None
        assert (outputs.logits is None) or size <= bound
    assert outputs.logits is not None
    assert [file.name for file in tmp_path.iterdir()] == [TEST_OUTPUTS]


# ---- what is measured, and how it is folded


def test_metrics_against_plain_loops() -> None:
    g = np.random.default_rng(0)
    z, zt, y = g.normal(size=(200, 4)) * 2, g.normal(size=(200, 4)), g.integers(0, 4, 200)
    p, pt = (np.exp(a) / np.exp(a).sum(1, keepdims=True) for a in (z, zt))
    said = p.argmax(1)
    ece = 0.0
    for low in range(15):
        members = [i for i in range(200) if low / 15 < p[i].max() <= (low + 1) / 15]
        if members:
            ece += (
                abs(np.mean(p[members].max(1)) - np.mean(said[members] == y[members]))
                * len(members)
                / 200
            )
    expected = {
        "accuracy": np.mean(said == y),
        "nll": -np.mean(np.log(p[np.arange(200), y])),
        "brier": np.mean(((p - np.eye(4)[y]) ** 2).sum(1)),
        "ece": ece,
        "agreement": np.mean(said == pt.argmax(1)),
        "teacher_kl": np.mean((pt * np.log(pt / p)).sum(1)),
    }
    found = metrics.metrics(*(torch.from_numpy(a) for a in (z, y, zt)))
    assert found == pytest.approx(expected, rel=1e-9)
    counts = metrics.confusion(torch.from_numpy(z), torch.from_numpy(y), 4)
    assert counts == [[int(np.sum((y == i) & (said == j))) for j in range(4)] for i in range(4)]


def test_the_brier_score_of_two_images() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]], dtype=torch.float64)
    # (0.3^2 + 0.2^2 + 0.1^2 + 0.1^2 + 0.6^2 + 0.7^2) / 2 = (0.14 + 0.86) / 2
    assert metrics.metrics(p.log(), torch.tensor([0, 2]))["brier"] == pytest.approx(0.5)
    sure = torch.tensor([[0.0, 1000.0]])
    assert metrics.metrics(sure, torch.tensor([1]))["brier"] == 0
    assert metrics.metrics(sure, torch.tensor([0]))["brier"] == 2


def test_files_are_whole_or_absent(tmp_path: Path) -> None:
    record = RunDirectory(tmp_path / "run", {"a": 1})
    assert load_result(record.folder) is None
    (record.folder / "result.json").write_text('{"metrics": {"te')
    assert load_result(record.folder) is None
    result = {
        "id": "0",
        "student": "cnn-1",
        "metrics": {"test_accuracy": 0.5},
        "teacher": None,
        "samples": {"train": 9},
    }
    result |= {"size": {"params": 1, "macs": 1, "method_params": 0}}
    result |= {"time": {"train_seconds": 1.0, "images_per_second": 1.0}}
    record.finish(result)
    assert load_result(record.folder) == result
    for n in (1, 2):
        archive_previous_run(record.folder)
        assert load_result(record.folder) is None
        record.finish({**result, "n": n})
    archive_previous_run(tmp_path / "nothing there")
    assert sorted(p.name for p in (record.folder / "superseded").iterdir()) == ["1", "2"]
    record.finish({**result, "metrics": {"test_accuracy": float("nan")}})
    assert load_result(record.folder) is None, "what the report does not count is not done"
