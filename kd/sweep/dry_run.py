"""Print what a command would do, for `dry_run=true`; read files and write none."""

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
from kd.runs.schema import JobRecord, RunResult, read_record
from kd.training.checkpoint import Checkpoints

Speeds = Mapping[str, float]  # seconds per epoch of finished runs, by `_kind`

DUPLICATE = "same as job "  # start of the state of a job whose run an earlier job is


class RemainingWork(NamedTuple):
    """What is left to do of a run: its state, and the estimated seconds (None if unknown)."""

    state: str
    seconds: float | None


def describe(jobs: Sequence[tuple[JobRecord, Config]], workers: int | None) -> None:
    """Print one row per job, the teachers that the jobs need, and the estimated time.

    Args:
        jobs: The planned jobs with their configurations.
        workers: Number of worker processes, to divide the time by; None if unknown.
    """
    if not jobs:
        console.print_line("0 jobs")
        return
    speeds = _measured_speeds({absolute(config.paths.runs) for _, config in jobs})
    rows: list[list[str]] = []
    work: list[RemainingWork] = []
    teachers: dict[Path, Config] = {}
    first_jobs: dict[str, int] = {}  # by folder of the run, the number of the first job that has it
    shared: set[str] = set()
    if len(jobs) > 1:
        shared = set.intersection(*(set(job["overrides"]) for job, _ in jobs))
    for job, config in jobs:
        number = job["number"] + 1
        remaining = _remaining_work(config, speeds)
        if (earlier := first_jobs.setdefault(job["folder"], number)) != number:
            remaining = RemainingWork(f"{DUPLICATE}{earlier}", 0.0)
        work.append(remaining)
        differing = [override for override in job["overrides"] if override not in shared]
        rows.append([str(number), remaining.state, _format_time(remaining), " ".join(differing)])
        if remaining.state in ("found", "running") or remaining.state.startswith(DUPLICATE):
            continue
        teachers |= {run_dir(teacher): teacher for teacher in _all_teachers(config)}
    if common := [override for override in jobs[0][0]["overrides"] if override in shared]:
        console.print_line(f"all jobs: {' '.join(common)}")
    console.print_line(
        tabulate(rows, ["job", "state", "time", "overrides"], "plain", disable_numparse=True)
    )
    teacher_work = {
        folder: _remaining_work(teacher, speeds)
        for folder, teacher in teachers.items()
        if str(folder) not in first_jobs
    }
    for folder in teachers:
        among_jobs = RemainingWork(f"job {first_jobs.get(str(folder))}", 0.0)
        remaining = teacher_work.get(folder, among_jobs)
        path = str(console.display_path(folder))
        cells = ["teacher", remaining.state, _format_time(remaining), path]
        console.print_line("  ".join(cell for cell in cells if cell))
    _print_totals(work, list(teacher_work.values()), workers)


def _print_totals(
    work: Sequence[RemainingWork], teachers: Sequence[RemainingWork], workers: int | None
) -> None:
    states = Counter(
        "repeated" if job.state.startswith(DUPLICATE) else job.state.split(",")[0] for job in work
    )
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    console.print_line(f"{len(work)} jobs: {counts}")
    unknown = sum(run.seconds is None for run in (*work, *teachers))
    seconds = sum(run.seconds or 0.0 for run in (*work, *teachers))
    total = f"about {console.format_duration(seconds)}" if seconds or not unknown else "unknown"
    if workers and workers > 1 and seconds:
        total += f", {console.format_duration(seconds / workers)} on {workers} workers"
    if unknown and seconds:
        runs = "1 run" if unknown == 1 else f"{unknown} runs"
        total += f", plus {runs} of unknown duration (nothing similar has been trained)"
    console.print_line(f"time     {total}")
    console.print_line("dry run: nothing was trained or written")


def describe_search(
    searched: Sequence[str], settings: Mapping[str, Any], counts: Counter[str], n_trials: int
) -> None:
    """Print what a study searches, and how many of its trials remain.

    Args:
        searched: The overrides that span the search space.
        settings: The sweeper's settings to show, by key.
        counts: Number of existing trials in each state.
        n_trials: Number of trials that the study will have.
    """
    for override in searched:
        console.print_line(f"search   {override}")
    for key, value in settings.items():
        console.print_line(f"{key:<8} {value}")
    done = sum(counts.values())
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    console.print_line(
        f"trials   {n_trials}: {max(0, n_trials - done)} remain"
        + (f" ({states})" if states else "")
    )
    console.print_line("dry run: nothing was trained or written")


def _remaining_work(config: Config, speeds: Speeds) -> RemainingWork:
    """Return what is left to do of a run, whose directory may already hold some or all of it."""
    folder = run_dir(config)
    if not config.rerun and directory.load_result(folder):
        return RemainingWork("found", 0.0)
    seconds_per_epoch = speeds.get(_kind(config.to_dict(), config.description.fingerprint))
    done = None if config.rerun else Checkpoints(folder).epoch()
    seconds = None
    if seconds_per_epoch is not None:
        seconds = seconds_per_epoch * (config.student.epochs - (done or 0))
    if directory.read_status(folder).state == "running":
        return RemainingWork("running", seconds)
    if done is None:
        return RemainingWork("to train", seconds)
    return RemainingWork(f"to resume, {done} of {config.student.epochs} epochs done", seconds)


def _all_teachers(config: Config) -> Iterator[Config]:
    """Yield the teachers that a run trains if they are missing, preceded by their own teachers."""
    for teacher in config.trained_teachers():
        yield from _all_teachers(teacher)
        yield teacher


def _measured_speeds(runs_dirs: set[Path]) -> Speeds:
    """Return the seconds per epoch of each kind of run that has finished in these directories."""
    medians: dict[str, list[float]] = {}  # of the epochs of each run
    for runs_dir in runs_dirs:
        for path in runs_dir.glob("*/result.json"):
            result = read_record(RunResult, path)[0]
            epochs = (result or {}).get("time", {}).get("epoch_seconds")
            if epochs and result.get("config"):
                kind = _kind(result["config"], result.get("content"))
                medians.setdefault(kind, []).append(median(epochs))
    return {kind: median(seconds) for kind, seconds in medians.items()}


def _kind(config: Mapping[str, Any], content: str | None) -> str:
    """Return what mainly determines the duration of an epoch, as JSON.

    That is the method, the student, the images (`content` is their fingerprint) and the batch size.
    """
    model = {key: value for key, value in config["student"].items() if key != "epochs"}
    return json.dumps(
        [config["method"]["name"], model, content, config["batch_size"]], sort_keys=True
    )


def _format_time(work: RemainingWork) -> str:
    if work.seconds is None:
        return "unknown"
    return "" if work.seconds == 0 else console.format_duration(work.seconds)
