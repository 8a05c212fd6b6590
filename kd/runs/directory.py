"""A run's directory. Everything is written aside and then renamed, and `result.json` comes last.

config.yaml        the configuration, resolved           history.csv           an epoch a row
result.json        metrics, sizes, times, environment    student.safetensors   the trained student
status.json        how far it is: see `Status`           error.txt             the traceback of a failed run
kd.log, .hydra/    what was said, what Hydra composed     wandb.json    the id of its W&B run
checkpoints/       while it is not finished: the last two
"""

import csv
import io
import logging
import os
import platform
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kd.core.errors import first_line
from kd.core.io import read_json, remove_partial_files, write_json, write_text
from kd.core.locks import process_start_time
from kd.core.version import __version__
from kd.runs.schema import Result, read_record

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS, SILENCE_SECONDS = (
    5.0,
    60.0,
)  # seconds between two heartbeats; after how many without one a run counts as dead


class Status(NamedTuple):
    """planned, running, done, failed, diverged (a loss was not finite), pruned (a search stopped it) or killed (its
    process is gone, or was interrupted); and why."""

    state: str
    reason: str = ""


def read_status(folder: Path) -> Status:
    """How far the run in `folder` is, also when the process that ran it could not say so."""
    if load_result(folder):
        return Status("done")
    said = read_json(folder / "status.json")
    if (
        not isinstance(said, dict) or said.get("state") == "done"
    ):  # done, and no result: it was taken away
        return Status("planned")
    state, reason = str(said.get("state")), str(said.get("reason", ""))
    if state == "running":
        try:
            silent = time.time() - (folder / "status.json").stat().st_mtime
        except OSError:  # removed this moment
            return Status("planned")
        here, alive = said.get("host") == platform.node(), process_start_time(said.get("pid"))
        if silent > SILENCE_SECONDS or (here and (alive is None or alive != said.get("born"))):
            return Status(
                "killed", f"its process ({said.get('pid')} on {said.get('host')}) is gone"
            )
    return Status(state, reason)


def write_status(folder: Path, state: str, reason: str = "") -> None:
    """Say in status.json how a run is doing."""
    here = {
        "host": platform.node(),
        "pid": os.getpid(),
        "born": process_start_time(os.getpid()),
        "time": time.time(),
    }
    write_json(folder / "status.json", {"state": state, "reason": reason, **here})


class RunDirectory:
    """Writes the files of one run into `folder`."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial_files(folder)
        (folder / "error.txt").unlink(missing_ok=True)  # of an earlier try
        write_text(
            folder / "config.yaml",
            yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True),
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, status.json says `running` and its time of change is a heartbeat."""
        write_status(self.folder, "running")
        over = threading.Event()

        def beat() -> None:
            while not over.wait(HEARTBEAT_SECONDS):
                with suppress(OSError):
                    os.utime(self.folder / "status.json")

        threading.Thread(target=beat, daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def mark_ended(self, state: str, error: BaseException) -> None:
        """Keep why a run ended: one line in status.json, the whole traceback in error.txt."""
        with suppress(OSError):  # the disk may be what it ended of
            write_text(self.folder / "error.txt", "".join(traceback.format_exception(error)))
        with suppress(OSError):
            write_status(self.folder, state, first_line(error))

    def append_epoch(self, row: Mapping[str, Any]) -> None:
        self.write_history([*self.rows, dict(row)])

    def write_history(self, rows: list[dict[str, Any]]) -> None:
        """These are the epochs so far. Where they cannot be written now, the next may."""
        self.rows = rows
        try:
            write_text(self.folder / "history.csv", _history_csv(rows))
        except OSError as error:
            log.warning(
                "%s cannot be written (%s); the training goes on",
                self.folder / "history.csv",
                error.strerror,
            )

    def finish(self, result: Mapping[str, Any]) -> None:
        write_json(self.folder / "result.json", result)
        write_status(self.folder, "done")


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's history.csv, or none where it is missing or damaged."""
    try:
        with open(folder / "history.csv", encoding="utf-8", newline="") as file:
            rows = [
                {name: float(cell) for name, cell in row.items() if cell}
                for row in csv.DictReader(file)
            ]
        return [{**row, "epoch": int(row["epoch"])} for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _history_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def load_result(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run, or None: also where it is damaged, so that the same command trains it again."""
    found: dict[str, Any] | None = read_record(Result, folder / "result.json")[0]
    return found


def archive_previous_run(folder: Path) -> None:
    """Make room for a rerun: what is there moves to superseded/N/, so that nothing is lost."""
    names = (
        "result.json",
        "status.json",
        "history.csv",
        "config.yaml",
        "error.txt",
        "wandb.json",
        "checkpoints",
    )
    there = [
        path
        for path in (*(folder / name for name in names), *folder.glob("*.safetensors"))
        if path.exists()
    ]
    if not there:
        return
    kept = folder / "superseded"
    target = kept / str(1 + sum(1 for _ in kept.iterdir()) if kept.exists() else 1)
    target.mkdir(parents=True)
    for path in there:  # the result first: what is left without it is a run to be done
        os.replace(path, target / path.name)


def command() -> list[str]:
    """What was typed, as it can be typed again."""
    program = Path(sys.argv[0])
    words = (
        ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name]
    )
    return [printable(word) for word in (*words, *sys.argv[1:])]


def printable(path: Path | str) -> str:
    """A path as text that any file can hold: its odd bytes as escapes."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def describe_command() -> dict[str, Any]:
    """What was typed, where and when, and with what: `sweep.json` of a sweep that is being planned."""
    packages = {"torch": "torch", "hydra": "hydra-core", "wandb": "wandb"}
    return {
        "command": command(),
        "directory": printable(Path.cwd()),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "environment": {
            "kd": __version__,
            "git": git_state(),
            "python": platform.python_version(),
            **{name: _version(package) for name, package in packages.items()},
            "platform": platform.platform(),
            "processor": processor(),
            "host": platform.node(),
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor()


def git_state() -> dict[str, Any] | None:
    """Return the commit of kd's own source tree, and whether it has uncommitted changes.

    None unless git tracks kd's files: a copy that is installed inside another project has that project's repository
    around it, whose commit is not kd's.
    """
    here = Path(__file__).resolve().parents[1]
    environment = {name: value for name, value in os.environ.items() if name not in _REPOSITORY}

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=here,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout

    try:
        git("ls-files", "--error-unmatch", "--", *_TRACKED)
        sources = [
            here,
            *filter(Path.is_dir, (here.parent / name for name in ("conf", "hydra_plugins"))),
        ]
        dirty = bool(git("status", "--porcelain", "--", *map(str, sources)))
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": dirty}
    except (OSError, subprocess.SubprocessError):
        return None


_TRACKED = (
    "__init__.py",
    "runs/directory.py",
)  # of kd's files: where git tracks these, its commit is kd's
_REPOSITORY = {  # set by a git hook, for the repository that it runs in
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_COMMON_DIR",
    "GIT_OBJECT_DIRECTORY",
    "GIT_NAMESPACE",
    "GIT_PREFIX",
}
