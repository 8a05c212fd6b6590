"""Build tables of runs from their files alone: no torch, no training, any state of a sweep."""

import csv
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from kd.core.io import write_json
from kd.core.settings import flatten
from kd.report.columns import COLUMNS
from kd.report.inference import MARGIN
from kd.report.provenance import Grouped, note
from kd.report.summary import AVERAGED, OBJECTIVE, ece_floor, finished_runs, summarise
from kd.runs import directory
from kd.runs.directory import printable, read_status
from kd.runs.labels import MISALIGNED, applies, describe, make_labels, method_name  # noqa: F401
from kd.runs.locate import PLAN, GivenFolders, Search, is_run, runs_in  # noqa: F401
from kd.runs.schema import (
    LARGEST,
    Config,
    Job,
    JobLocation,
    Plan,
    RunResult,
    StatusRecord,
    Study,
    find_error,
    read_record,
)
from kd.runs.status import RunState, RunStatus


class Tables(NamedTuple):
    """The tables of sweeps and runs.

    Attributes:
        runs: One row per run.
        history: One row per epoch.
        summary: One row per setting, with its seeds folded.
        swept: The configuration keys that differ between runs; they are columns too.
        reliability: The bins of the reliability diagram, by setting.
        searches: For each sweep that may have been moved, where its runs were found.
        provenance: The facts about what was run.
        margin: Differences of accuracy up to this count as none, as a fraction.
        objective: The validation metric that settings are chosen by.
        margin_is_late: Whether the margin was given after the test images were read.
    """

    runs: pd.DataFrame
    history: pd.DataFrame
    summary: pd.DataFrame
    swept: list[str]
    reliability: dict[str, dict[str, list[float]]]
    searches: Sequence[Search] = ()
    provenance: Grouped = {}  # noqa: RUF012
    margin: float = MARGIN
    objective: str = OBJECTIVE
    margin_is_late: bool = False

    def with_short_names(self) -> dict[str, str]:
        """Return the settings whose names are shortened, with their full names."""
        if "full_setting" not in self.runs:
            return {}
        names = self.runs[["setting", "full_setting"]].drop_duplicates()
        return {
            short: full for short, full in names.itertuples(index=False, name=None) if short != full
        }


def read_plan(folder: Path) -> list[dict[str, Any]]:
    """Return the planned jobs of a sweep that are not damaged; an empty list without a plan.

    The file stores their folders relative to the sweep's directory, which may have been moved.
    """
    return [job for job in _plan(folder) if "damage" not in job]


def write_plan(folder: Path, jobs: Iterable[Mapping[str, Any]]) -> None:
    """Write the plan that `read_plan` reads, with the jobs numbered in this order."""
    base = folder.resolve()
    entries = []
    for number, job in enumerate(jobs):
        paths = _with_paths(job, lambda path: os.path.relpath(path, base))
        entries.append({**job, "number": number, **paths})
    write_json(folder / PLAN, entries)


def discover_runs(
    directories: Iterable[Path], run_folders: Sequence[Path] | None = None
) -> tuple[list[dict[str, Any]], list[Search]]:
    """Return the jobs of sweeps and the runs in other directories, each run once.

    The finished `standard` runs that are the baselines of jobs are included even if they were not
    part of the sweep. A run that is damaged beyond use is a job without a configuration, and its
    `damage` is the reason.

    Args:
        directories: Directories of sweeps, or directories that contain runs.
        run_folders: Folders to search, in addition to those near a sweep, for runs that are not
            where they were planned. With None, such runs are not searched for.

    Returns:
        The jobs, and the search for the runs of each sweep.
    """
    jobs_by_folder: dict[str, dict[str, Any]] = {}
    searches = []
    given = GivenFolders(run_folders or ())
    for root in directories:
        jobs = _plan(root)
        sound = [job for job in jobs if "damage" not in job]
        if sound and run_folders is not None:
            searches.append(Search(root, given))
            searches[-1].locate(sound)
        for job in jobs if sound else [*jobs, *map(_job_from_run_dir, runs_in(root))]:
            jobs_by_folder.setdefault(job["folder"], job)
    baselines = [job["baseline"] for job in jobs_by_folder.values() if job.get("baseline")]
    for path in dict.fromkeys(baselines):
        if path not in jobs_by_folder and directory.load_result(Path(path)):
            jobs_by_folder[path] = _job_from_run_dir(Path(path))
    return list(jobs_by_folder.values()), searches


def _plan(folder: Path) -> list[dict[str, Any]]:
    """Return the planned jobs of a sweep.

    A damaged job is replaced by what the run's own files contain, if they can be found.
    """
    entries, damage = read_record(Plan, folder / PLAN)
    base = os.path.realpath(folder)
    jobs: list[dict[str, Any]] = []
    if damage:
        jobs.append({"folder": base, "overrides": [], "damage": damage})
    for number, entry in enumerate(entries or (), 1):
        problem = find_error(Job, entry)
        if not problem:
            paths = _with_paths(entry, lambda path: os.path.realpath(Path(base, path)))
            jobs.append(entry | paths)
            continue
        run_folder = "." if find_error(JobLocation, entry) else entry["folder"]
        job = _job_from_run_dir(Path(base, run_folder)) | {"number": number - 1}
        if "damage" in job:
            job["damage"] = f"{PLAN} is damaged: job {number}: {problem}"
        jobs.append(job)
    return jobs


def _with_paths(job: Mapping[str, Any], convert: Callable[[str], str]) -> dict[str, Any]:
    """Return the entries of a job that hold paths, with `convert` applied to each path."""
    paths: dict[str, Any] = {
        key: convert(job[key]) for key in ("folder", "baseline") if job.get(key)
    }
    if job.get("teachers"):
        paths["teachers"] = [convert(path) for path in job["teachers"]]
    return paths


def _job_from_run_dir(folder: Path) -> dict[str, Any]:
    """Return a run as if it had been planned, from its own files."""
    result, _ = read_record(RunResult, folder / "result.json")
    config, damage = (result.get("config"), "") if result else (None, "")
    if config is None:
        config, damage = read_record(Config, folder / "config.yaml")
    job = {"folder": os.path.realpath(folder), "overrides": []}
    if config is None:
        return job | {"damage": damage or "config.yaml is missing"}
    if result:
        taught = bool((result["teacher"] or {"chosen": False}).get("chosen", True))
    else:
        taught = config["method"]["name"] != "standard"
    content = result.get("content") if result else None
    return job | {"taught": taught, "config": config, "content": content}


# ---- rows


def load_tables(directories: Iterable[Path], run_folders: Sequence[Path] | None = None) -> Tables:
    """Load all tables of the sweeps and runs in `directories`, in whatever state they are.

    Args:
        directories: Directories of sweeps, or directories that contain runs.
        run_folders: Folders to search for moved runs; see `discover_runs`.
    """
    jobs, searches = discover_runs(directories, run_folders)
    sound = [job for job in jobs if "damage" not in job]
    names = describe(sound)
    swept = [
        key
        for key in names.swept
        if key == "batch_size" or not (key in COLUMNS or key.startswith(("test_", "val_")))
    ]
    for job, setting, full in zip(sound, names.short, names.full, strict=True):
        job |= {"setting": setting, "full_setting": full}
    rows = []
    epochs_by_folder: dict[str, list[dict[str, Any]]] = {}
    reliability_by_folder: dict[str, dict[str, list[float]]] = {}
    reliability: dict[str, dict[str, list[float]]] = {}  # by setting
    provenance: Grouped = {}
    for job in jobs:
        folder = Path(job["folder"])
        result, damage = read_record(RunResult, folder / "result.json")
        if "damage" in job:
            rows.append(_row(job, None, RunStatus(RunState.FAILED, job["damage"])))
            continue
        if "absent" in job:
            rows.append(_row(job, None, RunStatus(RunState.PLANNED, job["absent"])))
            continue
        row = _row(job, result, RunStatus(RunState.DONE) if result else _state(folder, damage))
        rows.append(row)
        flat = flatten(job["config"])
        row |= {key: flat.get(key) for key in swept if applies(job, key)}
        row |= _seeds(job, flat)
        note(provenance, flat, job["taught"], result)
        epochs, damage = _history(folder / "history.csv")
        row["reason"] = row["reason"] or damage
        row["last_below_best"] = _last_below_best(epochs) if result else None
        run_columns = {key: row[key] for key in ("id", "setting", "method", "seed")}
        epochs_by_folder[row["folder"]] = [{**run_columns, **epoch} for epoch in epochs]
        if result and result.get("reliability"):
            reliability_by_folder[row["folder"]] = result["reliability"]
    runs = _typed_frame(rows, ["setting", "method", "seed", "status", "reason"])
    finished = finished_runs(runs)
    repeated: set[str] = set()
    if len(runs):
        done_folders = set(runs.loc[runs["status"] == RunState.DONE, "folder"])
        repeated = done_folders - set(finished["folder"])
    for setting, path in zip(finished["setting"], finished.get("folder", ()), strict=True):
        if path in reliability_by_folder:
            total = _add(reliability.get(setting), reliability_by_folder[path])
            reliability[setting] = total
    history_rows = [
        row for path, epochs in epochs_by_folder.items() if path not in repeated for row in epochs
    ]
    history = _typed_frame(history_rows, ["id", "setting", "method", "seed", "epoch"])
    directories = list(directories)
    objective = _objective(directories)
    summary = summarise(runs, swept, objective)
    if len(summary):
        summary["test_ece_floor"] = [
            ece_floor(reliability[setting], n) if setting in reliability else None
            for setting, n in zip(summary["setting"], summary["n"], strict=True)
        ]
    return Tables(
        runs,
        history,
        summary,
        swept,
        reliability,
        searches,
        provenance,
        _margin(sound),
        objective,
    )


def _seeds(job: Mapping[str, Any], flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the seeds of a run besides the student's; a run without a teacher has one fewer."""
    seeds = {"split_seed": flat.get("data.split_seed"), "teacher_seed": None}
    if applies(job, "teacher.seed"):
        seeds["teacher_seed"] = flat.get("teacher.seed")
    return seeds


def _last_below_best(epochs: Sequence[Mapping[str, float]]) -> float | None:
    """Return how far the last validation accuracy is below the best of all epochs."""
    values = [epoch["val_accuracy"] for epoch in epochs if "val_accuracy" in epoch]
    return max(values) - values[-1] if values else None


def _objective(directories: Sequence[Path]) -> str:
    """Return the objective of the searches in `directories`, if they have one objective."""
    records = [read_record(Study, folder / "study.json")[0] for folder in directories]
    objectives = {record.get("objective", OBJECTIVE) for record in records if record}
    objective = objectives.pop() if len(objectives) == 1 else OBJECTIVE
    return objective if objective in AVERAGED else OBJECTIVE


def _margin(jobs: Sequence[Mapping[str, Any]]) -> float:
    """Return the margin that the jobs were planned with, as a fraction; the smallest of several."""
    margins = []
    for job in jobs:
        report = job["config"].get("report")
        margin = report.get("margin") if isinstance(report, Mapping) else None
        if isinstance(margin, int | float) and 0 < margin <= 100:
            margins.append(margin / 100)
    return min(margins, default=MARGIN)


def _state(folder: Path, damage: str) -> RunStatus:
    """Return the state of an unfinished run.

    A run with damaged files is not done, whatever its status file contains.

    Args:
        folder: Directory of the run.
        damage: What is wrong with its result file, or "".
    """
    record, status_damage = read_record(StatusRecord, folder / "status.json")
    if status_damage:
        return RunStatus(RunState.FAILED, damage or status_damage)
    status = read_status(folder)
    if not damage:
        return status
    was_done = RunState.DONE in (status.state, record and record["state"])
    return RunStatus(RunState.FAILED if was_done else status.state, damage)


def _row(
    job: Mapping[str, Any], result: Mapping[str, Any] | None, status: RunStatus
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": job.get("id"),
        "setting": job.get("setting", ""),
        "full_setting": job.get("full_setting", ""),
        "method": None,
        "student": None,
        "seed": None,
        "status": status.state,
        "reason": status.reason,
        "overrides": " ".join(job["overrides"]),
        "epochs": None,
        "batch_size": None,
        "data": None,
    }
    if config := job.get("config"):
        row |= {"method": method_name(job), "seed": config["seed"]}
        row |= {"epochs": config["student"]["epochs"], "batch_size": config["batch_size"]}
        data = config.get("data")
        row["data"] = data.get("name") if isinstance(data, dict) else None
    if result:
        teacher = result["teacher"] or {}
        row |= {
            "id": result["id"],
            "student": result["student"],
            "samples": result["samples"]["train"],
            "test_samples": result["samples"].get("test"),
        }
        row |= {
            key: value
            for key, value in result["metrics"].items()
            if key.startswith(("test_", "val_"))
        }
        row |= {key: result["size"][key] for key in ("params", "macs", "method_params")}
        row |= {key: result["time"][key] for key in ("train_seconds", "images_per_second")}
        row |= {"teacher": teacher.get("name"), "teacher_params": teacher.get("params")}
        row |= {"teacher_macs": teacher.get("macs")}
        row |= {"teacher_test_accuracy": teacher.get("metrics", {}).get("test_accuracy")}
        row["budget"] = f"{row['epochs']} x {row['samples']:,}"
        images = row["epochs"] * row["samples"]
        row["train_flops"] = 6.0 * row["macs"] * images
        if teacher:
            computed = 1 - (result["time"].get("teacher_read") or 0.0)
            row["teacher_flops"] = 2.0 * row["teacher_macs"] * images * computed
    return {**row, "folder": printable(job["folder"])}


def _history(path: Path) -> tuple[list[dict[str, float]], str]:
    """Read the epochs of a history file, up to the first incomplete or damaged line.

    Numbers that are not finite are left out.

    Returns:
        The epochs, and what is wrong with the file, or "".
    """
    rows: list[dict[str, float]] = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        lines = csv.reader(io.StringIO(text[: text.rfind("\n") + 1]))
        head = next(lines, [])
        if "epoch" not in head or {"id", "setting", "method", "seed"} & set(head):
            raise ValueError
        for number, cells in enumerate(lines, 1):
            row = {name: float(cell) for name, cell in zip(head, cells, strict=True) if cell}
            if row.get("epoch") != number:
                raise ValueError
            rows.append({name: value for name, value in row.items() if abs(value) <= LARGEST})
        if not text.endswith("\n"):
            raise ValueError
    except FileNotFoundError:
        return [], ""
    except (OSError, ValueError, csv.Error):
        return rows, f"{path.name} is damaged after epoch {len(rows)}"
    return rows, ""


def _add(
    total: dict[str, list[float]] | None, counts: dict[str, list[float]]
) -> dict[str, list[float]]:
    """Add the bins of two reliability diagrams."""
    if total is None:
        return counts
    sums = {}
    for key in total:
        sums[key] = [x + y for x, y in zip(total[key], counts[key], strict=True)]
    return sums


def _typed_frame(
    rows: Sequence[Mapping[str, Any]], columns_if_empty: Sequence[str]
) -> pd.DataFrame:
    """Return a table of these rows whose integers stay integers even if some are missing.

    Args:
        rows: The rows of the table.
        columns_if_empty: The columns of a table without rows.
    """
    frame = pd.DataFrame(rows) if rows else pd.DataFrame(columns=list(columns_if_empty))
    for name in (
        "seed",
        "teacher_seed",
        "split_seed",
        "epochs",
        "samples",
        "test_samples",
        "batch_size",
        "epoch",
        "params",
        "macs",
        "method_params",
        "teacher_params",
        "teacher_macs",
    ):
        if name in frame:
            frame[name] = pd.array([row.get(name) for row in rows], dtype="Int64")
    return frame
