"""Describe what was run in words: command, data, networks, versions, machine and time.

Everything is read from the files of sweeps and runs.
"""

import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from kd.core.io import read_json
from kd.runs.locate import STARTED
from kd.runs.schema import SweepCommand, read_record

MAX_VARIANTS = 3  # distinct values listed per fact
LONG = 300  # characters of a value that are shown
ORDER = ("data", "student", "teacher", "training", "seeds", "versions", "machine")


class Fact(NamedTuple):
    """A line of "What was run".

    Attributes:
        name: What the line is about.
        texts: The distinct values.
        command: Whether the texts are command lines.
    """

    name: str
    texts: list[str]
    command: bool = False


# The distinct values of each fact, in order of first occurrence; the inner dict is an ordered set
Grouped = dict[str, dict[str, None]]


def note(
    grouped: Grouped,
    flat: Mapping[str, Any],
    has_teacher: bool,
    result: Mapping[str, Any] | None,
) -> None:
    """Add the facts of one run to `grouped`.

    Args:
        grouped: The facts collected so far; modified in place.
        flat: The configuration of the run, by dotted keys.
        has_teacher: Whether a teacher takes part in the run.
        result: The result of the run. Without one, its facts are stored as `planned`.
    """
    environment = (result or {}).get("environment")
    environment = environment if isinstance(environment, dict) else {}
    texts = {
        "data": _data(flat, result),
        "student": _student(flat, result),
        "teacher": _teacher(flat, result) if has_teacher else "",
        "training": _training(flat),
        "seeds": str(flat.get("seed", "")),
        "versions": _versions(environment),
        "machine": _machine(environment),
        "command": _run_command(environment.get("command")),
    }
    for name, text in texts.items():
        if text:
            key = name if result or name == "seeds" else f"planned {name}"
            grouped.setdefault(key, {})[text if name == "command" else text[:LONG]] = None


def facts(
    directories: Sequence[Path],
    grouped: Grouped,
    seconds: Sequence[float],
    run_folders: Iterable[Path],
) -> list[Fact]:
    """Return the facts about everything that was run in `directories`.

    Args:
        directories: Directories of sweeps or runs.
        grouped: The facts of their runs, collected by `note`.
        seconds: Training time of each finished run.
        run_folders: Directories of the finished runs.
    """
    starts = [
        (folder, *read_record(SweepCommand, folder / STARTED))
        for folder in directories
        if (folder / STARTED).exists()
    ]
    lines = []
    for folder, start, damage in starts:
        if start is None:
            lines.append(Fact("command", [damage]))
            continue
        host = start["environment"].get("host")
        on_host = f" on {host}" if host else ""
        started = f"{_format_time(start['started'])} in {start['directory']}{on_host}"
        title = "command" if len(directories) == 1 else f"command of {folder.name}"
        lines.append(Fact(title, [_shell_line(start["command"])], command=True))
        lines.append(Fact("started", [started]))
    if not starts and grouped.get("command"):
        lines.append(Fact("command", _first(grouped["command"]), command=True))
    of_runs = {
        name: list(grouped.get(name) or grouped.get(f"planned {name}", {})) for name in ORDER
    }
    environments = [start["environment"] for _, start, _ in starts if start]
    of_runs["versions"] = of_runs["versions"] or _distinct(map(_versions, environments))
    of_runs["machine"] = of_runs["machine"] or _distinct(map(_machine, environments))
    packages = _distinct(text for environment in environments for text in _packages(environment))
    if packages:
        of_runs["versions"] = [*_first(of_runs["versions"], MAX_VARIANTS - 1), ", ".join(packages)]
    of_runs["seeds"] = [", ".join(_first(of_runs["seeds"], 20))] if of_runs["seeds"] else []
    lines += [
        Fact(name, _first(texts, MAX_VARIANTS + 1)) for name, texts in of_runs.items() if texts
    ]
    start_times = [start["started"] for _, start, _ in starts if start]
    if seconds:
        lines.append(Fact("time", _times(seconds, start_times, run_folders)))
    return lines


def _distinct(texts: Iterable[str]) -> list[str]:
    """Return the distinct non-empty texts in order of first occurrence."""
    return list(dict.fromkeys(filter(None, texts)))


def _first(texts: Iterable[str], most: int = MAX_VARIANTS) -> list[str]:
    texts = list(texts)
    return [*texts[:most], *([f"and {len(texts) - most} more"] if len(texts) > most else [])]


def duration(seconds: float) -> str:
    """Format a duration for people: 4.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def _times(
    seconds: Sequence[float], start_times: Sequence[str], run_folders: Iterable[Path]
) -> list[str]:
    """Return how long the students were trained, and how long the sweep took."""
    total = duration(math.fsum(seconds))
    if len(seconds) == 1:
        texts = [f"the student was trained for {total}"]
    else:
        each = f"{duration(min(seconds))} to {duration(max(seconds))}"
        texts = [f"{len(seconds)} students were trained for {total} in total, {each} each"]
    ends = [end for folder in run_folders if len(start_times) == 1 and (end := _end_time(folder))]
    if ends and (start := _timestamp(start_times[0])) and max(ends) > start:
        texts.append(f"{duration(max(ends) - start)} from the start to the last result")
    return texts


def _end_time(folder: Path) -> float | None:
    """Return when a run was finished, in seconds since 1970."""
    status = read_json(folder / "status.json")
    if not isinstance(status, dict) or status.get("state") != "done":
        return None
    end = status.get("time")
    return end if isinstance(end, float) and math.isfinite(end) else None


def _timestamp(iso_time: str) -> float | None:
    try:
        return datetime.fromisoformat(iso_time).timestamp()
    except (ValueError, OverflowError):
        return None


def _format_time(iso_time: str) -> str:
    try:
        return datetime.fromisoformat(iso_time).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return iso_time


def _run_command(args: Any) -> str:
    """Return the command line of a run as its result records it; "" if it is damaged."""
    if not isinstance(args, list) or not all(isinstance(arg, str) for arg in args) or not args:
        return ""
    return _shell_line(["python", "-m", "kd", *args[1:]] if args[0] == "__main__.py" else args)


def _shell_line(args: Sequence[str]) -> str:
    """Quote a command for a shell and mask the password that a database URL may contain."""
    return shlex.join(re.sub(r"(://[^/:@\s]*):\S*@", r"\1:***@", arg) for arg in args)


def _count(number: Any, noun: str) -> list[str]:
    return [f"{number:,} {noun}"] if isinstance(number, int) else []


def _joined(*texts: Any) -> str:
    return ", ".join(str(text) for text in texts if text not in (None, ""))


def _data(flat: Mapping[str, Any], result: Mapping[str, Any] | None) -> str:
    samples = result["samples"] if result else {}
    splits = [("train", "training"), ("val", "validation"), ("test", "test")]
    counts = [text for split, noun in splits for text in _count(samples.get(split), noun)]
    images = f": {', '.join(counts)} images" if counts else ""
    root = f", from {flat['data.root']}" if flat.get("data.root") else ""
    return f"{flat.get('data.name', '')}{images}{root}"


def _network(flat: Mapping[str, Any], side: str) -> str:
    """Return a network's name and size from the configuration, for runs without a result."""
    values = (flat.get(f"{side}.{key}") for key in ("name", "model", "depth", "scale", "width"))
    return "-".join(str(value) for value in values if value is not None)


def _epochs(flat: Mapping[str, Any], side: str) -> str:
    epochs = flat.get(f"{side}.epochs")
    return "" if epochs is None else f"{epochs} epoch{'' if epochs == 1 else 's'}"


def _student(flat: Mapping[str, Any], result: Mapping[str, Any] | None) -> str:
    name = result["student"] if result else _network(flat, "student")
    params = _count(result["size"]["params"], "parameters") if result else []
    fraction = flat.get("student.label_fraction")
    labels = ""
    if isinstance(fraction, float) and fraction < 1:
        labels = f"{100 * fraction:g} % of the labels"
    return _joined(name, *params, _epochs(flat, "student"), labels)


def _teacher(flat: Mapping[str, Any], result: Mapping[str, Any] | None) -> str:
    teacher = (result or {}).get("teacher") or {}
    test_accuracy = teacher.get("metrics", {}).get("test_accuracy")
    accuracy = "" if test_accuracy is None else f"{100 * test_accuracy:.2f} % on test"
    checkpoint = flat.get("teacher.checkpoint")
    origin = _epochs(flat, "teacher") if checkpoint is None else f"weights from {checkpoint}"
    params = _count(teacher.get("params"), "parameters")
    return _joined(teacher.get("name") or _network(flat, "teacher"), *params, origin, accuracy)


def _training(flat: Mapping[str, Any]) -> str:
    name = flat.get("optimizer.name")
    batches = f"batches of {flat['batch_size']}" if flat.get("batch_size") else ""
    optimizer = f"{name} at lr={flat.get('optimizer.lr')}" if name else ""
    return _joined(batches, optimizer, flat.get("schedule.name"))


def _versions(environment: Mapping[str, Any]) -> str:
    git = environment.get("git")
    commit = ""
    if isinstance(git, dict):
        changed = ", changed" if git.get("dirty") else ""
        commit = f" ({str(git.get('commit'))[:10]}{changed})"
    versions = [
        f"{name} {environment[name]}" for name in ("kd", "python", "torch") if environment.get(name)
    ]
    if commit:
        if versions and versions[0].startswith("kd "):
            versions = [f"{versions[0]}{commit}", *versions[1:]]
        else:
            versions = [f"kd{commit}", *versions]
    return ", ".join(versions)


def _packages(environment: Mapping[str, Any]) -> list[str]:
    return [f"{name} {environment[name]}" for name in ("hydra", "wandb") if environment.get(name)]


def _machine(environment: Mapping[str, Any]) -> str:
    threads = environment.get("threads")
    hardware = [
        environment.get("processor"),
        environment.get("device"),
        environment.get("precision"),
    ]
    return _joined(
        *hardware,
        f"{threads} thread{'' if threads == 1 else 's'}" if threads else "",
        environment.get("platform"),
    )
