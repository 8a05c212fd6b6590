"""The examples run, on a sweep that has just been made."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pandas as pd
import pytest
from conftest import SMALL
from PIL import Image

from kd import methods

EXAMPLES = Path(__file__).parents[1] / "examples"


def printed(name: str, *words: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_examples_read_what_a_sweep_leaves(kd: Callable) -> None:
    words = [
        "-m",
        *SMALL,
        "method=standard",
        "seed=0,1",
        "hydra/launcher=basic",
        "hydra.sweep.dir=out",
    ]
    assert kd(*words, "tracker.mode=disabled").code == 0
    run = min(Path("runs").glob("standard-cnn-1-s0-*"))
    Image.new("RGB", (50, 40), (200, 10, 10)).save("image.png")
    name, share, percent = printed("load_student.py", str(run), "image.png").split()
    assert name in "0123456789"
    assert 10 <= float(share) <= 100
    assert percent == "%"
    out = printed("read_sweep.py", "out")
    accuracies = pd.read_csv("out/runs.csv")["test_accuracy"]
    assert f"{accuracies.min():.6f}" in out
    assert "standard" in out.splitlines()[1]


@pytest.mark.slow
def test_a_method_of_a_script_trains_in_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["-m", *SMALL, "method=mse,standard", "tracker.mode=disabled", "hydra.sweep.dir=out"]
    conf = str(EXAMPLES / "conf")
    out = printed("custom_method.py", "--config-dir", conf, *words, "hydra.launcher.slots=1")
    assert "2 jobs: 2 done" in out
    (history,) = Path("runs").glob("mse-cnn-1-s0-*/history.csv")
    assert pd.read_csv(history)["difference"].iloc[-1] > 0
    result = subprocess.run(
        [sys.executable, EXAMPLES / "custom_method.py", "--config-dir", conf, "method=mse",
         "method.T=3"], capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert "method.T: unknown key" in result.stderr


def test_a_method_of_a_script_takes_no_name_of_kds() -> None:
    class Config(methods.WeightedConfig):
        name: Literal["logits"]

    with pytest.raises(ValueError, match="'logits' is the name of a method of kd"):
        methods.register(type("Mine", (methods.Method,), {"Config": Config}))
