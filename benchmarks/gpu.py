"""Benchmarks and tests for a machine with a CUDA GPU, in parts that can be run one by one.

    bash benchmarks/gpu.sh [--dry] [--parts device,tests,throughput,sweep,cifar10]
                           [--data FILE.npz] [--out gpu]

Each part prints a table and writes a JSON file.

device       name of the GPU, and the rates of its matrix products and of its memory
tests        the tests of alignment, resuming, teacher outputs and kernels, with training on the GPU
throughput   python -m benchmarks.throughput: kd compared with a plain training loop
sweep        a sweep of digits whose teacher outputs are a table on the GPU
cifar10      one teacher and two students on CIFAR-10: seconds per epoch and accuracy (needs --data)

A part that fails does not stop the others; the exit code is then 1. `--dry` runs every part on the
CPU with tiny sizes and random images: it checks this script, and its numbers are meaningless.
"""

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from benchmarks.measure import clock, matrix_rate
from benchmarks.packed_images import pack, unpack
from kd.core.errors import UserError, first_line
from kd.core.io import read_json, write_json
from kd.training.device import Device, resolve
from kd.training.environment import environment

ROOT = Path(__file__).parents[1]
TESTS = ("train", "views", "outputs", "misaligned", "resume", "kernels")
DRY_TESTS = ("views",)  # the gate runs the others anyway


class Part(NamedTuple):
    """A part: a function that returns the content of its JSON file, and its time limit in s."""

    run: Callable[["Bench"], dict[str, Any]]
    seconds: int


class PartError(Exception):
    """A part failed; the message gives the reason."""


class Bench(NamedTuple):
    """The settings that all parts share."""

    device: str
    dry: bool
    data: Path | None
    out: Path
    scratch: Path
    deadline: float

    def python(
        self, *words: str, check: bool = True, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `python` with these arguments; end it when the part's time is over.

        Its output is not captured.
        """
        print(f"$ python {' '.join(words)}", flush=True)
        variables = {**os.environ, "KD_CACHE": str(self.scratch / "cache"), **more}
        left = max(1.0, self.deadline - time.monotonic())
        try:
            done = subprocess.run(
                [sys.executable, *words],
                cwd=ROOT,
                env=variables,
                text=True,
                timeout=left,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise PartError(f"it did not end in {left:.0f} s") from None
        if check and done.returncode:
            raise PartError(
                f"python {' '.join(words[:4])} ... ended with exit code {done.returncode}"
            )
        return done


def measure_device(bench: Bench) -> dict[str, Any]:
    """Measure TFLOP/s of a matrix product in each precision, and GB/s of a copy in memory."""
    chosen = resolve(bench.device, "fp32", bench.scratch / "cache")
    on_gpu = chosen.torch.type == "cuda"
    size, side = (1 << 22, 256) if bench.dry else (1 << 30, 8192)
    rates = {}
    for name, dtype, tf32 in (("float32", torch.float32, False), ("tf32", torch.float32, True),
                              ("bfloat16", torch.bfloat16, False)):  # fmt: skip
        torch.backends.cuda.matmul.allow_tf32 = tf32
        rates[name] = matrix_rate(Device(chosen.torch, dtype), side) / 1e12
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.empty(size, dtype=torch.uint8, device=chosen.torch)
    target = torch.empty_like(source)
    seconds = min(clock(functools.partial(target.copy_, source), chosen) for _ in range(10))
    result = {
        "name": torch.cuda.get_device_name(chosen.torch) if on_gpu else "CPU",
        "memory_gb": torch.cuda.get_device_properties(chosen.torch).total_memory / 1e9
        if on_gpu
        else None,
        "matrix_side": side,
        "matrix_tflops": rates,
        "copy_gb_per_second": 2 * size / seconds / 1e9,  # read and written
        "cpu_cores": os.cpu_count(),
        "environment": environment(chosen),
    }
    rows = [[name, f"{rate:.3g} TFLOP/s"] for name, rate in rates.items()]
    print_table(
        ["device", result["name"]],
        [*rows, ["memory copy", f"{result['copy_gb_per_second']:.0f} GB/s"]],
    )
    return result


def run_tests(bench: Bench) -> dict[str, Any]:
    """Run the tests of the training path with `KD_TEST_DEVICE`, and list those that fail."""
    report = bench.scratch / "tests.xml"
    names = DRY_TESTS if bench.dry else TESTS
    files = [str(next(ROOT.glob(f"tests/*/test_{name}.py"))) for name in names]
    workers = "0" if bench.dry else "6"
    words = [
        "-m",
        "pytest",
        "-q",
        "-m",
        "slow or not slow",
        "-n",
        workers,
        "--junitxml",
        str(report),
        "-k",
        "not cluster",
        *files,
    ]
    bench.python(*words, check=False, KD_TEST_DEVICE=bench.device)
    if not report.exists():
        raise PartError("pytest wrote no report")
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failures = {
        f"{case.get('classname')}::{case.get('name')}": problem.get("message", "").split("\n")[0]
        for case in cases
        for problem in [*case.findall("failure"), *case.findall("error")]
    }
    skipped = sum(case.find("skipped") is not None for case in cases)
    result = {
        "tests": len(cases),
        "failed": len(failures),
        "skipped": skipped,
        "failures": failures,
    }
    print_table(
        ["test that failed", "message"], [[name, text[:90]] for name, text in failures.items()]
    )
    print(
        f"{len(cases) - len(failures) - skipped} passed, {len(failures)} failed, {skipped} skipped"
    )
    if failures or not cases:
        write_json(bench.out / "tests.json", result)
        raise PartError(f"{len(failures)} of {len(cases)} tests failed")
    return result


def measure_throughput(bench: Bench) -> dict[str, Any]:
    """Measure images per second of kd and the plain loop; benchmarks.throughput prints a table."""
    file = bench.scratch / "throughput.json"
    sizes = ["--images", "600", "--steps", "2", "--repeats", "1"]
    if not bench.dry:
        sizes = ["--images", "50000", "--steps", "30", "--repeats", "3"]
    bench.python(
        "-m", "benchmarks.throughput", "--device", bench.device, *sizes, "--out", str(file)
    )
    return dict(json.loads(file.read_text()))


def run_sweep(bench: Bench) -> dict[str, Any]:
    """Distil digits with every teacher output kept in a table on the device."""
    words = [
        "method=standard,logits,feature",
        "seed=0,1",
        "data=digits",
        "teacher.cache.fill=eager",
    ]
    return distill(bench, "digits", words, ["teacher.scale=2", "student.scale=1"])


def train_cifar10(bench: Bench) -> dict[str, Any]:
    """Train one teacher of scale 32 and two students of scale 16 with kd's usual recipe."""
    folder, file = bench.scratch / "cifar10", bench.data
    if file is None:
        if not bench.dry:
            raise PartError(
                "give the images with --data FILE.npz; "
                "python -m benchmarks.packed_images writes that file"
            )
        file = bench.scratch / "pictures.npz"
        pack(make_pictures(bench.scratch / "pictures"), file)
    print(f"{unpack(file, folder):,} images", flush=True)
    words = ["method=standard,logits", "data=imagefolder", f"data.root={folder}"]
    tiny = [
        "teacher.scale=2",
        "student.scale=1",
        "data.val_size=10",
        "batch_size=10",
        "teacher.batch_size=10",
    ]
    return distill(bench, "cifar10", words, tiny)


def make_pictures(folder: Path) -> Path:
    """Create a folder of 40 training and 10 test images of noise, in two classes."""
    from PIL import Image

    draw = torch.Generator().manual_seed(0)
    for split, count in (("train", 20), ("test", 5)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=draw)
                Image.fromarray(pixels.numpy()).save(folder / split / name / f"{number}.jpg")
    return folder


def distill(bench: Bench, name: str, words: Sequence[str], tiny: Sequence[str]) -> dict[str, Any]:
    """Run a sweep of kd and tabulate its runs and its teacher's; `tiny`: overrides of a dry run."""
    runs, sweep = bench.scratch / name / "runs", bench.scratch / name / "sweep"
    more = [*tiny, "teacher.epochs=1", "student.epochs=1"] if bench.dry else []
    paths = [
        f"paths.runs={runs}",
        f"hydra.sweep.dir={sweep}",
        f"device={bench.device}",
        "tracker.mode=disabled",
    ]
    start = time.monotonic()
    bench.python("-m", "kd", "-m", *words, *more, *paths)
    seconds = time.monotonic() - start
    results = [found for path in sorted(runs.glob("*/result.json")) if (found := read_json(path))]
    rows = [summarize(result) for result in results]
    if len(rows) < 2 or any(row["device"] != bench.device.partition(":")[0] for row in rows):
        raise PartError(f"{len(rows)} runs ended, on {sorted({row['device'] for row in rows})}")
    table = pd.DataFrame(rows)
    head = [
        "run",
        "test, %",
        "s per epoch",
        "first epoch, s",
        "images/s",
        "teacher outputs read, %",
    ]
    lines = [
        [row["run"], f"{100 * row['test_accuracy']:.2f}", f"{row['epoch_seconds']:.2f}",
         f"{row['first_epoch_seconds']:.2f}", f"{row['images_per_second']:,.0f}",
         "" if row["teacher_outputs_read"] is None else f"{100 * row['teacher_outputs_read']:.0f}"]
        for row in rows
    ]  # fmt: skip
    print_table(head, lines)
    print(f"{seconds:.0f} s from typing to report")
    return {
        "seconds": seconds,
        "rows": rows,
        "median_epoch_seconds": float(table["epoch_seconds"].median()),
    }


def summarize(result: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a run, from its result.json."""
    epochs = result["time"]["epoch_seconds"]
    later = epochs[1:] or epochs
    return {
        "run": f"{result['method']} {result['student']} s{result['seed']}",
        "test_accuracy": result["metrics"]["test_accuracy"],
        "epoch_seconds": sum(later) / len(later),
        "first_epoch_seconds": epochs[0],
        "images_per_second": result["time"]["images_per_second"],
        "teacher_outputs_read": result["time"]["teacher_read"],
        "device": result["environment"]["device"],
        "precision": result["environment"]["precision"],
        "epochs": result["epochs"],
    }


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from tabulate import tabulate

    print(tabulate(rows, headers=head, disable_numparse=True), flush=True)


PARTS = {
    "device": Part(measure_device, 60),
    "tests": Part(run_tests, 200),
    "throughput": Part(measure_throughput, 150),
    "sweep": Part(run_sweep, 90),
    "cifar10": Part(train_cifar10, 200),
}
LIMIT = 580  # seconds of all parts together


def main() -> None:
    parser = argparse.ArgumentParser(
        "benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="which parts, with commas between them"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--data", type=Path, help="CIFAR-10 as packed by python -m benchmarks.packed_images"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("gpu"), help="where PART.json and summary.json are written"
    )
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny sizes")
    arguments = parser.parse_args()
    names = arguments.parts.split(",")
    if unknown := sorted(set(names) - set(PARTS)):
        parser.error(f"--parts: {', '.join(unknown)} is not known; allowed: {', '.join(PARTS)}")
    device = "cpu" if arguments.dry else arguments.device
    try:
        with tempfile.TemporaryDirectory(prefix="kd-gpu-") as scratch:
            resolve(device, "fp32", Path(scratch))
            failed = run_parts(names, arguments, device, Path(scratch))
    except UserError as error:
        parser.error(str(error))
    sys.exit(1 if failed else 0)


def run_parts(
    names: Sequence[str], arguments: argparse.Namespace, device: str, scratch: Path
) -> list[str]:
    """Run the parts in turn and write their JSON. Returns the names of those that failed."""
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + (3600 if arguments.dry else LIMIT)
    summary: dict[str, dict[str, Any]] = {}
    for name in names:
        part, start = PARTS[name], time.monotonic()
        deadline = end if arguments.dry else min(end, start + part.seconds)
        print(f"\n== {name} ==", flush=True)
        data = arguments.data.absolute() if arguments.data else None
        bench = Bench(device, arguments.dry, data, out, scratch, deadline)
        summary[name] = {"passed": False, "error": None}
        try:
            write_json(out / f"{name}.json", part.run(bench))
            summary[name]["passed"] = True
        except Exception as error:  # the next part still has something to show
            summary[name]["error"] = f"{type(error).__name__}: {first_line(error)}"
            print(f"{name} failed: {first_line(error)}", flush=True)
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
        summary[name]["seconds"] = round(time.monotonic() - start, 1)
        write_json(out / "summary.json", {"device": device, "dry": arguments.dry, "parts": summary})
    print("\n== summary ==")
    rows = [
        [name, "passed" if row["passed"] else row["error"], f"{row['seconds']:.0f} s"]
        for name, row in summary.items()
    ]
    print_table(["part", "result", "time"], rows)
    return [name for name, row in summary.items() if not row["passed"]]


if __name__ == "__main__":
    main()
