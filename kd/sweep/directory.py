"""A sweep's directory: one sweep at a time, whose plan is never replaced by other jobs."""

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from kd.core import locks
from kd.core.errors import UserError
from kd.core.io import write_json
from kd.report.tables import PLAN, is_run, write_plan
from kd.runs import directory
from kd.runs.locate import STARTED
from kd.runs.schema import JobLocation, Plan, Study, find_error, read_record

LOCK = ".lock"
REMEDY = "choose another directory, or move that one away"
REPORT_FILES = (
    "multirun.yaml",
    STARTED,
    "index.html",
    "figures",
    "runs.csv",
    "history.csv",
    "summary.csv",
    "summary.md",
    "summary.tex",
    "runs.parquet",
    "history.parquet",
    "summary.parquet",
)


class _BusyError(Exception):
    """Another process holds the lock."""


def _raise_busy() -> None:
    raise _BusyError


class SweepDirectory:
    """The directory of one sweep, which no other sweep may use at the same time.

    Its plan may be written again with the same jobs, or with more. Other jobs are refused. `default`: the directory
    was made for this sweep (multirun/DATE/TIME).
    """

    def __init__(self, path: Path, default: bool = False):
        self.path = path
        self.planned = False  # whether the plan in it is this sweep's
        above = [path, *path.parents]
        self._own = above[:3] if default else [one for one in above if not os.path.lexists(one)]
        self._lock = ExitStack()

    def claim(self, study: Mapping[str, str] | None = None) -> None:
        """Lock the directory until `release`, or the end of this process.

        **Arguments:** `study`: name and storage of the Optuna study that the sweep runs.
        **Raises:** UserError when another sweep runs in it, or when it holds something else.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.enter_context(locks.hold(self.path / LOCK, "", math.inf, _raise_busy))
        except _BusyError:
            remedy = "wait for its end, or choose another directory"
            raise UserError(
                f"hydra.sweep.dir: another sweep is running in {self.path}; {remedy}"
            ) from None
        runs = self._runs()
        there, damage = read_record(Study, self.path / "study.json")
        if damage:
            self._refuse(f"a sweep whose {damage}")
        if there and not study:
            self._refuse(f"the search {there['study']}, and this is a grid")
        if there and study and any(there[key] != study[key] for key in study):
            self._refuse(f"another search, {there['study']} in {there['storage']}")
        if there:  # a search that was interrupted before its first trial has no runs
            return
        if runs:
            if study:
                self._refuse("a grid, and this is a search")
            return
        if is_run(self.path):
            self._refuse("the files of a run")
        for name in REPORT_FILES:
            if os.path.lexists(self.path / name):
                self._refuse(f"{name}, which is not of a sweep that can be resumed")

    def write(self, jobs: Sequence[Mapping[str, Any]]) -> None:
        """Write the plan. **Raises:** UserError when the directory holds that of other jobs."""
        own = {os.path.realpath(job["folder"]) for job in jobs}
        others = [] if self.planned else [Path(run).name for run in self._runs() if run not in own]
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            self._refuse(f"a sweep with other jobs ({others[0]}{more})")
        write_plan(self.path, jobs)
        if not self.planned:
            write_json(self.path / STARTED, directory.describe_command())
        self.planned = True

    def release(self) -> None:
        """Unlock the directory. Remove it if nothing was planned, and it was made for this sweep and is empty."""
        self._lock.close()
        if not self.planned:
            with suppress(OSError):
                for path in self._own:
                    path.rmdir()

    def _runs(self) -> list[str]:
        """The directories of the runs that were planned here. **Raises:** UserError when the plan is damaged."""
        entries, damage = read_record(Plan, self.path / PLAN)
        for number, job in enumerate(entries or (), 1):
            if wrong := find_error(JobLocation, job):
                damage = f"{PLAN} is damaged: job {number}: {wrong}"
                break
        if damage:
            self._refuse(f"a sweep whose {damage}")
        base = os.path.realpath(self.path)
        return [os.path.realpath(Path(base, job["folder"])) for job in entries or ()]

    def _refuse(self, content: str) -> None:
        raise UserError(f"hydra.sweep.dir: {self.path} holds {content}; {REMEDY}")
