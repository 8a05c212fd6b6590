"""Measurements of time, speed, memory and disk space for the benchmarks."""

import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from kd.training.device import Device


def clock(work: Callable[[], Any], device: Device) -> float:
    """Return the seconds that `work` takes, including queued work of the device."""
    wait(device)
    begun = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begun


def wait(device: Device) -> None:
    if device.torch.type == "cuda":
        torch.cuda.synchronize()


def matrix_rate(device: Device, n: int = 2048) -> float:
    """Return FLOP/s of an n x n x n matrix product in the device's precision, best of ten."""
    a, b = (torch.randn(n, n, device=device.torch, dtype=device.dtype) for _ in range(2))
    return 2 * n**3 / min(clock(lambda: a @ b, device) for _ in range(10))


def ratio(slow: list[float], fast: list[float]) -> float:
    """Return the median ratio of the times of paired runs."""
    return round(statistics.median(s / f for s, f in zip(slow, fast, strict=True)), 2)


class Memory:
    """Context manager that samples the memory of a process and its descendants.

    `peak` is the largest sum seen, in megabytes. Pages that several processes share are counted
    once (PSS). Linux only; elsewhere the peak stays 0.
    """

    def __init__(self, pid: int, every: float = 1.0):
        self.pid, self.every, self.peak = pid, every, 0.0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Memory":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.over.wait(self.every):
            self.peak = max(self.peak, sum(map(_pss, family(self.pid))) / 1e3)


def family(pid: int) -> list[int]:
    """Return the ids of a process and all its living descendants."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def _pss(pid: int) -> int:
    with suppress(OSError, ValueError, StopIteration):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    return 0


def on_disk(folder: Path) -> float:
    """Return the megabytes that the files under `folder` take on disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file()) / 1e6
