"""Locate the runs of a sweep.

They are where they were planned or, after a copy or a move, near the sweep or in folders that the
user gave.
"""

import csv
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from kd.core.execution import EXECUTION_KEYS
from kd.core.io import read_json
from kd.core.settings import flatten, is_under
from kd.runs import directory
from kd.runs.schema import Config, RunResult, read_record

# A directory with two of these files is that of a run
FILES = ("config.yaml", "history.csv", "status.json", "result.json")
PLAN = "jobs.json"  # in a sweep's directory: the planned jobs
STARTED = "sweep.json"  # in the same directory: the command, and where and when it was started
MAX_LEVELS_UP = 6  # how many folders above a sweep are searched for its runs


def is_run(folder: Path) -> bool:
    """Return whether a folder is the directory of a run: it has two of its files, even damaged."""
    return (
        folder.parent.name != "superseded"
        and sum(os.path.lexists(folder / name) for name in FILES) > 1
    )


def runs_in(folder: Path) -> Iterator[Path]:
    """Yield the runs anywhere in a directory, except superseded ones."""
    for path, inner, _ in os.walk(folder):
        inner[:] = sorted(name for name in inner if name != "superseded")
        if is_run(Path(path)):
            yield Path(path)


class Search:
    """A search for the runs of one sweep.

    Attributes:
        sweep: The directory of the sweep.
        given: The folders that the user gave.
        jobs: Number of distinct runs of the sweep.
        moved: Maps the planned folder of a run to the one where it was found, if they differ.
        missing: The planned folders of runs that were not found.
        lost: Those missing runs that must have existed: an earlier report of the sweep lists them,
            or its other runs have moved, or none of its runs is left.
    """

    def __init__(self, sweep: Path, given: "GivenFolders"):
        self.sweep = sweep
        self.given = given
        self.jobs = 0
        self.moved: dict[str, str] = {}
        self.missing: list[str] = []
        self.lost: list[str] = []
        self._candidates: dict[tuple[str, str], list[str]] = {}
        self._located: dict[str, str] = {}  # planned folder -> folder of the run

    def locate(self, jobs: Sequence[dict[str, Any]]) -> None:
        """Replace the planned folder of each job, and of its baseline, with that of its run.

        A run in another folder is accepted only if its files identify it as the job's, because the
        run of another job may have the same name. The vicinity of the sweep is searched only if no
        other run of the sweep is where it was planned, or if an earlier report lists the run as
        started. Otherwise the run has not been started yet.
        """
        started_names = {
            Path(row["folder"]).name
            for row in rows_of(self.sweep / "runs.csv")
            if row.get("status") != "planned"
        }
        displaced = []
        for job in jobs:
            if self._is_in_place(job):
                self._located[job["folder"]] = job["folder"]
            else:
                displaced.append(job)
        used_parents = {Path(folder).parent for folder in self._located}
        for job in displaced:
            planned = job["folder"]
            if planned not in self._located:
                is_started = Path(planned).name in started_names
                search_nearby = Path(planned).parent not in used_parents or is_started
                self._located[planned] = self._run(job, planned, search_nearby)
        for job in jobs:
            job["folder"] = self._located[job["folder"]]
            if planned := job.get("baseline"):
                if planned not in self._located:
                    self._located[planned] = self._baseline(job, planned)
                job["baseline"] = self._located[planned]
        self.jobs = len({job["folder"] for job in jobs})
        runs_moved = bool(self.moved) or len(self.missing) == self.jobs
        for folder in self.missing:
            is_started = Path(folder).name in started_names
            if is_started or (runs_moved and Path(folder).parent not in used_parents):
                self.lost.append(folder)
        lost = set(self.lost)
        for job in jobs:
            if job["folder"] in lost:
                job.setdefault("absent", "the run was not found")

    @property
    def folders(self) -> list[str]:
        """The folders that were searched."""
        planned = [folder for folder, _ in self._candidates]
        nearby = chain.from_iterable(self._candidates.values())
        return list(dict.fromkeys([*planned, *map(str, self.given.folders), *nearby]))

    def _is_in_place(self, job: dict[str, Any]) -> bool:
        """Return whether a job's run is where it was planned.

        If the user gave folders, which may hold the finished run, it must also be finished.
        """
        result = directory.load_result(Path(job["folder"]))
        if result and job.get("id") and result["id"] != job["id"]:
            job["absent"] = (
                f"the run was not found: its folder holds a different run, with id {result['id']}"
            )
            return False
        return bool(result) or (_exists(job["folder"]) and not self.given.folders)

    def _run(self, job: dict[str, Any], planned: str, search_nearby: bool) -> str:
        """Return the folder of a run that is not in place, preferring one where it is finished."""
        in_place = [planned] if _exists(planned) and "absent" not in job else []
        given = {
            path: folder
            for folder, path in self.given.named(Path(planned).name)
            if _is_run_of(job, path)
        }
        folders = [*in_place, *given]
        if search_nearby and not folders:
            folders = [path for path in self._find_nearby(job, planned) if _is_run_of(job, path)]
        if not folders:
            self.missing.append(planned)
            return planned
        job.pop("absent", None)
        finished = (path for path in folders if directory.load_result(Path(path)))
        best = next(finished, folders[0])
        if best in given:
            self.given.used.add(given[best])
        if best != planned:
            self.moved[planned] = best
        return best

    def _baseline(self, job: Mapping[str, Any], planned: str) -> str:
        """Return the folder of the finished baseline of a job, or the planned one if not found."""
        if directory.load_result(Path(planned)):
            return planned
        given = [path for _, path in self.given.named(Path(planned).name)]
        matching = (
            path
            for path in [*given, *self._find_nearby(job, planned)]
            if _is_named(path, Path(planned).name)
        )
        return next(matching, planned)

    def _find_nearby(self, job: Mapping[str, Any], planned: str) -> list[str]:
        """Return the runs with the planned name in the folders that may hold the sweep's runs."""
        paths = job.get("config", {}).get("paths")
        runs = str(paths.get("runs", "")) if isinstance(paths, Mapping) else ""
        key = str(Path(planned).parent), runs
        if key not in self._candidates:
            self._candidates[key] = _candidate_folders(self.sweep, *key)
        paths_nearby = (Path(folder, Path(planned).name) for folder in self._candidates[key])
        return [os.path.realpath(path) for path in paths_nearby if is_run(path)]


class GivenFolders:
    """The runs in the folders that the user gave, by the names of their directories.

    Attributes:
        folders: The folders, in the order given.
        used: Those folders in which a run of a sweep was found.
    """

    def __init__(self, folders: Sequence[Path]):
        self.folders = folders
        self.used: set[Path] = set()
        # (given folder, folder of the run) by the run's name; built when first needed
        self._nested_runs: dict[str, list[tuple[Path, str]]] | None = None

    def named(self, name: str) -> list[tuple[Path, str]]:
        """Return (given folder, folder of the run) for each run with that name."""
        direct = [
            (folder, os.path.realpath(folder / name))
            for folder in self.folders
            if is_run(folder / name)
        ]
        if direct or not self.folders:
            return direct
        if self._nested_runs is None:
            self._nested_runs = defaultdict(list)
            for folder in self.folders:
                for run in runs_in(folder):
                    self._nested_runs[run.resolve().name].append((folder, os.path.realpath(run)))
        return self._nested_runs.get(name, [])


def _candidate_folders(sweep: Path, planned: str, runs: str) -> list[str]:
    """Return the folders that may hold the runs of a sweep.

    These are the folder at the same position relative to the sweep as the planned one, folders in
    or above the sweep with the planned folder's name or the name `runs`, the sweep itself and its
    parent folder, and those listed in the sweep's files.

    Args:
        sweep: The directory of the sweep.
        planned: The folder in which the runs were planned.
        runs: The configured `paths.runs` of that folder.
    """
    real = os.path.realpath(sweep)
    relative = Path(os.path.relpath(planned, real))
    tail = Path(*(part for part in relative.parts if part != os.pardir))
    names = (tail, Path(planned).name, "runs")
    folders: list[Path] = []
    for base in dict.fromkeys([Path(real), sweep.absolute(), (sweep / PLAN).resolve().parent]):
        above = [base, *base.parents][: MAX_LEVELS_UP + 1]
        folders.append(Path(os.path.normpath(base / relative)))
        for folder in above:
            folders += [folder / name for name in names]
        folders += above[:2]
    folders += _recorded_folders(sweep, runs)
    existing = (os.path.realpath(folder) for folder in folders if _is_directory(folder))
    return [folder for folder in dict.fromkeys(existing) if folder != planned]


def _recorded_folders(sweep: Path, runs: str) -> list[Path]:
    """Return the folders of runs that a sweep's files list.

    These are `paths.runs`, relative to where the command was run, and those of an earlier report.
    """
    started = read_json(sweep / STARTED)
    working_dir = started.get("directory") if isinstance(started, dict) else None
    folders = []
    with suppress(RuntimeError):  # `~user` of an unknown user
        base = working_dir if isinstance(working_dir, str) else ""
        path = Path(base, Path(runs).expanduser())
        folders += [path] if runs and path.is_absolute() else []
    reported = (row["folder"] for row in rows_of(sweep / "runs.csv") if row.get("folder"))
    return [*folders, *dict.fromkeys(Path(folder).parent for folder in reported)]


def _is_directory(path: Path) -> bool:
    """Return whether a path is a directory, treating errors as no."""
    try:
        return path.is_dir()
    except (OSError, ValueError):  # no permission, or not a valid path
        return False


def rows_of(path: Path) -> list[dict[str, str]]:
    """Return the rows of an earlier report's CSV table, or an empty list if it has no valid one."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file, restval="") if None not in row]
    except (OSError, ValueError, csv.Error):
        return []


def _exists(folder: str) -> bool:
    """Return whether a run's folder has any contents."""
    try:
        return any(os.scandir(folder))
    except OSError:
        return False


def _is_run_of(job: Mapping[str, Any], folder: str) -> bool:
    """Return whether the run in a folder is the planned one.

    It is identified by the id in its result, else by the id in its name, else by its configuration.
    """
    result, _ = read_record(RunResult, Path(folder, "result.json"))
    id_ = job.get("id")
    if id_ and (result or folder.endswith(str(id_))):
        return result is None or bool(result["id"] == id_)
    config = (result or {}).get("config") or read_record(Config, Path(folder, "config.yaml"))[0]
    if not (config and job.get("config")):
        return False
    return _identifying_values(config) == _identifying_values(job["config"])


def _identifying_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that identify a run; where the data is stored does not."""
    return {
        key: value
        for key, value in flatten(config).items()
        if not is_under(key, (*EXECUTION_KEYS, "data.root"))
    }


def _is_named(folder: str, name: str) -> bool:
    """Return whether the run in a folder is finished and its id matches a directory name."""
    result = directory.load_result(Path(folder))
    return result is not None and name.endswith(str(result["id"]))
