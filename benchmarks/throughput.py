"""Compare the images per second of kd's training path with those of the plain loop.

    python -m benchmarks.throughput [--repeats 5] [--device cpu] [--out benchmarks/throughput.json]

Both train the same networks (a student of scale 16, a teacher of scale 32) on the same images with
the same batch size, interleaved in one process. In each repeat every loop takes `--steps` steps,
one loop after the other, so that other load on the machine affects all of them; the ratio is the
median over the repeats.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import plain
from benchmarks.measure import Memory, clock, matrix_rate, on_disk, ratio
from benchmarks.networks import (
    AUGMENT,
    BATCH,
    CACHE,
    MEAN,
    STD,
    STUDENT_FLOPS,
    TEACHER_FLOPS,
    network,
)
from kd import methods
from kd.core.io import write_json
from kd.data.loader import Split, batches
from kd.methods import Batch, MethodContext
from kd.models import ModelOutput
from kd.optim import SGD, Schedule
from kd.training import device as devices
from kd.training.device import Device
from kd.training.environment import environment
from kd.training.loop import Recipe, TrainingState, train
from kd.training.teacher import TeacherForward, freeze
from kd.training.teacher_cache import TeacherCache, TeacherCacheSpec

SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {},
    "logits": {"alpha": 0.1, "T": 4.0},
    "feature": {"alpha": 0.1, "beta": 0.2, "T": 4.0, "pairs": [["pool2", "pool2"]]},
}


class Way(NamedTuple):
    """A training path of kd, and the target for its ratio to the plain loop."""

    title: str
    method: str
    target: float | None
    teacher: str  # "", or whether its outputs are "computed" (and kept) or "read"
    maps: bool = False


PATHS = (
    Way("standard", "standard", 4.0, ""),
    Way("logits, first run of a teacher", "logits", 4.0, "computed"),
    Way("logits, later runs", "logits", 6.0, "read"),
    Way("feature (1 map pair + logits)", "feature", 5.0, "computed"),
    Way("feature, maps kept, first run", "feature", None, "computed", maps=True),
    Way("feature, maps kept, later runs", "feature", 5.0, "read", maps=True),
)


class Pictures(NamedTuple):
    images: torch.Tensor
    labels: torch.Tensor

    def split(self, device: Device) -> Split:
        index = torch.arange(len(self.images))
        return Split(self.images, self.labels, index, torch.tensor(MEAN), torch.tensor(STD)).to(
            device.torch
        )


def pictures(count: int) -> Pictures:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=draw)
    return Pictures(images, torch.randint(0, 10, (count,), generator=draw))


class Ours(NamedTuple):
    """The objects that kd's training loop needs."""

    student: Any
    method: Any
    teach: TeacherCache | None
    split: Split
    optimizer: SGD


def ours(path: Way, found: Pictures, device: Device, kept: Path) -> Ours:
    kind = methods.find(path.method)
    torch.manual_seed(0)
    teacher, student = network(32), device.prepare_module(network(16))
    freeze(teacher, device)
    spec = MethodContext(student.shapes(32), teacher.shapes(32), 10, len(found.images))
    method = device.prepare_module(
        kind(kind.Config(name=path.method, **SETTINGS[path.method]), spec)
    )
    split, teach = found.split(device), None
    if kind.needs_teacher:
        place = TeacherCacheSpec(
            kept, 4.0, path.maps, device.torch.type == "cuda" and path.teacher == "read"
        )
        teach = TeacherCache(
            TeacherForward(teacher, method.teacher_taps, device), split, AUGMENT, 0, 1, place
        )
    optimizer = SGD(name="sgd", lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return Ours(student, method, teach, split, optimizer)


def our_steps(path: Way, found: Pictures, device: Device, kept: Path) -> Iterator[Any]:
    """Run kd's loop: yield an item per step."""
    made = ours(path, found, device, kept)
    schedule = Schedule(
        name="constant", warmup_fraction=0.0, final_lr_factor=0.0, milestones=[], gamma=1.0
    )
    state = TrainingState(made.student, made.method, made.optimizer)
    recipe = Recipe(10**6, BATCH, 0, AUGMENT, schedule)
    rows = train(state, made.teach, made.split, recipe, device)
    return (row for row in rows if row is None)


def their_steps(method: str, found: Pictures, device: Device) -> Iterator[float]:
    """Run the plain loop: yield the loss of each step."""
    student, teacher = network(16).to(device.torch), network(32).to(device.torch)
    regressor = torch.nn.Conv2d(32, 64, 1).to(device.torch) if method == "feature" else None
    data = plain.Images(*found, MEAN, STD)
    return plain.steps(
        student, None if method == "standard" else teacher, regressor, data, BATCH, device.torch
    )


def take(loop: Iterator[Any], steps: int) -> None:
    for _ in islice(loop, steps):
        pass


def parts(
    path: Way, found: Pictures, device: Device, kept: Path, steps: int = 20
) -> dict[str, float]:
    """Measure the milliseconds of each part of kd's step separately, as the median of `steps`."""
    made = ours(path, found, device, kept)
    made.student.train()
    (stepper,) = made.optimizer.build([*made.student.parameters(), *made.method.parameters()])
    source, spent = batches(made.split, BATCH, 0, 0, AUGMENT), dict[str, list[float]]()

    def timed(part: str, work: Callable[..., Any], *given: Any) -> Any:
        kept_: list[Any] = []
        spent.setdefault(part, []).append(1e3 * clock(lambda: kept_.append(work(*given)), device))
        return kept_[0]

    def forward(batch: Batch) -> ModelOutput:
        with device.autocast():
            return made.student.forward_taps(batch.x, made.method.student_taps).float()

    def loss_of(batch: Batch, seen: ModelOutput, said: ModelOutput | None) -> torch.Tensor:
        return sum(
            (w * v for w, v in made.method(batch, seen, said).values()),
            torch.zeros(()).to(batch.x.device),
        )

    for _ in range(min(steps, made.split.batches(BATCH))):
        batch = timed("data", next, source)
        said = None if made.teach is None else timed("teacher", made.teach, batch)
        loss = timed("loss", loss_of, batch, timed("forward", forward, batch), said)
        timed("backward", loss.backward)
        timed("optimizer", lambda: (stepper.step(), stepper.zero_grad(set_to_none=True)))
    return {part: round(statistics.median(values), 2) for part, values in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        "benchmarks.throughput", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/throughput.json"))
    parser.add_argument(
        "--only", help=argparse.SUPPRESS
    )  # for the memory of one path: a process of its own
    parser.add_argument("--kept", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    devices.configure_process(None)
    device = devices.resolve(asked.device, "auto", CACHE)
    found = pictures(asked.images)
    if asked.only:
        (path,) = (p for p in PATHS if asked.only in (p.title, f"plain {p.title}"))
        is_ours = asked.only == path.title
        take(
            our_steps(path, found, device, asked.kept)
            if is_ours
            else their_steps(path.method, found, device),
            10,
        )
        return

    rate, rows = matrix_rate(device), list[dict[str, Any]]()
    print(
        f"{device.torch}, {device.dtype}; a 2048^3 matrix product runs at {rate / 1e9:.0f} GFLOP/s"
    )
    print(
        f"{'':32}{'plain':>7}{'kd':>7} images/s{'ratio':>7}{'target':>8}{'of peak':>10}"
        "   ms per step"
    )
    for method in SETTINGS:
        kept = Path(tempfile.mkdtemp(prefix="kd-benchmark-"))
        ways = [path for path in PATHS if path.method == method]
        places = {path: kept / ("maps" if path.maps else "logits") for path in ways}
        loops = {"plain": their_steps(method, found, device)}
        loops |= {path.title: our_steps(path, found, device, places[path]) for path in ways}
        for loop in loops.values():
            take(loop, 10)  # warm
        seconds: dict[str, list[float]] = {title: [] for title in loops}
        for _ in range(asked.repeats):
            # loops that read teacher outputs come after those that compute them
            for title, loop in loops.items():
                seconds[title].append(clock(partial(take, loop, asked.steps), device))
        del loops
        speed = {
            title: asked.steps * BATCH / statistics.median(times)
            for title, times in seconds.items()
        }
        theirs = memory(["--only", f"plain {ways[0].title}"], asked)
        for path in ways:
            fresh = kept / "fresh"
            flops = STUDENT_FLOPS + TEACHER_FLOPS * (path.teacher == "computed")
            ms = parts(path, found, device, places[path] if path.teacher == "read" else fresh)
            words = [
                "--only",
                path.title,
                "--kept",
                str(places[path] if path.teacher == "read" else fresh / "again"),
            ]
            rows.append(
                {
                    "path": path.title,
                    "method": method,
                    "plain": round(speed["plain"]),
                    "kd": round(speed[path.title]),
                    "ratio": ratio(seconds["plain"], seconds[path.title]),
                    "target": path.target,
                    "of_floor": round(speed[path.title] * flops / rate, 3),
                    "ms_a_step": ms,
                    "memory_mb": {"plain": theirs, "kd": memory(words, asked)},
                    "disk_mb": round(on_disk(places[path])) if path.teacher else 0,
                    "seconds": {"plain": seconds["plain"], "kd": seconds[path.title]},
                }
            )
            row = rows[-1]
            said = "  ".join(f"{part} {ms}" for part, ms in row["ms_a_step"].items())
            print(
                f"{path.title:32}{row['plain']:7}{row['kd']:7}{'':9}{row['ratio']:7.2f}"
                f"{path.target or '':>8}{100 * row['of_floor']:9.0f} %   {said}",
                flush=True,
            )
            shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(kept)
    write_json(
        asked.out,
        {
            "images": asked.images,
            "batch_size": BATCH,
            "steps": asked.steps,
            "repeats": asked.repeats,
            "matrix_flops": rate,
            "rows": rows,
            "environment": environment(device),
        },
    )
    print(f"written to {asked.out}")


def memory(words: list[str], asked: argparse.Namespace) -> int:
    """Return the peak megabytes of a process that takes ten steps of one path."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.throughput",
        "--images",
        str(asked.images),
        "--device",
        asked.device,
    ]
    process = subprocess.Popen([*command, *words])
    with Memory(process.pid, every=0.2) as watched:
        if process.wait():
            raise SystemExit(f"benchmarks.throughput: {words} failed")
    return round(watched.peak)


if __name__ == "__main__":
    main()
