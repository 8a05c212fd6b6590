"""What tests of several folders share: toy sweeps for the report, and networks on digits."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from conftest import DEVICE, FP32

from kd import data, models
from kd.config.schema import Config
from kd.core.rng import seeded
from kd.data import Data
from kd.models import Net
from kd.report import stats as compare
from kd.report import tables as table
from kd.training.teacher import freeze

CONFIG = {
    "method": {"name": "standard"},
    "seed": 0,
    "batch_size": 64,
    "device": "cpu",
    "rerun": False,
    "student": {"name": "cnn", "scale": 4, "epochs": 3},
    "teacher": {"name": "cnn", "scale": 8, "epochs": 5},
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    "data": {"name": "digits", "root": "/x"},
    "paths": {"runs": "runs"},
    "tracker": {"group": None},
}


METHODS = {"logits": {"T": 4.0, "alpha": 0.1}, "feature": {"T": 2.0, "alpha": 0.1, "beta": 0.2}}


def config(method: str, seed: int, **changes: Any) -> dict[str, Any]:
    """A configuration; changes are dotted keys, `__` for the dot."""
    made = json.loads(json.dumps(CONFIG)) | {
        "seed": seed,
        "method": {"name": method, **METHODS.get(method, {})},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        node = made
        for name in path:
            node = node[name]
        node[last] = value
    return made


def name_of(one: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(one).encode()).hexdigest()[:12]


def made(
    place: Path, configs: list[dict], accuracies: list[float | None], val: list[float] | None = None
) -> list[dict]:
    """A sweep's directory with these runs, each done with its test accuracy, or (None) failed."""
    jobs = []
    for number, (one, accuracy) in enumerate(zip(configs, accuracies, strict=True)):
        folder = place / "runs" / f"r{number}"
        folder.mkdir(parents=True)
        taught = one["method"]["name"] != "standard"
        jobs.append(
            {
                "number": number,
                "overrides": [f"seed={one['seed']}"],
                "id": name_of(one),
                "folder": str(folder),
                "taught": taught,
                "config": one,
            }
        )
        if accuracy is None:
            (folder / "status.json").write_text(
                json.dumps({"state": "failed", "reason": "it <b>broke</b>"})
            )
            continue
        epochs = one["student"]["epochs"]
        rows = [
            f"{e},{0.5 * accuracy + 0.1 * e / epochs},{2 / e},{accuracy},{1 / e}"
            for e in range(1, epochs + 1)
        ]
        (folder / "history.csv").write_text(
            "epoch,accuracy,hard,val_accuracy,val_nll\n" + "\n".join(rows) + "\n"
        )
        scale = one["student"]["scale"]
        teacher = {"name": "cnn-8", "params": 800, "macs": 8000, "metrics": {"test_accuracy": 0.9}}
        result = {
            "id": name_of(one),
            "method": one["method"]["name"],
            "student": f"cnn-{scale}",
            "seed": one["seed"],
            "epochs": epochs,
            "metrics": {
                "test_accuracy": accuracy,
                "val_accuracy": val[number] if val else accuracy,
                "test_nll": 1.0,
                "test_ece": 0.1,
            },
            "teacher": teacher if taught else None,
            "size": {"params": 100 * scale, "macs": 1000 * scale, "method_params": 0},
            "time": {"train_seconds": 1.0, "images_per_second": 5.0},
            "samples": {"train": 1000},
            "reliability": {"images": [50.0] * 15, "confidence": [25.0] * 15, "right": [20.0] * 15},
        }
        (folder / "result.json").write_text(json.dumps(result))
    place.mkdir(exist_ok=True)
    (place / table.PLAN).write_text(json.dumps(jobs))
    return jobs


def tables(place: Path) -> table.Tables:
    found = table.load_tables([place])
    return found._replace(summary=compare.against_standard(found.summary, found.runs))


def images(config: Config, tmp_path: Path) -> Data:
    return data.load(config.data, config.description, tmp_path / "cache", FP32.torch)


def network(config: Any, seed: int = 5) -> Net:
    with seeded(seed, "student"):
        return models.build(config, 10, 32).to(DEVICE)


def trained_teacher(config: Config) -> Net:
    """A teacher whose batch norms have seen something, so that train and eval mode differ."""
    net = network(config.teacher)
    with torch.no_grad():
        net(
            2
            + 3 * torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        )
    freeze(net, FP32)
    return net
