"""A run that was interrupted, anywhere and however, ends as if it had not been."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import LONG, PATIENCE, Place, run

from kd.config.schema import Config, run_dir
from kd.core.errors import UserError
from kd.core.interleave import run_to_completion
from kd.runs import directory
from kd.training import run as run_module
from kd.training.checkpoint import Checkpoints
from kd.training.run import TrainingRun

EPOCHS, STEPS = 3, 19  # of the small run: 1,237 images, batches of 64
SMALL = ["batch_size=64", f"student.epochs={EPOCHS}", "student.dropout=0.5"]
CASES = {
    "standard": ["method=standard"],
    "a method with parts of its own": ["method=feature"],
    "a memory": ["method=crd", "method.n_negatives=64", "method.embed_dim=8"],
    "blends": ["method=function_matching"],
    "adamw": ["method=logits", "optimizer=adamw"],
    "muon": ["method=logits", "optimizer=muon"],
    "float32, torch's kernels": ["method=logits", "precision=fp32", "cpu_kernels=torch"],
}


def outcome(config: Config) -> tuple[Any, ...]:
    """All of a finished run that must not depend on what happened on the way."""
    folder = run_dir(config)
    result = json.loads((folder / "result.json").read_text())
    weights = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    history = pd.read_csv(folder / "history.csv").drop(columns=["seconds", "images_per_second"])
    return result["metrics"], result["reliability"], weights, history.to_dict("list")


def advance(config: Config, count: int, end: str) -> None:
    """Train for so many steps; then the process is `interrupted` or `killed`.

    An interrupted one writes a checkpoint, and a killed one cannot.
    """
    going = TrainingRun(config).steps()
    for _ in range(count):
        next(going)
    if end == "killed":
        going.close()
        return
    with pytest.raises(KeyboardInterrupt):
        going.throw(KeyboardInterrupt())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_that_goes_on_ends_with_the_same_bits(
    case: str, composed: Callable, tmp_path: Path
) -> None:
    words = [*SMALL, *CASES[case]]
    whole = composed(*words, f"paths.runs={tmp_path / 'whole'}")
    run(whole)
    config = composed(*words)
    ends = [(7, "interrupted"), (5, "killed"), (STEPS, "interrupted"), (STEPS + 3, "killed")]
    for count, end in ends:  # of the steps that are left
        advance(config, count, end)
        assert not directory.load_result(run_dir(config))
    result = run(config)
    assert result["time"]["resumed"] == 3, "that which was killed left no checkpoint of its own"
    assert outcome(config) == outcome(whole)
    left = {path.name for path in run_dir(config).iterdir()}
    assert "checkpoints" not in left
    assert not [name for name in left if name.endswith(".part")]


def test_at_most_the_last_epoch_is_trained_again(
    composed: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(*SMALL, "method=standard")
    advance(config, 2 * STEPS + 9, "killed")
    done: list[Any] = []
    monkeypatch.setattr(
        run_module, "train", lambda state, *rest: done.append((state.epoch, state.step)) or iter(())
    )
    run_to_completion(TrainingRun(config).steps())
    assert done == [(2, 0)]


@pytest.mark.slow
def test_checkpoints_are_written_as_often_as_asked(
    composed: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(*words: str, seconds: float = 0.0) -> list[str]:
        config = composed(*SMALL, "method=standard", *words)
        names: list[str] = []
        monkeypatch.setattr(
            Checkpoints,
            "save",
            lambda self, epoch, step, _: names.append(f"{epoch}.{step}") or True,
        )
        clock = iter(range(10**9))
        monkeypatch.setattr("kd.training.checkpoint.time.monotonic", lambda: seconds * next(clock))
        shutil.rmtree(run_dir(config), ignore_errors=True)
        run(config)
        monkeypatch.undo()
        return names

    assert written() == ["1.0", "2.0", "3.0"]
    assert written("checkpoint.every_n_epochs=2") == ["2.0"]
    assert written("checkpoint.every_n_epochs=null") == []
    assert (
        len(
            written("checkpoint.every_n_epochs=null", "checkpoint.every_n_minutes=0.5", seconds=5.0)
        )
        > 3
    )
    assert (
        written("checkpoint.every_n_epochs=null", "checkpoint.every_n_minutes=null", seconds=5.0)
        == []
    )


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(
    composed: Callable, tmp_path: Path, caplog: Any
) -> None:
    whole = composed(*SMALL, "method=feature", f"paths.runs={tmp_path / 'whole'}")
    run(whole)
    for damaged in (1, 2):
        config = composed(*SMALL, "method=feature", f"paths.runs={tmp_path / str(damaged)}")
        advance(config, 2 * STEPS + 5, "interrupted")
        found = sorted((run_dir(config) / "checkpoints").glob("*.pt"))
        assert len(found) == 2, "the last two are kept"
        for path in found[-damaged:]:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        run(config)
        assert outcome(config) == outcome(whole)
    assert caplog.text.count("cannot be read (checksum mismatch); trying an earlier one") == 3


def test_a_checkpoint_is_read_without_executing_code(tmp_path: Path) -> None:
    import hashlib
    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    content = pickle.dumps(Evil())
    (tmp_path / "checkpoints").mkdir()
    digest = hashlib.sha256(content).hexdigest()[:16]
    (tmp_path / "checkpoints" / f"000001-00000000-{digest}.pt").write_bytes(content)
    assert Checkpoints(tmp_path).load() is None
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_a_run_does_not_go_on_with_another_configuration(
    kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "data=digits",
        "student.scale=1",
        "student.epochs=3",
        "method=standard",
        "device=cpu",
        "threads=1",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(
            run_module,
            "measure",
            lambda *_: (_ for _ in ()).throw(RuntimeError("the machine is lost")),
        )
        with pytest.raises(RuntimeError):
            kd(*words)
    said = kd(*[word for word in words if word != "threads=1"], "threads=2")
    line = "threads was 1 and is now 2; change it back, or set rerun=true to start over"
    assert said.code == 2
    assert line in said.err
    assert said.err.count("\n") == 1
    said = kd("-m", *words, "cpu_kernels=torch", "seed=1,0")
    assert (said.code, said.out) == (2, "")
    assert "cpu_kernels was auto and is now torch" in said.err
    assert "no job was started" in said.err
    (folder,) = Path("runs").glob("standard-*")
    assert list((folder / "checkpoints").glob("*.pt"))
    again = kd(*words)
    assert "resuming after epoch 3 and 0 steps" in again.out
    assert again.code == 0
    assert json.loads((folder / "result.json").read_text())["time"]["resumed"] == 1


@pytest.mark.slow
def test_a_checkpoint_of_another_precision_or_shape_is_refused(composed: Callable) -> None:
    config = composed(*SMALL, "method=standard")
    advance(config, STEPS, "interrupted")
    kept = Checkpoints(run_dir(config))
    found = kept.load()
    assert found is not None
    done: list[str] = []
    for change, line in (
        (
            {"numerics": {**found["numerics"], "precision": "float8"}},
            r"precision: cannot resume .*: precision was float8 and is now ",
        ),
        (
            {"student": {}},
            r"rerun: the checkpoint in .* does not fit this version of kd "
            r"\(Error.*rerun=true to start over",
        ),
        ({"optimizers": []}, "rerun: the checkpoint in .* does not fit"),
    ):
        assert kept.save(len(done) + 9, 0, {**found, **change})
        done.append(line)
        with pytest.raises(UserError, match=line):
            run(config)
    assert run(config.replace(rerun=True))
    assert list((run_dir(config) / "superseded" / "1" / "checkpoints").glob("*.pt"))


# ---- signals


def test_a_second_ctrl_c_leaves_at_once() -> None:
    code = """
import os, signal
from kd.core.signals import SignalHandler
stop = SignalHandler()
with stop.installed(), stop.deferring():
    os.kill(os.getpid(), signal.SIGINT)
    print("goes on to the end of its step", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("never", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "goes on to the end of its step\n")
    assert done.stderr == "kd: stopping after this step; press Ctrl-C again to stop now\n"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["alone", "a pack"])
def test_a_signal_leaves_a_checkpoint_of_that_moment(how: str, place: Place) -> None:
    """Of other sweeps, see tests/sweep/test_sweep.py."""
    words = [
        "batch_size=8",
        *LONG,
        "checkpoint.every_n_epochs=null",
        "checkpoint.every_n_minutes=null",
    ]
    if how == "a pack":
        words = ["-m", *words, "hydra.launcher.jobs_per_worker=2", "seed=0,1"]
    count = 2 if how == "a pack" else 1
    process = place.start(*words)
    place.wait(lambda: len(list(place.folder.glob("runs/*/history.csv"))) == count)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "Traceback" not in err
    for folder in place.runs():
        assert directory.read_status(folder).state == "killed"
        found = Checkpoints(folder).load()
        assert found is not None
        rows = pd.read_csv(folder / "history.csv")
        assert found["epoch"] == len(rows)
    again = place.start(*words)
    place.wait(lambda: (place.runs()[0] / "kd.log").read_text().count("resuming after epoch") == 1)
    again.terminate()
    _, err = again.communicate(timeout=PATIENCE)
    assert (again.returncode, err) == (143, "kd: terminated\n")
    if how == "alone":
        assert directory.read_status(place.runs()[0]) == ("killed", "terminated by SIGTERM")


@pytest.mark.slow
def test_a_preempted_job_of_a_cluster_is_queued_again_and_goes_on(place: Place) -> None:
    """submitit's own signal, which it answers by queueing the job again."""
    words = [word for word in LONG if not word.startswith("student.epochs")]
    words += [
        "student.epochs=20",
        "batch_size=32",
        "checkpoint.every_n_epochs=null",
        "checkpoint.every_n_minutes=null",
    ]
    process = place.start(
        "-m", *words, "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"
    )
    place.wait(lambda: list(place.folder.glob("runs/*/history.csv")))
    (folder,) = place.runs()
    os.kill(json.loads((folder / "status.json").read_text())["pid"], signal.SIGUSR2)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    result = directory.load_result(folder)
    assert result is not None
    assert result["time"]["resumed"] == 1
    assert pd.read_csv(folder / "history.csv")["epoch"].tolist() == list(range(1, 21))


def test_states_of_torch_survive_a_checkpoint(tmp_path: Path) -> None:
    """Strides and types included: a fused optimizer asks for them."""
    kept = Checkpoints(tmp_path)
    content = {
        "a": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "b": torch.ones(2).bfloat16(),
    }
    assert kept.save(1, 0, content)
    found = kept.load()
    assert found is not None
    for name, value in content.items():
        assert torch.equal(found[name], value)
        assert found[name].stride() == value.stride()
