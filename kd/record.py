"""A run's directory. Everything is written aside and then renamed, and `result.json` comes last.

config.yaml        the configuration, resolved           history.csv           an epoch a row
result.json        metrics, sizes, times, environment    student.safetensors   the trained student
status.json        running, done, failed or diverged     error.txt             the traceback of a failed run
kd.log, .hydra/    what was said, what Hydra composed
"""

import csv
import io
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file, or None when the file is absent or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


class Record:
    """Writes the files of one run into `folder`."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").unlink(missing_ok=True)  # of an earlier try
        write_text(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))

    def status(self, state: str, reason: str = "") -> None:
        write_json(
            self.folder / "status.json",
            {"state": state, "reason": reason, "pid": os.getpid(), "host": platform.node(), "time": time.time()},
        )

    def failed(self, state: str, error: BaseException) -> None:
        """Keep why a run ended: one line in status.json, the whole traceback in error.txt."""
        write_text(self.folder / "error.txt", "".join(traceback.format_exception(error)))
        self.status(state, f"{type(error).__name__}: {error}")

    def epoch(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))
        write_text(self.folder / "history.csv", _csv(self.rows))

    def finish(self, result: Mapping[str, Any]) -> None:
        write_json(self.folder / "result.json", result)
        self.status("done")


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def finished(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run, or None."""
    found = read_json(folder / "result.json")
    return found if isinstance(found, dict) and "metrics" in found else None


def set_aside(folder: Path) -> None:
    """Make room for a rerun: what is there moves to superseded/N/, so that nothing is lost."""
    kept = folder / "superseded"
    target = kept / str(1 + sum(1 for _ in kept.iterdir()) if kept.exists() else 1)
    target.mkdir(parents=True)
    for name in ("result.json", "status.json", "history.csv", "config.yaml", "error.txt"):
        if (folder / name).exists():
            os.replace(folder / name, target / name)
    for weights in folder.glob("*.safetensors"):
        os.replace(weights, target / weights.name)


def environment(device: str, precision: str) -> dict[str, Any]:
    """What the numbers were made on."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": torch.cuda.get_device_name() if device.startswith("cuda") else _processor(),
        "device": device,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git": git_state(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def git_state() -> dict[str, Any] | None:
    """Commit and whether there are uncommitted changes, of kd's own source tree; None outside a repository."""

    def ask(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        return {"commit": ask("rev-parse", "HEAD").strip(), "dirty": bool(ask("status", "--porcelain", "."))}
    except (OSError, subprocess.SubprocessError):
        return None
