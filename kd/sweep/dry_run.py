"""What a command would do, without doing it: `dry_run=true`. It reads files and writes none."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from tabulate import tabulate

from kd.config.schema import Config, absolute, run_dir
from kd.core import console
from kd.runs import directory
from kd.runs.schema import Result, read_record
from kd.training.checkpoint import Checkpoints

Job = dict[str, Any]
Speeds = Mapping[str, float]  # seconds per epoch of what was trained before, by `_kind`


class RemainingWork(NamedTuple):
    """What is left to do of a run: its state, and the seconds it needs, None where nothing is known."""

    state: str
    seconds: float | None


def describe(jobs: Sequence[tuple[Job, Config]], workers: int | None) -> None:
    """Print a row per job, the teachers they need, and an estimate of the time on so many workers."""
    if not jobs:
        console.print_line("0 jobs")
        return
    speeds = _speeds({absolute(config.root.paths.runs) for _, config in jobs})
    rows: list[list[str]] = []
    work: list[RemainingWork] = []
    teachers: dict[Path, Config] = {}
    first: dict[str, int] = {}
    shared = (
        set.intersection(*(set(job["overrides"]) for job, _ in jobs)) if len(jobs) > 1 else set()
    )
    for job, config in jobs:
        number = job["number"] + 1
        own = _work(config, speeds)
        if (earlier := first.setdefault(job["folder"], number)) != number:
            own = RemainingWork(f"as job {earlier}", 0.0)
        work.append(own)
        differing = [word for word in job["overrides"] if word not in shared]
        rows.append([str(number), own.state, _time(own), " ".join(differing)])
        if own.state in ("found", "running") or own.state.startswith("as job"):
            continue
        teachers |= {run_dir(one): one for one in _teachers(config)}
    if common := [word for word in jobs[0][0]["overrides"] if word in shared]:
        console.print_line(f"all jobs: {' '.join(common)}")
    console.print_line(
        tabulate(rows, ["job", "state", "time", "overrides"], "plain", disable_numparse=True)
    )
    beside = {
        folder: _work(one, speeds) for folder, one in teachers.items() if str(folder) not in first
    }
    for folder in teachers:
        own = beside.get(folder, RemainingWork(f"job {first.get(str(folder))}", 0.0))
        parts = ["teacher", own.state, _time(own), str(console.display_path(folder))]
        console.print_line("  ".join(part for part in parts if part))
    _conclude(work, list(beside.values()), workers)


def _conclude(
    work: Sequence[RemainingWork], teachers: Sequence[RemainingWork], workers: int | None
) -> None:
    states = Counter(
        "repeated" if one.state.startswith("as job") else one.state.split(",")[0] for one in work
    )
    console.print_line(
        f"{len(work)} jobs: {', '.join(f'{n} {state}' for state, n in states.items())}"
    )
    unknown = sum(one.seconds is None for one in (*work, *teachers))
    seconds = sum(one.seconds or 0.0 for one in (*work, *teachers))
    total = f"about {console.format_duration(seconds)}" if seconds or not unknown else "unknown"
    if workers and workers > 1 and seconds:
        total += f", {console.format_duration(seconds / workers)} on {workers} workers"
    if unknown and seconds:
        total += f", and {unknown} runs of which nothing similar has been trained"
    console.print_line(f"time     {total}")
    console.print_line("dry run: nothing was trained or written")


def describe_search(
    searched: Sequence[str], settings: Mapping[str, Any], counts: Counter[str], n_trials: int
) -> None:
    """Print what a study searches, and how many of its trials remain."""
    for word in searched:
        console.print_line(f"search   {word}")
    for key, value in settings.items():
        console.print_line(f"{key:<8} {value}")
    done = sum(counts.values())
    states = ", ".join(f"{n} {state}" for state, n in counts.items())
    console.print_line(
        f"trials   {n_trials}: {max(0, n_trials - done)} remain"
        + (f" ({states})" if states else "")
    )
    console.print_line("dry run: nothing was trained or written")


def _work(config: Config, speeds: Speeds) -> RemainingWork:
    """What a run would do, whose directory may hold it already or a part of it."""
    folder = run_dir(config)
    if not config.root.rerun and directory.load_result(folder):
        return RemainingWork("found", 0.0)
    seconds = speeds.get(_kind(config.to_dict(), config.description.fingerprint))
    done = None if config.root.rerun else Checkpoints(folder).epoch()
    left = None if seconds is None else seconds * (config.epochs - (done or 0))
    if directory.read_status(folder).state == "running":
        return RemainingWork("running", left)
    return RemainingWork(
        "to train" if done is None else f"to resume, {done} of {config.epochs} epochs done", left
    )


def _teachers(config: Config) -> Iterator[Config]:
    """The runs that a run trains if they are missing, with those that they train in turn."""
    for one in config.trained_teachers():
        yield from _teachers(one)
        yield one


def _speeds(places: set[Path]) -> Speeds:
    """Seconds per epoch of every kind of run that has finished in these directories."""
    seconds: dict[str, list[float]] = {}
    for path in (path for place in places for path in place.glob("*/result.json")):
        result = read_record(Result, path)[0]
        epochs = (result or {}).get("time", {}).get("epoch_seconds")
        if epochs and result.get("config"):
            seconds.setdefault(_kind(result["config"], result.get("content")), []).append(
                median(epochs)
            )
    return {kind: median(each) for kind, each in seconds.items()}


def _kind(config: Mapping[str, Any], content: str | None) -> str:
    """What the seconds of an epoch depend on most: method, student, images and batch size."""
    model = {key: value for key, value in config["student"].items() if key != "epochs"}
    return json.dumps(
        [config["method"]["name"], model, content, config["batch_size"]], sort_keys=True
    )


def _time(work: RemainingWork) -> str:
    return (
        "unknown"
        if work.seconds is None
        else ""
        if work.seconds == 0
        else console.format_duration(work.seconds)
    )
