"""Compare a whole sweep, from command to report, with as many separate runs of the plain loop.

    python -m benchmarks.sweep [--images 12800] [--epochs 4] [--plain-runs 2] [--temperatures 4]
                               [--starts 3] [--out benchmarks/sweep.json]

There are sixteen students (T = 1, 2, 4, 8 by alpha = 0.1, 0.3, 0.5, 0.9) of scale 16 and one
teacher of scale 32, which is already trained for both. kd's time is that of `python -m kd -m ...`:
start-up, sixteen students on all cores, validation after each epoch, tests, report and figures.
Each plain run starts Python, reads the images, trains, tests once and saves. `--plain-runs` of them
are run, half before kd and half after it, and their mean stands for the rest.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.measure import Memory, on_disk
from benchmarks.networks import CACHE, MEAN, STD, network
from benchmarks.throughput import pictures
from kd.core.io import write_json
from kd.models import weights
from kd.training import device as devices
from kd.training.environment import environment

TARGET, STARTUP = 8.0, 6.0
ALPHAS, TEMPERATURES = (0.1, 0.3, 0.5, 0.9), (1, 2, 4, 8)
WAYS = {
    "sweep of 16, a worker a core": [],
    "sweep of 16, packed by 8": ["hydra.launcher.jobs_per_worker=8"],
}
FIRST_STEP = """
import os, sys, kd.training.run
from kd import cli
train = kd.training.run.train
def until_first_step(*given):
    for row in train(*given):
        print("imported", *sorted({m.split(".")[0] for m in sys.modules}), flush=True)
        os._exit(0)
        yield row
kd.training.run.train = until_first_step
cli.main()
"""


def prepare(folder: Path, images: int) -> None:
    """Write random images, as PNG files for kd and as tensors for the plain loop, and a teacher."""
    found = {"train": pictures(images), "test": pictures(images // 5)}
    for split, (pixels, labels) in found.items():
        for number, (picture, label) in enumerate(
            zip(pixels.numpy(), labels.tolist(), strict=True)
        ):
            path = folder / "images" / split / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path, compress_level=0)
    kept = {f"{s}_{k}": v for s, p in found.items() for k, v in p._asdict().items()}
    rows = images - images // 10  # kd holds a tenth out for validation: both train on as many
    torch.save(
        kept | {k: kept[k][:rows] for k in ("train_images", "train_labels")}, folder / "images.pt"
    )
    torch.manual_seed(0)
    teacher = network(32)
    model = {"name": "cnn", "scale": 32, "activation": "relu", "dropout": 0.2}
    about = weights.build_metadata(
        model, tuple("0123456789"), 32, torch.tensor(MEAN), torch.tensor(STD)
    )
    weights.save(teacher, folder / "teacher.safetensors", about)


def run(folder: Path, words: list[str], **more: str) -> dict[str, Any]:
    """Run a command and return its seconds, peak memory and output."""
    environment = {
        **os.environ,
        "WANDB_MODE": "disabled",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        **more,
    }
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    with Memory(process.pid) as watched:
        out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(
            f"benchmarks.sweep: {' '.join(words[:4])} left with code {process.returncode}\n{out}"
        )
    return {"seconds": time.perf_counter() - begun, "memory_mb": round(watched.peak), "out": out}


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.sweep", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=12800)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--plain-runs", type=int, default=2)
    parser.add_argument(
        "--temperatures", type=int, default=4, help="of 1, 2, 4, 8: four students each"
    )
    parser.add_argument("--starts", type=int, default=3, help="how often the start-up is timed")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/sweep.json"))
    asked = parser.parse_args()
    device = devices.resolve(asked.device, "auto", CACHE)
    temperatures = TEMPERATURES[: asked.temperatures]
    settings = [(T, alpha) for T in temperatures for alpha in ALPHAS]

    with tempfile.TemporaryDirectory(prefix="kd-benchmark-") as made:
        folder = Path(made)
        prepare(folder, asked.images)
        data = [
            "data=imagefolder",
            "data.root=images",
            f"data.val_size={asked.images // 10}",
            f"device={asked.device}",
            "teacher.checkpoint=teacher.safetensors",
            f"student.epochs={asked.epochs}",
        ]
        swept = [
            "method=logits",
            "method.T=" + ",".join(map(str, temperatures)),
            "method.alpha=" + ",".join(map(str, ALPHAS)),
        ]

        starts = []
        for _ in range(1 + asked.starts):  # the first decodes the images
            starts.append(
                run(
                    folder,
                    ["-c", FIRST_STEP, "method=standard", "paths.runs=none", *data],
                    KD_CACHE="cache",
                )
            )
        imported = starts[-1]["out"].split()
        startup = statistics.median(start["seconds"] for start in starts[1:])
        print(
            f"start-up to the first step, cached data: {startup:.1f} s (target {STARTUP:.0f} s)",
            flush=True,
        )

        plain, rows = list[dict[str, Any]](), list[dict[str, Any]]()

        def plain_run(number: int) -> None:
            T, alpha = settings[number * 5 % len(settings)]
            words = ["images.pt", "teacher.safetensors", "--T", str(T), "--alpha", str(alpha)]
            more = ["--epochs", str(asked.epochs), "--device", device.torch.type]
            plain.append(run(folder, ["-m", "benchmarks.plain", *words, *more]))
            print(f"plain run {number + 1}: {plain[-1]['seconds']:.0f} s", flush=True)

        for number in range(asked.plain_runs // 2):
            plain_run(number)
        for title, words in WAYS.items():
            # a directory and a cache of its own, so that this sweep computes all teacher outputs
            name = f"kd{len(rows)}"
            place = [f"paths.runs={name}", f"hydra.sweep.dir={name}/sweep"]
            found = run(
                folder, ["-m", "kd", "-m", *swept, *data, *place, *words], KD_CACHE=f"{name}/cache"
            )
            rows.append({"path": title, **found, "disk_mb": round(on_disk(folder / name))})
            print(f"{title}: {found['seconds']:.0f} s", flush=True)
        for number in range(asked.plain_runs // 2, asked.plain_runs):
            plain_run(number)

    each = statistics.mean(run["seconds"] for run in plain)
    for row in rows:
        del row["out"]
        row |= {"ratio": round(len(settings) * each / row["seconds"], 2), "target": TARGET}
        row["seconds"] = round(row["seconds"], 1)
        said = f"{len(settings)} x {each:.0f} s / {row['seconds']:.0f} s = {row['ratio']:.2f}"
        print(f"{row['path']:32} {said} (target {TARGET:g})")
    heavy = {
        "torchvision",
        "wandb",
        "pandas",
        "seaborn",
        "matplotlib",
        "scipy",
        "sklearn",
        "statsmodels",
        "optuna",
    }
    write_json(
        asked.out,
        {
            "images": asked.images,
            "epochs": asked.epochs,
            "students": len(settings),
            "plain_seconds": [round(run["seconds"], 1) for run in plain],
            "plain_memory_mb": plain[0]["memory_mb"],
            "rows": rows,
            "startup_seconds": round(startup, 2),
            "startup_target": STARTUP,
            "imported_for_nothing": sorted(heavy & set(imported)),
            "environment": environment(device),
        },
    )
    print(f"written to {asked.out}")


if __name__ == "__main__":
    main()
