"""What was run, in words: command, data, networks, versions, machine and time, from the files of sweeps and runs."""

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

MAX_VARIANTS = 3  # values of one thing that are named
LONG = 300  # characters of a value
ORDER = ("data", "student", "teacher", "training", "seeds", "versions", "machine")


class Fact(NamedTuple):
    """A line of "What was run": `command` texts are what was typed."""

    name: str
    texts: list[str]
    command: bool = False


Grouped = dict[
    str, dict[str, None]
]  # of each thing its distinct values, in the order in which they came


def note(
    seen: Grouped, flat: Mapping[str, Any], taught: bool, result: Mapping[str, Any] | None
) -> None:
    """Keep what one run's configuration (by dotted keys) and its result say of what was run; without a result it is
    kept as what is `planned`."""
    environment = (result or {}).get("environment")
    environment = environment if isinstance(environment, dict) else {}
    found = {
        "data": _data(flat, result),
        "student": _student(flat, result),
        "teacher": _teacher(flat, result) if taught else "",
        "training": _training(flat),
        "seeds": str(flat.get("seed", "")),
        "versions": _versions(environment),
        "machine": _machine(environment),
        "command": _command(environment.get("command")),
    }
    for name, text in found.items():
        if text:
            kind = name if result or name == "seeds" else f"planned {name}"
            seen.setdefault(kind, {})[text if name == "command" else text[:LONG]] = None


def facts(
    places: Sequence[Path], seen: Grouped, seconds: Sequence[float], folders: Iterable[Path]
) -> list[Fact]:
    """What was run in `places`. `seconds`: of the training of each finished run; `folders`: where those lie."""
    starts = [
        (place, *read_record(SweepCommand, place / STARTED))
        for place in places
        if (place / STARTED).exists()
    ]
    found = []
    for place, start, damage in starts:
        if start is None:
            found.append(Fact("command", [damage]))
            continue
        host = start["environment"].get("host")
        where = (
            f"{_moment(start['started'])} in {start['directory']}{f' on {host}' if host else ''}"
        )
        title = "command" if len(places) == 1 else f"command of {place.name}"
        found += [Fact(title, [_typed(start["command"])], command=True), Fact("started", [where])]
    if not starts and seen.get("command"):
        found.append(Fact("command", _first(seen["command"]), command=True))
    of_runs = {name: list(seen.get(name) or seen.get(f"planned {name}", {})) for name in ORDER}
    environments = [start["environment"] for _, start, _ in starts if start]
    of_runs["versions"] = of_runs["versions"] or list(
        dict.fromkeys(filter(None, map(_versions, environments)))
    )
    of_runs["machine"] = of_runs["machine"] or list(
        dict.fromkeys(filter(None, map(_machine, environments)))
    )
    if packages := list(
        dict.fromkeys(text for environment in environments for text in _packages(environment))
    ):
        of_runs["versions"] = [*_first(of_runs["versions"], MAX_VARIANTS - 1), ", ".join(packages)]
    of_runs["seeds"] = [", ".join(_first(of_runs["seeds"], 20))] if of_runs["seeds"] else []
    found += [
        Fact(name, _first(texts, MAX_VARIANTS + 1)) for name, texts in of_runs.items() if texts
    ]
    started = [start["started"] for _, start, _ in starts if start]
    if seconds:
        found.append(Fact("time", _times(seconds, started, folders)))
    return found


def _first(texts: Iterable[str], most: int = MAX_VARIANTS) -> list[str]:
    texts = list(texts)
    return [*texts[:most], *([f"and {len(texts) - most} more"] if len(texts) > most else [])]


def duration(seconds: float) -> str:
    """As a person says it: 4.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60:,} h {minutes % 60:02d} min"
    )


def _times(seconds: Sequence[float], started: Sequence[str], folders: Iterable[Path]) -> list[str]:
    """How long the students were trained, and how long the sweep took."""
    total = duration(math.fsum(seconds))
    if len(seconds) == 1:
        texts = [f"the student was trained for {total}"]
    else:
        each = f"{duration(min(seconds))} to {duration(max(seconds))}"
        texts = [f"{len(seconds)} students were trained for {total} in all, {each} each"]
    ends = [end for folder in folders if len(started) == 1 and (end := _ended(folder))]
    if ends and (begun := _seconds(started[0])) and max(ends) > begun:
        texts.append(f"{duration(max(ends) - begun)} from the start to the last result")
    return texts


def _ended(folder: Path) -> float | None:
    """When a run was finished, in seconds since 1970."""
    state = read_json(folder / "status.json")
    moment = state.get("time") if isinstance(state, dict) and state.get("state") == "done" else None
    return moment if isinstance(moment, float) and math.isfinite(moment) else None


def _seconds(moment: str) -> float | None:
    try:
        return datetime.fromisoformat(moment).timestamp()
    except (ValueError, OverflowError):
        return None


def _moment(moment: str) -> str:
    try:
        return datetime.fromisoformat(moment).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return moment


def _command(words: Any) -> str:
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words) or not words:
        return ""
    return _typed(["python", "-m", "kd", *words[1:]] if words[0] == "__main__.py" else words)


def _typed(words: Sequence[str]) -> str:
    """A command as it is typed in a shell, without the password that a database's address may hold."""
    return shlex.join(re.sub(r"(://[^/:@\s]*):\S*@", r"\1:***@", word) for word in words)


def _count(number: Any, what: str) -> list[str]:
    return [f"{number:,} {what}"] if isinstance(number, int) else []


def _joined(*texts: Any) -> str:
    return ", ".join(str(text) for text in texts if text not in (None, ""))


def _data(flat: Mapping[str, Any], result: Mapping[str, Any] | None) -> str:
    samples = result["samples"] if result else {}
    splits = [("train", "training"), ("val", "validation"), ("test", "test")]
    counts = [text for split, word in splits for text in _count(samples.get(split), word)]
    images = f": {', '.join(counts)} images" if counts else ""
    root = f", from {flat['data.root']}" if flat.get("data.root") else ""
    return f"{flat.get('data.name', '')}{images}{root}"


def _network(flat: Mapping[str, Any], side: str) -> str:
    """The network's name and numbers, before a result says them."""
    keys = (flat.get(f"{side}.{key}") for key in ("name", "model", "depth", "scale", "width"))
    return "-".join(str(key) for key in keys if key is not None)


def _epochs(flat: Mapping[str, Any], side: str) -> str:
    epochs = flat.get(f"{side}.epochs")
    return "" if epochs is None else f"{epochs} epoch{'' if epochs == 1 else 's'}"


def _student(flat: Mapping[str, Any], result: Mapping[str, Any] | None) -> str:
    params = _count(result["size"]["params"], "parameters") if result else []
    labels = flat.get("student.labels")
    few = f"{100 * labels:g} % of the labels" if isinstance(labels, float) and labels < 1 else ""
    return _joined(
        result["student"] if result else _network(flat, "student"),
        *params,
        _epochs(flat, "student"),
        few,
    )


def _teacher(flat: Mapping[str, Any], result: Mapping[str, Any] | None) -> str:
    teacher = (result or {}).get("teacher") or {}
    accuracy = teacher.get("metrics", {}).get("test_accuracy")
    reached = "" if accuracy is None else f"{100 * accuracy:.2f} % on test"
    checkpoint = flat.get("teacher.checkpoint")
    recipe = _epochs(flat, "teacher") if checkpoint is None else f"weights from {checkpoint}"
    params = _count(teacher.get("params"), "parameters")
    return _joined(teacher.get("name") or _network(flat, "teacher"), *params, recipe, reached)


def _training(flat: Mapping[str, Any]) -> str:
    optimizer, rate = flat.get("optimizer.name"), flat.get("optimizer.lr")
    batches = f"batches of {flat['batch_size']}" if flat.get("batch_size") else ""
    return _joined(
        batches, f"{optimizer} at lr={rate}" if optimizer else "", flat.get("schedule.name")
    )


def _versions(environment: Mapping[str, Any]) -> str:
    git = environment.get("git")
    commit = (
        f" ({str(git.get('commit'))[:10]}{', changed' if git.get('dirty') else ''})"
        if isinstance(git, dict)
        else ""
    )
    found = [
        f"{name} {environment[name]}" for name in ("kd", "python", "torch") if environment.get(name)
    ]
    if commit:
        found = (
            [f"{found[0]}{commit}", *found[1:]]
            if found and found[0].startswith("kd ")
            else [f"kd{commit}", *found]
        )
    return ", ".join(found)


def _packages(environment: Mapping[str, Any]) -> list[str]:
    return [f"{name} {environment[name]}" for name in ("hydra", "wandb") if environment.get(name)]


def _machine(environment: Mapping[str, Any]) -> str:
    threads = environment.get("threads")
    used = [environment.get("processor"), environment.get("device"), environment.get("precision")]
    return _joined(
        *used,
        f"{threads} thread{'' if threads == 1 else 's'}" if threads else "",
        environment.get("platform"),
    )
