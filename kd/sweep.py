"""Many jobs: all are checked before the first starts, none stops the others, and a report from files ends them."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kd import console, pool, record, report, tracker
from kd.config import check
from kd.pool import Outcome
from kd.run import PrunedError, folder_of
from kd.settings import UserError
from kd.table import PLAN, read_plan, write_plan
from kd.train import DivergedError

log = logging.getLogger(__name__)

Job = dict[str, Any]


class SweepFailedError(Exception):
    """Some jobs of a sweep failed; the report says which."""


def plan(
    folder: Path, jobs: Sequence[tuple[Sequence[str], Mapping[str, Any]]], before: Sequence[Job] = ()
) -> list[Job]:
    """Check every job (what was typed, its configuration) and write them down in the sweep's directory, after those
    that came before. **Raises:** UserError naming the first job that cannot be run; then nothing is written."""
    added = []
    for number, (words, composed) in enumerate(jobs, len(before)):
        try:
            config = check(composed)
        except UserError as error:
            raise UserError(f"{error} (job {number + 1}: {' '.join(words)}; no job was started)") from error
        added.append({
            "number": number, "overrides": list(words), "id": config.identity(), "folder": str(folder_of(config)),
            "taught": config.needs_teacher, "baseline": str(folder_of(config.as_standard())),
            "content": config.described.fingerprint, "config": config.plain(),
        })  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_plan(folder, [*before, *added])
    return added


@contextmanager
def concluding(folder: Path) -> Iterator[Path]:
    """Whatever happens inside, the planned jobs end in a report in `folder`, which is given on.

    **Raises:** SweepFailedError when a job is not done (a pruned one is); what was raised before anything was planned.
    """
    try:
        yield folder
    except BaseException as error:
        if not (folder / PLAN).exists():
            _unmake(folder)
            raise
        if isinstance(error, UserError):
            raise
        if not isinstance(error, Exception):  # interrupted: quickly, what there is
            log.info("interrupted; the same command again goes on")
            _conclude(folder, figures=False)
            raise
        what = (str(error) or type(error).__name__).splitlines()[0]
        if what not in {record.status(Path(job["folder"])).reason for job in read_plan(folder)}:  # not a job's own
            log.error("the launcher failed: %s", what, exc_info=log.isEnabledFor(logging.DEBUG))
        raise SweepFailedError(_conclude(folder) or f"the launcher failed: {what}") from error
    if failed := _conclude(folder):
        raise SweepFailedError(failed)


def _unmake(folder: Path) -> None:
    """A sweep that never began leaves no directory."""
    with suppress(OSError):
        (folder / "multirun.yaml").unlink(missing_ok=True)
        for empty in (folder, folder.parent, folder.parent.parent):
            empty.rmdir()


def _conclude(folder: Path, figures: bool = True) -> str:
    """Report on the planned jobs. **Returns:** which are not done, in words; nothing when all are done or pruned."""
    jobs = read_plan(folder)
    found = report.write([folder], folder, figures)
    log.info("\n%s\n", found.text)
    states = [record.status(Path(job["folder"])).state for job in jobs]
    log.info("%d jobs: %s", len(jobs), ", ".join(f"{n} {state}" for state, n in Counter(states).items()))
    log.info("report   %s", console.place(found.page or folder))
    if figures and jobs:
        frames = {name: getattr(found.tables, name) for name in ("runs", "summary")}
        pictures = [folder / "figures" / f"{name}.png" for name in found.figures]
        tracker.sweep(check(jobs[0]["config"]).root.tracker, folder, frames, pictures, found.text)
    left = [str(n) for n, state in enumerate(states, 1) if state not in ("done", "pruned")]
    return f"{len(left)} of {len(jobs)} jobs are not done: {', '.join(left)}" if left else ""


# ---- on this machine


def run_local(
    source: Callable[[], tuple[Job, Any] | None],
    total: int,
    work: pool.Work,
    environments: Sequence[Mapping[str, str]],
    max_failures: int,
    over: Callable[[Job, Outcome], None] = lambda job, outcome: None,
    heard: Callable[[Job, dict[str, Any]], bool] = lambda job, row: False,
) -> None:
    """Do the jobs of `source` that are not done, in worker processes.

    **Arguments:** `source()` gives a planned job and what `work` is to be given for it; `total`: how many there will
    be; `over(job, outcome)`; `heard(job, row)`: after each epoch, whether the job shall stop.
    """
    jobs: dict[int, Job] = {}

    def unfinished() -> tuple[int, Any] | None:
        while (found := source()) is not None:
            job, work_ = found
            jobs[job["number"]] = job
            if not record.finished(Path(job["folder"])) or job["config"]["rerun"]:
                return job["number"], work_
            log.info("%s: found in %s", name(job), console.place(Path(job["folder"])))
            over(job, Outcome("done"))
            advance()
        return None

    def name(job: Job) -> str:
        return f"job {job['number'] + 1} of {total}"

    def listen(number: int, message: tuple[Any, ...]) -> bool:
        kind, content = message
        if kind == "said":
            console.say(content if len(environments) == 1 else f"[{number + 1}] {content}")
        elif kind == "started":
            log.info("%s: %s", name(jobs[number]), " ".join(jobs[number]["overrides"]))
        return kind == "epoch" and heard(jobs[number], content)

    def ended(number: int, outcome: Outcome) -> None:
        path = Path(jobs[number]["folder"])
        if outcome.state != "done":
            log.error("%s %s: %s (%s)", name(jobs[number]), *outcome, console.place(path))
            known = record.status(path)
            if known != outcome and known.state != "running":  # it could not say so itself, nor does another run it
                path.mkdir(parents=True, exist_ok=True)
                record.mark(path, *outcome)
        over(jobs[number], outcome)
        advance()

    with console.bar(total) as advance:
        pool.run(unfinished, work, environments, ended, listen, max_failures)


def attempt(do: Callable[[], Any], tell: pool.Tell) -> Outcome:
    """In a worker: do one job, its lines told to the parent, and say how it ended."""
    console.send_to(lambda line: tell("said", line))
    tell("started", None)
    try:
        do()
        return Outcome("done")
    except Exception as error:
        state = {DivergedError: "diverged", PrunedError: "pruned"}.get(type(error), "failed")
        return Outcome(state, (str(error) or type(error).__name__).splitlines()[0])


def slots(asked: int | None, jobs: int, device: str) -> list[dict[str, str]]:
    """What each worker's environment adds: a GPU of its own, or its share of the CPU's cores.

    **Arguments:** `asked`: how many workers; None: one for each GPU, one where there are none.
    """
    import torch

    gpus: list[str] = []
    if device in ("auto", "cuda") and torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    count = max(1, min(asked or len(gpus) or 1, jobs))
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(count)]
    if count == 1:
        return [{}]
    return [{"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count))} for _ in range(count)]
