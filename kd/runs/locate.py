"""Where the runs of a sweep are: where they were planned or, after a copy or a move, beside it or in given folders."""

import csv
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kd.core.io import read_json
from kd.core.settings import flatten
from kd.runs import directory as record
from kd.runs.labels import IGNORED
from kd.runs.schema import Config, Result, read_record

FILES = (
    "config.yaml",
    "history.csv",
    "status.json",
    "result.json",
)  # that make a directory a run's
PLAN = "jobs.json"  # in a sweep's directory: the jobs that were planned
STARTED = "sweep.json"  # beside it: the command, and where and when it was typed
NEAR = 6  # folders above a sweep in which its runs are looked for


def is_run(folder: Path) -> bool:
    """Whether that is one run's own directory: any two of its files are there, damaged or not."""
    return (
        folder.parent.name != "superseded"
        and sum(os.path.lexists(folder / name) for name in FILES) > 1
    )


def runs_in(folder: Path) -> Iterator[Path]:
    """The runs that lie anywhere in a directory."""
    for path, inner, _ in os.walk(folder):
        inner[:] = sorted(name for name in inner if name != "superseded")
        if is_run(Path(path)):
            yield Path(path)


class Search:
    """Looks for the runs of one sweep.

    `moved` maps the folder in which a run was planned to the one in which it is, `absent` holds the folders of those
    that are nowhere, and `lost` those of them that must have been somewhere: an earlier report of the sweep knows
    them, or its other runs have moved, or none is left.
    """

    def __init__(self, sweep: Path, given: "GivenFolders"):
        self.sweep, self.given = sweep, given
        self.jobs = 0
        self.moved: dict[str, str] = {}
        self.missing: list[str] = []
        self.lost: list[str] = []
        self._candidates: dict[tuple[str, str], list[str]] = {}
        self._known: dict[str, str] = {}

    def locate(self, jobs: Sequence[dict[str, Any]]) -> None:
        """Let each job, and its baseline, name the folder in which its run lies.

        A run is taken from elsewhere only if its files say that it is the job's: another's may have the same name.
        Near the sweep it is looked for where no other run of the sweep is in its place, or an earlier report knows it:
        else it has not begun.
        """
        begun = {
            Path(row["folder"]).name
            for row in rows_of(self.sweep / "runs.csv")
            if row.get("status") != "planned"
        }
        elsewhere = []
        for job in jobs:
            if self._is_in_place(job):
                self._known[job["folder"]] = job["folder"]
            else:
                elsewhere.append(job)
        used = {Path(folder).parent for folder in self._known}
        for job in elsewhere:
            planned = job["folder"]
            if planned not in self._known:
                near = Path(planned).parent not in used or Path(planned).name in begun
                self._known[planned] = self._run(job, planned, near)
        for job in jobs:
            job["folder"] = self._known[job["folder"]]
            if planned := job.get("baseline"):
                if planned not in self._known:
                    self._known[planned] = self._baseline(job, planned)
                job["baseline"] = self._known[planned]
        self.jobs = len({job["folder"] for job in jobs})
        gone = bool(self.moved) or len(self.missing) == self.jobs
        for folder in self.missing:
            if Path(folder).name in begun or (gone and Path(folder).parent not in used):
                self.lost.append(folder)
        lost = set(self.lost)
        for job in jobs:
            if job["folder"] in lost:
                job.setdefault("absent", "it was not found")

    @property
    def folders(self) -> list[str]:
        """Where the runs were looked for, as far as that was needed."""
        planned = [folder for folder, _ in self._candidates]
        beside = [folder for folders in self._candidates.values() for folder in folders]
        return list(dict.fromkeys([*planned, *map(str, self.given.folders), *beside]))

    def _is_in_place(self, job: dict[str, Any]) -> bool:
        """Whether a job's run is where it was planned, and finished if there are folders that may hold it finished."""
        result = record.load_result(Path(job["folder"]))
        if result and job.get("id") and result["id"] != job["id"]:
            job["absent"] = (
                f"it was not found: the run in its folder is another one, with the id {result['id']}"
            )
            return False
        return bool(result) or (_exists(job["folder"]) and not self.given.folders)

    def _run(self, job: dict[str, Any], planned: str, near: bool) -> str:
        """Where the run of a job is, if it is not in its place: where it is finished or, else, where it has begun."""
        here = [planned] if _exists(planned) and "absent" not in job else []
        given = {
            path: folder
            for folder, path in self.given.named(Path(planned).name)
            if _is_run_of(job, path)
        }
        found = [*here, *given]
        if near and not found:
            found = [path for path in self._find_nearby(job, planned) if _is_run_of(job, path)]
        if not found:
            self.missing.append(planned)
            return planned
        job.pop("absent", None)
        best = next((path for path in found if record.load_result(Path(path))), found[0])
        if best in given:
            self.given.used.add(given[best])
        if best != planned:
            self.moved[planned] = best
        return best

    def _baseline(self, job: Mapping[str, Any], planned: str) -> str:
        """Where the finished run is that a job is compared with."""
        if record.load_result(Path(planned)):
            return planned
        given = [path for _, path in self.given.named(Path(planned).name)]
        found = (
            path
            for path in [*given, *self._find_nearby(job, planned)]
            if _is_named(path, Path(planned).name)
        )
        return next(found, planned)

    def _find_nearby(self, job: Mapping[str, Any], planned: str) -> list[str]:
        """The runs of that name in the folders that may hold those of the sweep."""
        paths = job.get("config", {}).get("paths")
        runs = str(paths.get("runs", "")) if isinstance(paths, Mapping) else ""
        key = str(Path(planned).parent), runs
        if key not in self._candidates:
            self._candidates[key] = _candidate_folders(self.sweep, *key)
        there = (Path(folder, Path(planned).name) for folder in self._candidates[key])
        return [os.path.realpath(path) for path in there if is_run(path)]


class GivenFolders:
    """The runs in the folders that the user gave, by the names of their directories; `used`: the folders that held a
    run which was looked for."""

    def __init__(self, folders: Sequence[Path]):
        self.folders = folders
        self.used: set[Path] = set()
        self.inside: dict[str, list[tuple[Path, str]]] | None = None

    def named(self, name: str) -> list[tuple[Path, str]]:
        """(the folder that was given, the run's own) of each run with that name."""
        direct = [
            (folder, os.path.realpath(folder / name))
            for folder in self.folders
            if is_run(folder / name)
        ]
        if direct or not self.folders:
            return direct
        if self.inside is None:
            self.inside = defaultdict(list)
            for folder in self.folders:
                for run in runs_in(folder):
                    self.inside[run.resolve().name].append((folder, os.path.realpath(run)))
        return self.inside.get(name, [])


def _candidate_folders(sweep: Path, planned: str, runs: str) -> list[str]:
    """Folders that may hold the runs of a sweep which were planned in the folder `planned`, as `paths.runs` named it:
    those that lie to the sweep as that did, a folder of that name or `runs` in or above the sweep, and those that the
    sweep's own files name."""
    real = os.path.realpath(sweep)
    relative = Path(os.path.relpath(planned, real))
    tail = Path(*(word for word in relative.parts if word != os.pardir))
    found: list[Path] = []
    for base in dict.fromkeys([Path(real), sweep.absolute(), (sweep / PLAN).resolve().parent]):
        above = [base, *base.parents][: NEAR + 1]
        found.append(Path(os.path.normpath(base / relative)))
        found += [folder / name for folder in above for name in (tail, Path(planned).name, "runs")]
        found += above[:2]
    found += _recorded_folders(sweep, runs)
    here = (os.path.realpath(folder) for folder in found if _is_directory(folder))
    return [folder for folder in dict.fromkeys(here) if folder != planned]


def _recorded_folders(sweep: Path, runs: str) -> list[Path]:
    """The folders of runs that a sweep's own files name: where it was typed, and in an earlier report."""
    started = read_json(sweep / STARTED)
    directory = started.get("directory") if isinstance(started, dict) else None
    found = []
    with suppress(RuntimeError):  # there is no such user
        path = Path(directory if isinstance(directory, str) else "", Path(runs).expanduser())
        found += [path] if runs and path.is_absolute() else []
    return [
        *found,
        *dict.fromkeys(
            Path(row["folder"]).parent for row in rows_of(sweep / "runs.csv") if row.get("folder")
        ),
    ]


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # it may not be looked at, or no path can be so
        return False


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a table that an earlier report wrote as CSV; none where there is none, or it is damaged."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file, restval="") if None not in row]
    except (OSError, ValueError, csv.Error):
        return []


def _exists(folder: str) -> bool:
    """Whether anything of a run is in its folder."""
    try:
        return any(os.scandir(folder))
    except OSError:
        return False


def _is_run_of(job: Mapping[str, Any], folder: str) -> bool:
    """Whether the run in a folder is the one that was planned: by the id in its result, else by the one in its name,
    else by its configuration."""
    result, _ = read_record(Result, Path(folder, "result.json"))
    id_ = job.get("id")
    if id_ and (result or folder.endswith(str(id_))):
        return result is None or bool(result["id"] == id_)
    config = (result or {}).get("config") or read_record(Config, Path(folder, "config.yaml"))[0]
    return bool(config and job.get("config")) and _identifying_values(
        config
    ) == _identifying_values(job["config"])


def _identifying_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """What names a run, of its configuration; the data's place does not."""
    ignored = tuple(key for key in IGNORED if key not in ("seed", "teacher.outputs"))
    return {
        k: v for k, v in flatten(config).items() if not k.startswith(ignored) and k != "data.root"
    }


def _is_named(folder: str, name: str) -> bool:
    """Whether the finished run in a folder is the one of which its directory has the name."""
    result = record.load_result(Path(folder))
    return result is not None and name.endswith(str(result["id"]))
