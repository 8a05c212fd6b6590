"""Many jobs in turn: all are checked before the first starts, none stops the others, a table ends them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd import console, table
from kd.config import check
from kd.record import write_json
from kd.run import folder_of
from kd.settings import UserError
from kd.train import DivergedError

log = logging.getLogger(__name__)


class SweepFailedError(Exception):
    """Some jobs of a sweep failed; the table says which."""


def check_all(composed: Sequence[Mapping[str, Any]], overrides: Sequence[Sequence[str]]) -> list[Path]:
    """The directory of each job. **Raises:** UserError naming the first job that cannot be run."""
    folders = []
    for number, (one, words) in enumerate(zip(composed, overrides, strict=True)):
        try:
            folders.append(folder_of(check(one)))
        except UserError as error:
            raise UserError(f"{error} (job {number}: {' '.join(words)}; no job was started)") from error
    return folders


def run_all(
    folder: Path,
    overrides: Sequence[Sequence[str]],
    folders: Sequence[Path],
    start: Callable[[int], BaseException | None],
) -> None:
    """Run every job by `start(number)`, keep jobs.json up to date, write and say the comparison.

    **Raises:** SweepFailedError at the end when a job failed.
    """
    jobs: list[dict[str, Any]] = [
        {"overrides": list(words), "folder": str(path), "status": "planned", "reason": ""}
        for words, path in zip(overrides, folders, strict=True)
    ]
    write_json(folder / "jobs.json", jobs)
    for number, job in enumerate(jobs):
        log.info("job %d of %d: %s", number + 1, len(jobs), " ".join(job["overrides"]))
        error = start(number)
        job["status"] = "done" if error is None else "diverged" if isinstance(error, DivergedError) else "failed"
        if error is not None:
            job["reason"] = (str(error) or type(error).__name__).splitlines()[0]
            log.error("job %d %s: %s (%s)", number + 1, job["status"], job["reason"], folders[number] / "error.txt")
        write_json(folder / "jobs.json", jobs)
    log.info("\n%s\n", table.write(folder, jobs))
    failed = [n for n, job in enumerate(jobs, 1) if job["status"] != "done"]
    done = len(jobs) - len(failed)
    log.info("%d planned, %d done, %d failed; tables in %s", len(jobs), done, len(failed), console.place(folder))
    if failed:
        raise SweepFailedError(f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(map(str, failed))}")
