"""Claim a sweep's directory: one sweep at a time, and a plan that other jobs never replace."""

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from kd.core import locks
from kd.core.errors import UserError
from kd.core.io import write_json
from kd.report.tables import write_plan
from kd.runs import directory
from kd.runs.locate import PLAN, STARTED, is_run
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

    Its plan may be rewritten with the same jobs, or with these and more. Other jobs are refused.

    Args:
        path: The directory. It is created by `claim`.
        default: Whether it is a new directory named by kd for this sweep (multirun/DATE/TIME).
    """

    def __init__(self, path: Path, default: bool = False):
        self.path = path
        self.planned = False  # whether it contains the plan of this sweep
        ancestors = [path, *path.parents]
        if default:
            self._removable = ancestors[:3]
        else:
            self._removable = [each for each in ancestors if not os.path.lexists(each)]
        self._lock = ExitStack()

    def claim(self, study: Mapping[str, str] | None = None) -> None:
        """Lock the directory until `release`, or until this process ends.

        Args:
            study: Name and storage of the Optuna study that the sweep runs; None for a grid.

        Raises:
            UserError: Another sweep is running in the directory, or it holds something else.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.enter_context(locks.hold(self.path / LOCK, "", math.inf, _raise_busy))
        except _BusyError:
            remedy = "wait for it to finish, or choose another directory"
            raise UserError(
                f"hydra.sweep.dir: another sweep is running in {self.path}; {remedy}"
            ) from None
        runs = self._runs()
        existing, damage = read_record(Study, self.path / "study.json")
        if damage:
            self._refuse(f"a sweep whose {damage}")
        if existing and not study:
            self._refuse(f"the search {existing['study']}, but this sweep is a grid")
        if existing and study and any(existing[key] != study[key] for key in study):
            self._refuse(f"another search, {existing['study']} in {existing['storage']}")
        if existing:  # a search that was interrupted before its first trial has no runs
            return
        if runs:
            if study:
                self._refuse("a grid, but this sweep is a search")
            return
        if is_run(self.path):
            self._refuse("the files of a run")
        for name in REPORT_FILES:
            if os.path.lexists(self.path / name):
                self._refuse(f"{name}, which does not belong to a sweep that can be resumed")

    def write(self, jobs: Sequence[Mapping[str, Any]]) -> None:
        """Write the plan.

        Args:
            jobs: All planned jobs, each with at least its `folder`.

        Raises:
            UserError: The directory holds the plan of other jobs.
        """
        folders = {os.path.realpath(job["folder"]) for job in jobs}
        others: list[str] = []
        if not self.planned:
            others = [Path(run).name for run in self._runs() if run not in folders]
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            self._refuse(f"a sweep with other jobs ({others[0]}{more})")
        write_plan(self.path, jobs)
        if not self.planned:
            write_json(self.path / STARTED, directory.describe_command())
        self.planned = True

    def release(self) -> None:
        """Unlock the directory; remove it if it is empty, unplanned and was made for this sweep."""
        self._lock.close()
        if not self.planned:
            with suppress(OSError):
                for path in self._removable:
                    path.rmdir()

    def _runs(self) -> list[str]:
        """Return the real paths of the runs planned here; raise UserError for a damaged plan."""
        entries, damage = read_record(Plan, self.path / PLAN)
        for number, job in enumerate(entries or (), 1):
            if error := find_error(JobLocation, job):
                damage = f"{PLAN} is damaged: job {number}: {error}"
                break
        if damage:
            self._refuse(f"a sweep whose {damage}")
        base = os.path.realpath(self.path)
        return [os.path.realpath(Path(base, job["folder"])) for job in entries or ()]

    def _refuse(self, content: str) -> None:
        raise UserError(f"hydra.sweep.dir: {self.path} holds {content}; {REMEDY}")
