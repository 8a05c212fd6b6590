"""Images a second of kd's own training path beside the loop that everyone writes, in one process, interleaved.

    python -m benchmarks.throughput [--images 6400] [--repeats 5] [--device cpu] [--out benchmarks/throughput.json]

Both train the same networks (scale 16, taught by scale 32) on the same images with the same batch size. The ratio is
the median over the repeats of one run of each, taken in turn, so that a noisy machine is noisy for both.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import plain
from kd import device as devices
from kd import methods, models
from kd.data.loader import Split, batches
from kd.device import Device
from kd.methods import Spec
from kd.optim import SGD, Schedule
from kd.record import environment
from kd.teacher import freeze
from kd.train import train
from kd.views import Augment

MEAN, STD, BATCH = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616], 128
CACHE = Path(os.environ.get("KD_CACHE", "~/.cache/kd")).expanduser()
SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {},
    "logits": {"alpha": 0.1, "T": 4.0},
    "feature": {"alpha": 0.1, "beta": 0.2, "T": 4.0, "pairs": [["pool2", "pool2"]]},
}
TARGETS = {"standard": 4.0, "logits": 4.0, "feature": 5.0}
FLOPS = {"standard": 43.5e6, "logits": 43.5e6 + 53.2e6, "feature": 43.5e6 + 53.2e6}  # an image: student, and teacher
AUGMENT = Augment(crop=4, padding="zeros", flip=True)


def network(scale: int) -> Any:
    config = models.find("cnn", "model").Config(name="cnn", scale=scale, activation="relu", dropout=0.2)
    return models.build(config, 10, 32)


def ours(name: str, images: torch.Tensor, labels: torch.Tensor, device: Device) -> Iterator[Any]:
    """kd's loop: an item an epoch."""
    kind = methods.find(name)
    student, teacher = device.place(network(16)), network(32)
    freeze(teacher, device)
    spec = Spec(student.shapes(32), teacher.shapes(32), 10, len(images))
    method = device.place(kind(kind.Config(name=name, **SETTINGS[name]), spec))
    split = Split(images, labels, torch.arange(len(images)), torch.tensor(MEAN), torch.tensor(STD)).to(device.torch)
    schedule = Schedule(name="constant", warmup=0.0, final=0.0, milestones=[], gamma=1.0)
    optimizer = SGD(name="sgd", lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    taught = teacher if kind.needs_teacher else None
    return train(student, taught, method, split, AUGMENT, optimizer, schedule, 10**6, BATCH, 0, device)


def theirs(name: str, images: torch.Tensor, labels: torch.Tensor, device: Device) -> Iterator[float]:
    """The plain loop: an item an epoch."""
    student, teacher = network(16).to(device.torch), network(32).to(device.torch)
    regressor = torch.nn.Conv2d(32, 64, 1).to(device.torch) if name == "feature" else None
    data = plain.Images(images, labels, MEAN, STD)
    return plain.epochs(student, None if name == "standard" else teacher, regressor, data, BATCH, device.torch)


def clock(work: Callable[[], Any], device: Device) -> float:
    _wait(device)
    begun = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - begun


def _wait(device: Device) -> None:
    if device.torch.type == "cuda":
        torch.cuda.synchronize()


def parts(name: str, images: torch.Tensor, labels: torch.Tensor, device: Device, steps: int = 20) -> dict[str, float]:
    """Where kd's time goes: milliseconds a step of each part, measured alone, the median of `steps`."""
    kind = methods.find(name)
    student, teacher = device.place(network(16)).train(), network(32)
    freeze(teacher, device)
    spec = Spec(student.shapes(32), teacher.shapes(32), 10, len(images))
    method = device.place(kind(kind.Config(name=name, **SETTINGS[name]), spec))
    split = Split(images, labels, torch.arange(len(images)), torch.tensor(MEAN), torch.tensor(STD)).to(device.torch)
    optimizer = SGD(name="sgd", lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    (stepper,) = optimizer.build([*student.parameters(), *method.parameters()])
    source, spent = batches(split, BATCH, 0, 0, AUGMENT), dict[str, list[float]]()
    held: dict[str, Any] = {"t": None}

    def timed(part: str, work: Callable[[], Any]) -> None:
        spent.setdefault(part, []).append(1e3 * clock(work, device))

    def teach() -> None:
        with torch.no_grad(), device.autocast():
            held["t"] = teacher.tapped(held["b"].x, method.teacher_taps)

    def forward() -> None:
        with device.autocast():
            held["s"] = student.tapped(held["b"].x, method.student_taps)
        said = {k: v._replace(logits=v.logits.float(), taps={n: x.float() for n, x in v.taps.items()})
                for k, v in held.items() if k in "st" and v is not None}  # fmt: skip
        held["loss"] = sum(w * v for w, v in method(held["b"], said["s"], said.get("t")).values())

    for _ in range(min(steps, split.batches(BATCH))):
        timed("data", lambda: held.update(b=next(source)))
        if kind.needs_teacher:
            timed("teacher", teach)
        timed("forward", forward)
        timed("backward", lambda: held["loss"].backward())
        timed("optimizer", lambda: (stepper.step(), stepper.zero_grad(set_to_none=True)))
    return {part: round(statistics.median(values), 2) for part, values in spent.items()}


def matrix_rate(device: Device, n: int = 2048) -> float:
    """FLOP/s of an n x n x n matrix product in the device's precision: the best of ten."""
    a, b = (torch.randn(n, n, device=device.torch, dtype=device.dtype) for _ in range(2))
    return 2 * n**3 / min(clock(lambda: a @ b, device) for _ in range(10))


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.throughput", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=6400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/throughput.json"))
    asked = parser.parse_args()
    devices.settle(None)
    device = devices.resolve(asked.device, "auto", CACHE)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (asked.images, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (asked.images,), generator=generator)
    rate = matrix_rate(device)
    count = asked.images // BATCH * BATCH
    rows = []
    print(f"{device.torch}, {device.dtype}; a 2048^3 matrix product runs at {rate / 1e9:.0f} GFLOP/s")
    print(f"{'':10}{'plain':>9}{'kd':>9}   images/s{'ratio':>9}{'target':>8}{'of floor':>10}   ms a step")
    for name in SETTINGS:
        loops = {"plain": theirs(name, images, labels, device), "kd": ours(name, images, labels, device)}
        for loop in loops.values():
            next(loop)  # warm
        seconds: dict[str, list[float]] = {which: [] for which in loops}
        for _ in range(asked.repeats):
            for which, loop in loops.items():
                seconds[which].append(clock(lambda loop=loop: next(loop), device))  # type: ignore[misc]
        ratio = statistics.median(p / k for p, k in zip(seconds["plain"], seconds["kd"], strict=True))
        speed = {which: count / statistics.median(found) for which, found in seconds.items()}
        row = {
            "method": name,
            **{f"{which}_images_per_second": round(value) for which, value in speed.items()},
            "ratio": round(ratio, 2),
            "target": TARGETS[name],
            "of_floor": round(speed["kd"] * FLOPS[name] / rate, 3),
            "ms_a_step": parts(name, images, labels, device),
            "seconds": seconds,
        }
        rows.append(row)
        said = "  ".join(f"{part} {ms}" for part, ms in row["ms_a_step"].items())
        print(f"{name:10}{speed['plain']:9.0f}{speed['kd']:9.0f}{'':11}{ratio:9.2f}{TARGETS[name]:8.1f}"
              f"{100 * row['of_floor']:9.0f} %   {said}")  # fmt: skip
    where = environment(device)
    found = {"images": count, "batch_size": BATCH, "matrix_flops": rate, "rows": rows, "environment": where}
    asked.out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"written to {asked.out}")


if __name__ == "__main__":
    main()
