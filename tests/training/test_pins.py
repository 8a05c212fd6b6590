"""What no refactoring may change: identities, weights bit for bit, and the summary of a sweep.

After an intended change, this writes tests/training/pins.json anew:

    KD_PINS=write python -m pytest -m "slow or not slow" -n 0 tests/training/test_pins.py
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

PINS = Path(__file__).with_name("pins.json")
# The same instructions on every x86-64 machine, so that the bits are the same as well
PLAIN = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "WANDB_MODE": "disabled",
}
CONFIGS = {
    "standard": ["method=standard"],
    "logits": ["method=logits", "method.T=2.0", "method.alpha=0.5", "seed=3"],
    "feature": ["method=feature", "student.epochs=4", "optimizer.lr=0.01"],
    "crd": ["method=crd", "optimizer=adamw", "schedule=cosine"],
    "resnet": ["method=dkd", "model@student=resnet20", "model@teacher=resnet56", "data=cifar100"],
    "ensemble": [
        "method=logits",
        "teacher.ensemble.size=3",
        "student.label_fraction=0.5",
        "precision=fp32",
    ],
}
SWEEP = [
    "-m", "data=digits", "method=standard,logits,feature", "student.scale=2", "teacher.scale=2",
    "student.epochs=2", "teacher.epochs=1", "device=cpu", "precision=fp32", "cpu_kernels=torch",
    "threads=1", "hydra.launcher.slots=1", "hydra.sweep.dir=out",
]  # fmt: skip
TIMES = ["train_seconds", "images_per_second", "teacher_flops"]


def check(name: str, found: Any) -> None:
    """Compare what was found with what is kept, or keep it."""
    kept = json.loads(PINS.read_text()) if PINS.exists() else {}
    if os.environ.get("KD_PINS") == "write":
        PINS.write_text(json.dumps({**kept, name: found}, indent=1, sort_keys=True) + "\n")
    assert json.loads(PINS.read_text())[name] == found


def test_identities(composed: Callable) -> None:
    check(
        "identities",
        {name: composed(*words, small=False).identity() for name, words in CONFIGS.items()},
    )


@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the bits are those of x86-64"
)
def test_weights_and_summary(tmp_path: Path) -> None:
    version = torch.__version__.partition("+")[0]
    if os.environ.get("KD_PINS") != "write" and json.loads(PINS.read_text())["torch"] != version:
        pytest.skip(
            f"the bits are those of torch {json.loads(PINS.read_text())['torch']}, "
            f"and this is {version}"
        )
    environment = {**os.environ, **PLAIN}
    subprocess.run(
        [sys.executable, "-m", "kd", *SWEEP],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
    )
    weights = {}
    for folder in sorted(tmp_path.glob("runs/*-s0-*")):
        tensors = load_file(folder / "student.safetensors")
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].numpy().tobytes())
        weights[folder.name] = digest.hexdigest()
    check("torch", version)
    check("weights", weights)
    summary = pd.read_csv(tmp_path / "out" / "summary.csv").drop(columns=TIMES)
    check("summary", summary.to_csv(index=False, float_format="%.9g").splitlines())
