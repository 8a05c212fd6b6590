"""Many jobs: all are checked before the first starts, none stops the others, and a report from files ends them."""

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from kd.config.schema import Config, run_dir, validate_config
from kd.config.wandb_env import refuse_choice
from kd.core import console
from kd.core.errors import DivergedError, PrunedError, SweepFailedError, UserError, first_line
from kd.core.interleave import RunCache, run_interleaved
from kd.core.settings import flatten
from kd.report import build
from kd.report.tables import read_plan
from kd.runs import directory
from kd.sweep import worker_pool
from kd.sweep.directory import SweepDirectory
from kd.sweep.progress import SweepProgress
from kd.sweep.worker_pool import Outcome
from kd.training import tracking
from kd.training.checkpoint import Checkpoints
from kd.training.finalize import summary_lines
from kd.training.run import check_resume_compatible, steps

log = logging.getLogger(__name__)

Job = dict[str, Any]


def plan(
    sweep: SweepDirectory,
    jobs: Iterable[tuple[Sequence[str], Mapping[str, Any]]],
    before: Sequence[Job] = (),
    total: int = 1,
) -> list[Job]:
    """Check every job (what was typed, its configuration) and write them down in the sweep's directory, after those
    that came before. **Raises:** UserError naming the first job that cannot be run; then nothing is written."""
    added, blind = [], False
    for job, config in check_plan(console.progress(jobs, total, "planning"), len(before)):
        added.append(job)
        blind |= config.description.val == 0
    if (
        blind
        and len({json.dumps({**job["config"], "seed": None}, sort_keys=True) for job in added}) > 1
    ):
        refuse_choice()
    sweep.write([*before, *added])
    if not before:
        tracking.name_group(sweep.path, added)
    return added


def check_plan(
    jobs: Iterable[tuple[Sequence[str], Mapping[str, Any]]], first: int = 0
) -> Iterator[tuple[Job, Config]]:
    """Check jobs, numbered from `first` on, and write nothing. **Raises:** UserError naming one that cannot be run."""
    known: dict[Any, Any] = {}
    for number, (words, composed) in enumerate(jobs, first):
        try:
            config = validate_config(composed, known)
            check_resume_compatible(config)
        except UserError as error:
            raise UserError(
                f"{error} (job {number + 1}: {' '.join(words)}; no job was started)"
            ) from error
        job = {
            "number": number,
            "overrides": list(words),
            "id": config.identity(),
            "folder": str(run_dir(config)),
            "taught": config.chooses_teacher,
            "baseline": str(run_dir(config.as_standard())),
            "teachers": [str(run_dir(one)) for one in config.trained_teachers()],
            "content": config.description.fingerprint,
            "config": config.to_dict(),
        }
        yield job, config


@contextmanager
def report_on_exit(folder: Path, default: bool = False) -> Iterator[SweepDirectory]:
    """Whatever happens inside, the planned jobs end in a report in `folder`, which is given on. `default`: the
    directory is a new one of kd's own naming.

    **Raises:** SweepFailedError when a job is not done (a pruned one is); what was raised before anything was planned.
    """
    sweep = SweepDirectory(folder, default)
    try:
        yield from _with_report(sweep)
    finally:
        sweep.release()


def _with_report(sweep: SweepDirectory) -> Iterator[SweepDirectory]:
    folder = sweep.path
    try:
        yield sweep
    except BaseException as error:
        if not sweep.planned:
            raise
        if isinstance(error, UserError):
            raise
        if not isinstance(error, Exception):  # interrupted: quickly, what there is
            log.info("interrupted; the same command again goes on")
            _write_report(folder, figures=False)
            raise
        what = first_line(error)
        if what not in {
            directory.read_status(Path(job["folder"])).reason for job in read_plan(folder)
        }:  # not a job's own
            log.error("the launcher failed: %s", what, exc_info=log.isEnabledFor(logging.DEBUG))
        raise SweepFailedError(_write_report(folder) or f"the launcher failed: {what}") from error
    if failed := _write_report(folder):
        raise SweepFailedError(failed)


def _write_report(folder: Path, figures: bool = True) -> str:
    """Report on the planned jobs. **Returns:** which are not done, in words; nothing when all are done or pruned."""
    jobs = read_plan(folder)
    found = build.write([folder], folder, figures)
    log.info("\n%s\n", found.text)
    states = [directory.read_status(Path(job["folder"])).state for job in jobs]
    log.info(
        "%d jobs: %s", len(jobs), ", ".join(f"{n} {state}" for state, n in Counter(states).items())
    )
    log.info("report   %s", console.display_path(found.page or folder))
    if figures and jobs:
        frames = {name: getattr(found.tables, name) for name in ("runs", "summary")}
        pictures = [folder / "figures" / f"{name}.png" for name in found.figures]
        tracking.report_sweep(
            validate_config(jobs[0]["config"]).root.tracker, folder, frames, pictures, found.text
        )
    left = [str(n) for n, state in enumerate(states, 1) if state not in ("done", "pruned")]
    if figures and jobs and not left:
        tracking.report_trial(
            validate_config(jobs[0]["config"]).root.tracker,
            folder,
            *_preferred_setting(jobs, found.tables),
        )
    return f"{len(left)} of {len(jobs)} jobs are not done: {', '.join(left)}" if left else ""


def _preferred_setting(
    jobs: Sequence[Job], tables: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Of the jobs' settings the best on validation: the results of its runs, and the mean history of these. Nothing
    where there are several settings and no validation images."""
    runs = tables.runs[
        tables.runs["id"].isin([job["id"] for job in jobs]) & (tables.runs["status"] == "done")
    ]
    runs = runs.drop_duplicates("id")
    settings = runs["setting"].drop_duplicates()
    if len(settings) > 1:
        if "val_accuracy" not in runs:
            return [], []
        means = runs.groupby("setting", sort=False)["val_accuracy"].mean()
        runs = runs[runs["setting"] == means.idxmax()]
    folders = {job["id"]: Path(job["folder"]) for job in jobs}
    results = [result for id_ in runs["id"] if (result := directory.load_result(folders[id_]))]
    history = tables.history[tables.history["id"].isin(runs["id"])].drop(
        columns=["id", "setting", "method", "seed"]
    )
    rows = history.groupby("epoch", as_index=False).mean(numeric_only=True).to_dict("records")
    told = [
        {name: value for name, value in row.items() if not pd.isna(value)} for row in rows
    ]  # no other's loss terms
    return results, [{**row, "epoch": int(row["epoch"])} for row in told]


# ---- on this machine


class LocalScheduler:
    """Does the jobs of `source` that are not done, in worker processes.

    **Arguments:** `source()` gives planned jobs that go together (mostly one), each with what `work` is to be given
    for it; `over(job, outcome)`; `heard(job, row)`: after each epoch, whether the job shall stop; `stop_after`: after
    how many failed jobs no other is started (one that diverged or was pruned has not failed; `failures` did before).
    """

    def __init__(
        self,
        source: Callable[[], list[tuple[Job, Any]] | None],
        work: worker_pool.Work,
        environments: Sequence[Mapping[str, str]],
        progress: SweepProgress,
        max_failures: int = 0,
        stop_after: int | None = None,
        failures: int = 0,
        over: Callable[[Job, Outcome], None] = lambda job, outcome: None,
        heard: Callable[[Job, dict[str, Any]], bool] = lambda job, row: False,
    ) -> None:
        self.source, self.work, self.environments, self.progress = (
            source,
            work,
            environments,
            progress,
        )
        self.max_failures, self.stop_after, self.failures = max_failures, stop_after, failures
        self.on_job_end, self.on_message = over, heard
        self.jobs: dict[int, Job] = {}
        self.packs: dict[int, list[int]] = {}  # the numbers that go together, by the first of them
        self.next_number: dict[
            int, dict[int, Any]
        ] = {}  # what is to be done of each pack, by number
        self.parts: dict[int, Outcome] = {}  # what came of one of several

    def run(self) -> None:
        with self.progress as progress:
            worker_pool.run(
                self._next,
                self.work,
                self.environments,
                self._ended,
                self._receive,
                self.max_failures,
                progress.tick,
            )

    def _next(self) -> tuple[int, Any] | None:
        """The next jobs that are to be trained, by the number of the first."""
        while not self._has_failed_enough() and (unit := self.source()) is not None:
            self.jobs |= {job["number"]: job for job, _ in unit}
            left = {job["number"]: work for job, work in unit if not self._skip_finished(job)}
            if left:
                first = next(iter(left))
                self.packs[first], self.next_number[first] = list(left), left
                return first, left
        return None

    def _has_failed_enough(self) -> bool:
        if self.stop_after is None or self.failures < self.stop_after:
            return False
        jobs = "1 job" if self.failures == 1 else f"{self.failures} jobs"
        log.error(
            "%s failed: no other is started (hydra.launcher.stop_after=%d)", jobs, self.stop_after
        )
        self.stop_after = None
        self.source = lambda: None
        return True

    def _skip_finished(self, job: Job) -> bool:
        """Was it done before?"""
        path = Path(job["folder"])
        result = directory.load_result(path)
        if result is None or job["config"]["rerun"]:
            return False
        Checkpoints(path).clear()  # of a process that was killed at its very end
        self.progress.job_already_done(job, result)
        self.on_job_end(job, Outcome("done"))
        return True

    def _receive(self, first: int, message: tuple[Any, ...]) -> bool:
        """A worker that has the pack of this number tells something. **Returns:** whether it shall stop."""
        kind, *content = message
        if kind == "started":
            for number in self.next_number[first]:
                self.parts.pop(number, None)
                self.progress.job_started(self.jobs[number])
        elif kind == "part":
            number, self.parts[number] = content
            if (
                self.parts[number].state != "failed"
            ):  # should the pack be tried again, this one is not
                self.next_number[first].pop(number)
        elif kind == "line":
            number, line = content
            self.progress.line(first if number is None else number, *line)
        elif kind == "epoch_ended":
            number, epoch = content
            self.progress.epoch_ended(first if number is None else number, epoch)
        return kind == "epoch" and self.on_message(self.jobs[first], content[0])

    def _ended(self, first: int, outcome: Outcome) -> None:
        for number in self.packs[first]:
            self._end(self.jobs[number], self.parts.get(number, outcome))

    def _end(self, job: Job, outcome: Outcome) -> None:
        path = Path(job["folder"])
        if outcome.state == "killed" and directory.load_result(path):  # at its very end
            outcome = Outcome("done")
        self.progress.job_ended(job, outcome)
        self.failures += outcome.state in ("failed", "killed")
        if outcome.state != "done":
            known = directory.read_status(path)
            if (
                known != outcome and known.state != "running"
            ):  # it could not say so itself, nor does another run it
                path.mkdir(parents=True, exist_ok=True)
                directory.write_status(path, *outcome)
        self.on_job_end(job, outcome)


def run_job(do: Callable[[], Any], tell: worker_pool.Send) -> Outcome:
    """In a worker: do one job, its lines told to the parent, and say how it ended."""
    console.redirect_output(lambda kind, content: tell(kind, None, content))
    tell("started")
    try:
        do()
    except Exception as error:
        return _outcome(error)
    return Outcome("done")


def run_pack(configs: Mapping[int, Config], shared: RunCache, tell: worker_pool.Send) -> Outcome:
    """In a worker: do several jobs, by number, a step of each in turn, and say how each ended."""
    numbers = sorted(
        configs, key=lambda n: str(run_dir(configs[n]))
    )  # runs are locked in one order by all packs
    speaker = numbers[:1]
    console.redirect_output(lambda kind, content: tell(kind, speaker[0], content))
    tell("started")
    outcomes: list[Outcome] = []

    @contextmanager
    def around(place: int) -> Iterator[None]:
        speaker[0] = numbers[place]
        with console.log_to_file(run_dir(configs[numbers[place]]) / "kd.log"):
            yield

    def ended(place: int, end: Any) -> None:
        number, config = numbers[place], configs[numbers[place]]
        outcomes.append(_outcome(end) if isinstance(end, Exception) else Outcome("done"))
        if outcomes[-1].state == "done":
            with around(place):
                for line in summary_lines(config, end, run_dir(config)):
                    log.info(line)
        tell("part", number, outcomes[-1])

    with shared.signals.installed():
        run_interleaved(
            [steps(configs[n], "student", None, shared, len(numbers)) for n in numbers],
            around,
            ended,
        )
    shared.forget("step/")
    return next((o for o in outcomes if o.state == "failed"), outcomes[0])


def _outcome(error: Exception) -> Outcome:
    state = {DivergedError: "diverged", PrunedError: "pruned"}.get(type(error), "failed")
    return Outcome(state, first_line(error))


_PER_RUN_KEYS = re.compile(
    r"seed|(optimizer|schedule)\..*|method\.(alpha|beta|T)|paths\..*|tracker\..*|checkpoint\..*|rerun"
)


def group_compatible_jobs(jobs: Sequence[Job], most: int) -> list[list[Job]]:
    """Jobs that go well together, at most so many: equal but for seed, weights of the method, optimizer and schedule.

    Those of one seed, which share every batch, come side by side. Who stays alone is told why.
    """
    groups: dict[str, list[Job]] = {}
    folders: set[str] = set()
    said = {job["number"]: flatten(job["config"]) for job in jobs}
    for job in jobs:
        alike = {
            key: value
            for key, value in said[job["number"]].items()
            if not _PER_RUN_KEYS.fullmatch(key)
        }
        again = (
            job["folder"] in folders
        )  # the same run a second time: it waits for the first, outside its pack
        folders.add(job["folder"])
        groups.setdefault(f"{again} {sorted(alike.items())}", []).append(job)
    found = []
    for group in groups.values():
        group.sort(key=lambda job: job["config"]["seed"])
        found += [group[i : i + most] for i in range(0, len(group), most)]
        if len(group) == 1 and len(groups) > 1:
            number = group[0]["number"]
            other = next(o[0]["number"] for o in groups.values() if o is not group)
            differ = [
                k
                for k, v in said[number].items()
                if not _PER_RUN_KEYS.fullmatch(k) and said[other].get(k) != v
            ]
            log.info(
                "job %d is not packed: no other job has its %s",
                number + 1,
                ", ".join(differ) or "method's keys",
            )
    return sorted(found, key=lambda pack: pack[0]["number"])


def order_by_teacher(units: Sequence[list[Job]]) -> Iterator[list[Job]]:
    """As several workers best start them, each chosen when it is asked for: for each teacher that has to be trained one
    job that does it, then those that can be done beside that, last those that have to wait for it."""
    left = [(unit, {path for job in unit for path in job.get("teachers", ())}) for unit in units]
    missing, begun = set[str]().union(*(named for _, named in left)), set[str]()
    while left:
        if not missing:  # each comes in its turn: no need to compare it with all others
            yield from (unit for unit, _ in left)
            return
        missing = {path for path in missing if not directory.load_result(Path(path))}
        ranks = [0 if named & missing - begun else 2 if named & missing else 1 for _, named in left]
        unit, named = left.pop(ranks.index(min(ranks)))
        begun |= named
        yield unit


def worker_environments(
    asked: int | None, jobs: int, device: str, each_core: bool = True
) -> list[dict[str, str]]:
    """What each worker's environment adds: a GPU of its own, or its share of the CPU's cores.

    **Arguments:** `asked`: how many workers; None: one for each GPU or, on the CPU and with `each_core`, for each core
    (one thread a training wastes the least), else one.
    """
    import torch

    gpus: list[str] = []
    if device in ("auto", "cuda") and torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    on_cpu = device == "cpu" or (
        device == "auto" and not gpus and not torch.backends.mps.is_available()
    )
    default = len(gpus) or (torch.get_num_threads() if on_cpu and each_core else 1)
    count = max(1, min(asked or default, jobs))
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(count)]
    if count == 1:
        return [{}]
    return [
        {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count))} for _ in range(count)
    ]
