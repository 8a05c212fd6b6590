"""The directory of a run.

All files are written atomically, and `result.json` is written last.

config.yaml               the resolved configuration
status.json               the state of the run: see `RunState`
history.csv               one row per epoch
result.json               metrics, sizes, times, environment
student.safetensors       the trained student
method.safetensors        what only the method trained, if anything
test_outputs.safetensors  labels, predictions and logits of the test images
error.txt                 the traceback of a failed run
kd.log, .hydra/           log lines, and the configuration that Hydra composed
wandb.json                the id of its W&B run
checkpoints/              the last two, until the run is finished
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
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from kd.core.errors import first_line
from kd.core.io import read_json, remove_partial_files, write_json, write_text
from kd.core.locks import process_start_time
from kd.core.version import __version__
from kd.runs.schema import RunResult, read_record
from kd.runs.status import RunState, RunStatus

log = logging.getLogger(__name__)

TEST_OUTPUTS = "test_outputs.safetensors"
HEARTBEAT_SECONDS = 5.0  # between two heartbeats
SILENCE_SECONDS = 60.0  # without a heartbeat, after which a run counts as killed


def read_status(folder: Path) -> RunStatus:
    """Return the state of the run in `folder`, even if its process could not record it."""
    if load_result(folder):
        return RunStatus(RunState.DONE)
    recorded = read_json(folder / "status.json")
    if not isinstance(recorded, dict) or recorded.get("state") == RunState.DONE:
        # A run that is done but has no result: its result was removed
        return RunStatus(RunState.PLANNED)
    state = str(recorded.get("state"))
    reason = str(recorded.get("reason", ""))
    if state == RunState.RUNNING:
        try:
            seconds_silent = time.time() - (folder / "status.json").stat().st_mtime
        except OSError:  # it has just been removed
            return RunStatus(RunState.PLANNED)
        pid = recorded.get("pid")
        host = recorded.get("host")
        is_local = host == platform.node()
        start_time = process_start_time(pid)
        is_dead = is_local and (start_time is None or start_time != recorded.get("born"))
        if seconds_silent > SILENCE_SECONDS or is_dead:
            return RunStatus(RunState.KILLED, f"its process ({pid} on {host}) is gone")
    try:
        return RunStatus(RunState(state), reason)
    except ValueError:
        return RunStatus(RunState.FAILED, f"status.json contains an unknown state, {state!r}")


def write_status(folder: Path, state: str, reason: str = "") -> None:
    """Write the state of a run, and the process that recorded it, to status.json."""
    process = {
        "host": platform.node(),
        "pid": os.getpid(),
        "born": process_start_time(os.getpid()),
        "time": time.time(),
    }
    write_json(folder / "status.json", {"state": state, "reason": reason, **process})


class RunDirectory:
    """A writer of the files of one run.

    Attributes:
        folder: The run's directory.
        rows: The rows of history.csv so far, one per epoch.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial_files(folder)
        (folder / "error.txt").unlink(missing_ok=True)  # of an earlier attempt
        write_text(
            folder / "config.yaml",
            yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True),
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Mark the run as running for the duration of the context.

        The modification time of status.json is updated regularly, as a heartbeat.
        """
        write_status(self.folder, RunState.RUNNING)
        stopped = threading.Event()

        def beat() -> None:
            while not stopped.wait(HEARTBEAT_SECONDS):
                with suppress(OSError):
                    os.utime(self.folder / "status.json")

        threading.Thread(target=beat, daemon=True).start()
        try:
            yield
        finally:
            stopped.set()

    def mark_ended(self, state: str, error: BaseException) -> None:
        """Record why a run ended: one line in status.json, the full traceback in error.txt."""
        with suppress(OSError):  # a full disk may be the reason
            write_text(self.folder / "error.txt", "".join(traceback.format_exception(error)))
        with suppress(OSError):
            write_status(self.folder, state, first_line(error))

    def append_epoch(self, row: Mapping[str, Any]) -> None:
        """Append the row of an epoch to history.csv."""
        self.write_history([*self.rows, dict(row)])

    def write_history(self, rows: list[dict[str, Any]]) -> None:
        """Replace the rows of history.csv; a failed write is logged, and retried next epoch."""
        self.rows = rows
        try:
            write_text(self.folder / "history.csv", _history_csv(rows))
        except OSError as error:
            log.warning(
                "%s cannot be written (%s); training continues",
                self.folder / "history.csv",
                error.strerror,
            )

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the result, and mark the run as done."""
        write_json(self.folder / "result.json", result)
        write_status(self.folder, RunState.DONE)


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's history.csv, or an empty list if it is missing or damaged."""
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
    """Format rows as CSV; the columns are the union of their keys."""
    names = list(dict.fromkeys(chain.from_iterable(rows)))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def load_result(folder: Path) -> dict[str, Any] | None:
    """Return the result of a finished run, or None.

    A damaged result counts as missing, so that the same command trains the run again.
    """
    result: dict[str, Any] | None = read_record(RunResult, folder / "result.json")[0]
    return result


def archive_previous_run(folder: Path) -> None:
    """Move the files of a previous run to superseded/N/, to make room for a rerun."""
    names = (
        "result.json",
        "status.json",
        "history.csv",
        "config.yaml",
        "error.txt",
        "wandb.json",
        "checkpoints",
    )
    previous_files = [
        path
        for path in (*(folder / name for name in names), *folder.glob("*.safetensors"))
        if path.exists()
    ]
    if not previous_files:
        return
    archive = folder / "superseded"
    number = 1 + sum(1 for _ in archive.iterdir()) if archive.exists() else 1
    target = archive / str(number)
    target.mkdir(parents=True)
    for path in previous_files:  # the result first: without it, the run counts as not done
        os.replace(path, target / path.name)


def command() -> list[str]:
    """Return the arguments of the command line, in a form that can be typed again."""
    program = Path(sys.argv[0])
    executable = (
        ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name]
    )
    return [printable(argument) for argument in (*executable, *sys.argv[1:])]


def printable(path: Path | str) -> str:
    """Return a path as valid Unicode, with undecodable bytes as escapes."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def describe_command() -> dict[str, Any]:
    """Return the contents of sweep.json: command line, directory, start time and environment."""
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
    """Return the version of an installed package, or None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """Return the model name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor()


def git_state() -> dict[str, Any] | None:
    """Return the commit of kd's own source tree, and whether it has uncommitted changes.

    Returns:
        The keys "commit" and "dirty", or None unless git tracks kd's files: a copy installed inside
        another project is surrounded by that project's repository, whose commit is not kd's.
    """
    package = Path(__file__).resolve().parents[1]
    environment = {name: value for name, value in os.environ.items() if name not in _REPOSITORY}

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=package,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout

    try:
        git("ls-files", "--error-unmatch", "--", *_TRACKED)
        siblings = (package.parent / name for name in ("conf", "hydra_plugins"))
        sources = [package, *filter(Path.is_dir, siblings)]
        dirty = bool(git("status", "--porcelain", "--", *map(str, sources)))
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": dirty}
    except (OSError, subprocess.SubprocessError):
        return None


# If git tracks these files of the package, the repository is kd's
_TRACKED = ("__init__.py", "runs/directory.py")
# Environment variables that a git hook sets for the repository it runs in
_REPOSITORY = {
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_COMMON_DIR",
    "GIT_OBJECT_DIRECTORY",
    "GIT_NAMESPACE",
    "GIT_PREFIX",
}
