"""Refuse a report that would have no runs, or that would replace one with more runs."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd.core.errors import UserError
from kd.report.tables import Tables
from kd.runs.directory import printable
from kd.runs.locate import PLAN, rows_of

MAX_NAMED = 3  # runs listed in a sentence
MAX_FOLDERS = 6  # folders listed in a sentence


def is_report_output(directories: Sequence[Path], out: Path) -> bool:
    """Return whether a report is written into the directory that it is about."""
    return len(directories) == 1 and directories[0].resolve() == out.resolve()


def check_not_empty(tables: Tables, directories: Sequence[Path]) -> None:
    """Raise UserError if there is no run at all."""
    if tables.runs.empty:
        raise UserError(f"no run found in {', '.join(map(str, directories))}")
    missing = {printable(folder) for search in tables.searches for folder in search.missing}
    if missing.issuperset(tables.runs["folder"]):
        raise UserError(
            f"none of the planned runs was found ({run_names(missing)}); "
            f"looked in {searched_folders(tables)}; "
            "if they were moved, pass the folder that contains them with --runs DIR"
        )


def check_same_sweep(directories: Sequence[Path], out: Path) -> None:
    """Raise UserError if `out` is the directory of a sweep that the report is not about."""
    if (out / PLAN).exists() and out.resolve() not in {folder.resolve() for folder in directories}:
        raise UserError(
            f"--out: {out} is the directory of another sweep, which has its own report; "
            "choose another directory"
        )


def check_not_poorer(
    tables: Tables, directories: Sequence[Path], out: Path, in_place: bool
) -> None:
    """Raise UserError if the report in `out` counts finished runs that vanished without a trace.

    A run that is being rerun, or has failed since, leaves a trace in its own files.

    Args:
        tables: The tables of the new report.
        directories: The directories that it is about.
        out: Directory of the report.
        in_place: Whether `out` is the directory that the report is about.
    """
    row_by_name: dict[str, Any] = {
        Path(row["folder"]).name: row for row in tables.runs.to_dict("records")
    }
    previous = [
        Path(row.get("folder", ""))
        for row in rows_of(out / "runs.csv")
        if row.get("status") == "done"
    ]
    roots = [os.path.realpath(folder) for folder in directories]
    expected = {
        folder.name
        for folder in previous
        if in_place or folder.name in row_by_name or any(map(folder.is_relative_to, roots))
    }
    lost = sorted(name for name in expected if not _is_accounted_for(row_by_name.get(name)))
    if not lost:
        return
    damaged = [
        row_by_name[name]["reason"]
        for name in lost
        if name in row_by_name and " is damaged" in row_by_name[name]["reason"]
    ]
    damage = f"; {damaged[0]}" if damaged else ""
    folders = searched_folders(tables)
    searched = f"; looked in {folders}" if folders else ""
    raise UserError(
        f"{out}: the report there counts {len(previous)} finished runs, but {len(lost)} of them "
        f"cannot be found or read now ({run_names(lost)}){damage}{searched}; pass the folder that "
        "contains them with --runs DIR, or write a report without them with --out DIR"
    )


def _is_accounted_for(row: Mapping[str, Any] | None) -> bool:
    """Return whether a run that was done still is, or its own files show why it is not."""
    if row is None or " is damaged" in row["reason"]:
        return row is not None and row["status"] == "done"
    return row["status"] != "planned" or (Path(row["folder"]) / "superseded").is_dir()


def run_names(folders: Collection[str]) -> str:
    """Return the names of the first few run directories, and how many more there are."""
    names = sorted(Path(folder).name for folder in folders)
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def searched_folders(tables: Tables) -> str:
    """Return the folders that were searched for runs."""
    folders = list(dict.fromkeys(folder for search in tables.searches for folder in search.folders))
    more = f" and {len(folders) - MAX_FOLDERS} more" if len(folders) > MAX_FOLDERS else ""
    return ", ".join(map(printable, folders[:MAX_FOLDERS])) + more
