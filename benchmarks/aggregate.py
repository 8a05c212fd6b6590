"""Measure the time and memory of `python -m kd.report` on thousands of finished runs.

    python -m benchmarks.aggregate [--runs 10000] [--out benchmarks/aggregate.json]

The report includes figures and the page. The runs are synthetic: three methods, settings of
learning rate, weight decay, T and alpha, five seeds, 15 epochs each, in the directory of a sweep.
The start-up of Python is included; creating the runs is not.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kd.core.io import write_json
from kd.report.tables import write_plan
from kd.runs.schema import RunResult

SEEDS, EPOCHS = 5, 15
SECONDS, MEGABYTES = 60.0, 1500.0  # targets for 10,000 runs
TERMS = {"standard": ("hard",), "logits": ("hard", "soft"), "feature": ("hard", "soft", "feature")}
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
NET = {"name": "cnn", "activation": "relu", "dropout": 0.2, "epochs": EPOCHS}
CONFIG: dict[str, Any] = {
    "student": {**NET, "scale": 8},
    "optimizer": SGD,
    "schedule": {"name": "triangle", "warmup_fraction": 0.2, "final_lr_factor": 0.0},
    "teacher": {
        **NET,
        "scale": 32,
        "batch_size": 64,
        "seed": 1000,
        "checkpoint": None,
        "optimizer": SGD,
    },
    "data": {
        "val_size": 5000,
        "augment": {"crop_padding": 4, "padding_mode": "zeros", "flip": True},
        "name": "cifar10",
    },
    "batch_size": 64,
    "device": "auto",
    "precision": "auto",
    "threads": None,
    "rerun": False,
    "tracker": {"mode": "auto", "project": "kd", "tags": []},
    "paths": {"runs": "runs", "cache": "~/.cache/kd"},
}


def settings() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield (method, optimizer) without end: a grid for each learning rate."""
    for step in itertools.count():
        for decay in (1e-4, 5e-4, 1e-3, 5e-3):
            optimizer = SGD | {"lr": round(0.01 * 1.25**step, 6), "weight_decay": decay}
            yield {"name": "standard"}, optimizer
            for name, T, alpha in itertools.product(
                ("logits", "feature"), (1.0, 2.0, 4.0, 8.0), (0.1, 0.3, 0.5, 0.9)
            ):
                yield {"name": name, "T": T, "alpha": alpha}, optimizer


def make(folder: Path, runs: int) -> Path:
    """Create finished runs and the plan of their sweep. Returns the directory of the sweep."""
    chance, jobs = random.Random(0), []
    every = itertools.product(itertools.islice(settings(), -(-runs // SEEDS)), range(SEEDS))
    for number, ((method, optimizer), seed) in enumerate(itertools.islice(every, runs)):
        config = {**CONFIG, "method": method, "optimizer": optimizer, "seed": seed}
        name, taught = f"{number:012x}", method["name"] != "standard"
        place = folder / "runs" / f"{method['name']}-cnn-8-s{seed}-{name}"
        place.mkdir(parents=True)
        history = [
            _epoch(epoch, TERMS[method["name"]], taught, chance) for epoch in range(1, EPOCHS + 1)
        ]
        lines = [",".join(history[0]), *(",".join(map(str, row.values())) for row in history)]
        (place / "history.csv").write_text("\n".join(lines) + "\n")
        (place / "config.yaml").write_text(json.dumps(config, indent=2))  # which is YAML, too
        (place / "result.json").write_text(
            json.dumps(_result(name, config, history[-1], chance), indent=2)
        )
        (place / "status.json").write_text(json.dumps({"state": "done", "reason": ""}))
        words = [f"method={method['name']}", f"seed={seed}", f"optimizer.lr={optimizer['lr']}"]
        jobs.append(
            {
                "overrides": words,
                "id": name,
                "folder": str(place),
                "taught": taught,
                "config": config,
            }
        )
    (folder / "sweep").mkdir()
    write_plan(folder / "sweep", jobs)
    return folder / "sweep"


def _epoch(
    epoch: int, terms: tuple[str, ...], taught: bool, chance: random.Random
) -> dict[str, float]:
    accuracy = 0.9 - 0.6 / epoch + 0.05 * chance.random()
    row = {"epoch": epoch, "lr": 0.05 / epoch, "accuracy": accuracy - 0.05, "loss": 2 / epoch}
    row |= {term: 1.5 / epoch + 0.1 * chance.random() for term in terms}
    row |= _measured("val", accuracy, taught, chance)
    return row | {"seconds": 3 + chance.random(), "images_per_second": 15000 * chance.random()}


def _measured(split: str, accuracy: float, taught: bool, chance: random.Random) -> dict[str, float]:
    found = {
        f"{split}_accuracy": accuracy,
        f"{split}_nll": 2 - 1.5 * accuracy,
        f"{split}_ece": 0.1 * chance.random(),
    }
    return found | (
        {f"{split}_agreement": accuracy, f"{split}_teacher_kl": chance.random()} if taught else {}
    )


def _result(
    name: str, config: dict[str, Any], last: dict[str, float], chance: random.Random
) -> dict[str, Any]:
    method, accuracy = config["method"]["name"], last["val_accuracy"] - 0.01 * chance.random()
    taught = method != "standard"
    tutor = {
        "name": "cnn-32",
        "source": "runs/teacher",
        "metrics": {"test_accuracy": 0.93, "val_accuracy": 0.94},
        "params": 1_116_298,
        "macs": 41_000_000,
    }
    metrics = _measured("test", accuracy, taught, chance) | {
        k: v for k, v in last.items() if k.startswith("val_")
    }
    bins = [float(chance.randrange(1000)) for _ in range(15)]
    reliable = {
        "images": bins,
        "confidence": [0.6 * n for n in bins],
        "right": [0.5 * n for n in bins],
    }
    result = {
        "id": name,
        "method": method,
        "student": "cnn-8",
        "seed": config["seed"],
        "epochs": EPOCHS,
        "metrics": metrics,
        "teacher": tutor if taught else None,
        "reliability": reliable,
        "size": {"params": 71_034, "macs": 2_700_000, "method_params": 0},
        "time": {
            "train_seconds": 50 + chance.random(),
            "packed": 1,
            "epoch_seconds": [3.0] * EPOCHS,
            "images_per_second": 15000.0,
            "teacher_read": None,
        },
        "content": "cifar10",
        "samples": {"train": 45000, "val": 5000, "test": 10000},
        "config": config,
    }
    return RunResult.model_validate(result).model_dump()


def main() -> None:
    parser = argparse.ArgumentParser(
        "benchmarks.aggregate", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/aggregate.json"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kd-benchmark-") as made:
        place = make(Path(made), asked.runs)
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        begun = time.perf_counter()
        command = [sys.executable, "-m", "kd.report", str(place)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        _, code, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(code)
        if process.returncode or not (place / "index.html").exists():
            raise SystemExit(
                f"benchmarks.aggregate: the report left with code {process.returncode}"
            )
    memory = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    targets = f"targets for 10,000 runs: {SECONDS:.0f} s, {MEGABYTES:,.0f} MB"
    print(f"{asked.runs:,} runs of {EPOCHS} epochs: {seconds:.1f} s, {memory:,.0f} MB ({targets})")

    from benchmarks.networks import CACHE
    from kd.training import device
    from kd.training.environment import environment as where

    write_json(
        asked.out,
        {
            "runs": asked.runs,
            "epochs": EPOCHS,
            "seeds": SEEDS,
            "seconds": round(seconds, 1),
            "memory_mb": round(memory),
            "seconds_target": SECONDS,
            "memory_target": MEGABYTES,
            "environment": where(device.resolve("cpu", "auto", CACHE)),
        },
    )
    print(f"written to {asked.out}")


if __name__ == "__main__":
    main()
