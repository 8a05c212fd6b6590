"""Schedule many jobs: check all before the first starts, isolate failures, and end in a report.

No job's failure stops the others. The report is made from the files that the jobs have written.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from kd.config.schema import Config, run_dir
from kd.config.validate import validate_config
from kd.config.wandb_env import refuse_choice
from kd.core import console
from kd.core.errors import DivergedError, PrunedError, SweepFailedError, UserError, first_line
from kd.core.execution import ExecutionSettings
from kd.core.interleave import RunCache, run_interleaved
from kd.core.settings import Effect, flatten, is_under, keys_with
from kd.report import build
from kd.report.tables import read_plan
from kd.runs import directory
from kd.runs.schema import Job, JobRecord
from kd.runs.status import RunState, RunStatus
from kd.sweep import worker_pool
from kd.sweep.directory import SweepDirectory
from kd.sweep.progress import SweepProgress
from kd.training import tracking
from kd.training.checkpoint import Checkpoints
from kd.training.finalize import summary_lines
from kd.training.run import TrainingRun, check_resume_compatible

log = logging.getLogger(__name__)


def plan(
    sweep: SweepDirectory,
    jobs: Iterable[tuple[Sequence[str], Mapping[str, Any]]],
    before: Sequence[JobRecord] = (),
    total: int = 1,
) -> list[JobRecord]:
    """Check all jobs, and write them to the sweep's directory.

    Args:
        sweep: The claimed directory.
        jobs: Overrides and composed configuration of each job.
        before: Jobs that were planned earlier. They come first in the plan.
        total: Expected number of jobs, for the progress display.

    Returns:
        The new jobs.

    Raises:
        UserError: A job cannot be run; the message names the first one. Nothing is written then.
    """
    added: list[JobRecord] = []
    without_validation = False
    for job, config in check_plan(console.progress(jobs, total, "planning"), len(before)):
        added.append(job)
        without_validation |= config.description.val == 0
    if without_validation:
        settings = {json.dumps({**job["config"], "seed": None}, sort_keys=True) for job in added}
        if len(settings) > 1:
            refuse_choice()
    sweep.write([*before, *added])
    if not before:
        tracking.name_group(sweep.path, added)
    return added


def check_plan(
    jobs: Iterable[tuple[Sequence[str], Mapping[str, Any]]], first: int = 0
) -> Iterator[tuple[JobRecord, Config]]:
    """Check jobs one by one, and write nothing.

    Args:
        jobs: Overrides and composed configuration of each job.
        first: Number of the first job.

    Yields:
        Each job as it is planned, and its configuration.

    Raises:
        UserError: A job cannot be run; the message names it.
    """
    memo: dict[Any, Any] = {}  # shared by all jobs: what `validate_config` has read from files
    for number, (overrides, composed) in enumerate(jobs, first):
        try:
            config = validate_config(composed, memo)
            check_resume_compatible(config)
        except UserError as error:
            raise UserError(
                f"{error} (job {number + 1}: {' '.join(overrides)}; no job was started)"
            ) from error
        job = Job(
            number=number,
            overrides=list(overrides),
            id=config.identity(),
            folder=str(run_dir(config)),
            taught=config.chooses_teacher,
            baseline=str(run_dir(config.as_standard())),
            teachers=[str(run_dir(teacher)) for teacher in config.trained_teachers()],
            content=config.description.fingerprint,
            config=config.to_dict(),  # type: ignore[arg-type]  # checked, and kept as it is
        )
        yield job.model_dump(), config


@contextmanager
def report_on_exit(folder: Path, default: bool = False) -> Iterator[SweepDirectory]:
    """Write a report on the planned jobs to `folder` on exit, whatever happens inside.

    Args:
        folder: The sweep's directory.
        default: Whether it is a new directory named by kd.

    Yields:
        The sweep's directory, not yet claimed.

    Raises:
        SweepFailedError: A job is neither done nor pruned. Before anything is planned, the
            original exception is raised instead.
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
        if not isinstance(error, Exception):  # interrupted: no time for figures
            log.info("interrupted; run the same command again to resume")
            _write_report(folder, figures=False)
            raise
        reason = first_line(error)
        job_reasons = {
            directory.read_status(Path(job["folder"])).reason for job in read_plan(folder)
        }
        if reason not in job_reasons:
            debug = log.isEnabledFor(logging.DEBUG)
            log.error("the launcher failed: %s", reason, exc_info=debug)
        failure = _write_report(folder) or f"the launcher failed: {reason}"
        raise SweepFailedError(failure) from error
    if failure := _write_report(folder):
        raise SweepFailedError(failure)


def _write_report(folder: Path, figures: bool = True) -> str:
    """Report on the planned jobs; return which did not finish, or "" if all are done or pruned."""
    jobs = read_plan(folder)
    report = build.write([folder], folder, figures)
    log.info("\n%s\n", report.text)
    states = [directory.read_status(Path(job["folder"])).state for job in jobs]
    counts = ", ".join(f"{count} {state}" for state, count in Counter(states).items())
    log.info("%d jobs: %s", len(jobs), counts)
    log.info("report   %s", console.display_path(report.page or folder))
    if figures and jobs:
        frames = {name: getattr(report.tables, name) for name in ("runs", "summary")}
        images = [folder / "figures" / f"{name}.png" for name in report.figures]
        tracker = validate_config(jobs[0]["config"]).tracker
        tracking.report_sweep(tracker, folder, frames, images, report.text)
    unfinished = [
        str(n) for n, state in enumerate(states, 1) if state not in (RunState.DONE, RunState.PRUNED)
    ]
    if figures and jobs and not unfinished:
        tracker = validate_config(jobs[0]["config"]).tracker
        tracking.report_trial(tracker, folder, *_preferred_setting(jobs, report.tables))
    if not unfinished:
        return ""
    return f"{len(unfinished)} of {len(jobs)} jobs are not done: {', '.join(unfinished)}"


def _preferred_setting(
    jobs: Sequence[JobRecord], tables: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the results and mean history of the setting that is best on validation.

    Returns:
        The results of the runs of that setting, and one row per epoch with the mean over these
        runs. Both are empty if there are several settings and no validation images.
    """
    runs = tables.runs[
        tables.runs["id"].isin([job["id"] for job in jobs])
        & (tables.runs["status"] == RunState.DONE)
    ]
    runs = runs.drop_duplicates("id")
    summary = tables.summary[tables.summary["setting"].isin(runs["setting"])]
    if len(summary) > 1:  # sorted: the first is the best complete one
        if summary["choice_value"].isna().any():
            return [], []
        best = summary.loc[summary["chosen"]].iloc[0]
        runs = runs[runs["setting"] == best["setting"]]
    folders = {job["id"]: Path(job["folder"]) for job in jobs}
    results = [result for id_ in runs["id"] if (result := directory.load_result(folders[id_]))]
    history = tables.history[tables.history["id"].isin(runs["id"])].drop(
        columns=["id", "setting", "method", "seed"]
    )
    rows = history.groupby("epoch", as_index=False).mean(numeric_only=True).to_dict("records")
    return results, [_history_row(row) for row in rows]


def _history_row(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a row of mean history without missing values, such as loss terms of other methods."""
    present = {name: value for name, value in row.items() if not pd.isna(value)}
    return {**present, "epoch": int(present["epoch"])}


# ---- on this machine


class LocalScheduler:
    """Runs the unfinished jobs of a source in worker processes.

    Args:
        source: Returns the next planned jobs that run together in one worker (mostly one job), each
            with its payload for `work`; None if there are none at present.
        work: Runs the jobs of one call of `source` in a worker, given their payloads by number.
        environments: Additional environment variables of each worker.
        progress: Shows what happens.
        max_retries: How often to retry a job that failed or was killed.
        stop_after: Number of failed jobs after which no more are started; None for no limit. A job
            that diverged or was pruned has not failed.
        failures: Number of jobs that have failed before.
        on_job_end: Called as `on_job_end(job, outcome)`.
        on_epoch: Called as `on_epoch(job, row)` after each epoch; returns whether the job should
            stop.
    """

    def __init__(
        self,
        source: Callable[[], list[tuple[JobRecord, Any]] | None],
        work: worker_pool.Work,
        environments: Sequence[Mapping[str, str]],
        progress: SweepProgress,
        max_retries: int = 0,
        stop_after: int | None = None,
        failures: int = 0,
        on_job_end: Callable[[JobRecord, RunStatus], None] = lambda job, outcome: None,
        on_epoch: Callable[[JobRecord, dict[str, Any]], bool] = lambda job, row: False,
    ) -> None:
        self.source = source
        self.work = work
        self.environments = environments
        self.progress = progress
        self.max_retries = max_retries
        self.stop_after = stop_after
        self.failures = failures
        self.on_job_end = on_job_end
        self.on_epoch = on_epoch
        self.jobs: dict[int, JobRecord] = {}
        # A pack is the jobs that run together. It is identified by the number of its first job.
        self.packs: dict[int, list[int]] = {}  # the job numbers of each pack
        self.pending: dict[int, dict[int, Any]] = {}  # of each pack, the payloads still to be run
        self.member_outcomes: dict[int, RunStatus] = {}  # of the jobs of packs, by job number

    def run(self) -> None:
        """Run all jobs."""
        with self.progress as progress:
            worker_pool.run(
                self._next,
                self.work,
                self.environments,
                self._pack_ended,
                self._receive,
                self.max_retries,
                progress.tick,
            )

    def _next(self) -> tuple[int, Any] | None:
        """Return the next pack to be trained as its number and its payloads by job number."""
        while not self._has_failed_enough() and (unit := self.source()) is not None:
            self.jobs |= {job["number"]: job for job, _ in unit}
            payloads = {
                job["number"]: payload for job, payload in unit if not self._skip_finished(job)
            }
            if payloads:
                first = next(iter(payloads))
                self.packs[first] = list(payloads)
                self.pending[first] = payloads
                return first, payloads
        return None

    def _has_failed_enough(self) -> bool:
        if self.stop_after is None or self.failures < self.stop_after:
            return False
        jobs = "1 job" if self.failures == 1 else f"{self.failures} jobs"
        log.error(
            "%s failed: no more jobs will be started (hydra.launcher.stop_after=%d)",
            jobs,
            self.stop_after,
        )
        self.stop_after = None
        self.source = lambda: None
        return True

    def _skip_finished(self, job: JobRecord) -> bool:
        """Return whether the job had finished before, after reporting it as done."""
        path = Path(job["folder"])
        result = directory.load_result(path)
        if result is None or job["config"]["rerun"]:
            return False
        Checkpoints(path).clear()  # left if the process was killed just before its end
        self.progress.job_already_done(job, result)
        self.on_job_end(job, RunStatus(RunState.DONE))
        return True

    def _receive(self, first: int, message: tuple[Any, ...]) -> bool:
        """Handle a message from the worker of pack `first`; return whether it should stop."""
        kind, *content = message
        if kind == "started":
            for number in self.pending[first]:
                self.member_outcomes.pop(number, None)
                self.progress.job_started(self.jobs[number])
        elif kind == "member_ended":
            number, outcome = content
            self.member_outcomes[number] = outcome
            if outcome.state != RunState.FAILED:  # a retry of the pack leaves this job out
                self.pending[first].pop(number)
        elif kind == "line":
            number, line = content
            self.progress.line(first if number is None else number, *line)
        elif kind == "epoch_ended":
            number, epoch = content
            self.progress.epoch_ended(first if number is None else number, epoch)
        return kind == "epoch" and self.on_epoch(self.jobs[first], content[0])

    def _pack_ended(self, first: int, outcome: RunStatus) -> None:
        for number in self.packs[first]:
            self._job_ended(self.jobs[number], self.member_outcomes.get(number, outcome))

    def _job_ended(self, job: JobRecord, outcome: RunStatus) -> None:
        path = Path(job["folder"])
        if outcome.state == RunState.KILLED and directory.load_result(path):
            outcome = RunStatus(RunState.DONE)  # it was killed after it had written its result
        self.progress.job_ended(job, outcome)
        self.failures += outcome.state in (RunState.FAILED, RunState.KILLED)
        if outcome.state != RunState.DONE:
            recorded = directory.read_status(path)
            # Record the outcome if the job could not do so itself and no other process runs it.
            if recorded != outcome and recorded.state != RunState.RUNNING:
                path.mkdir(parents=True, exist_ok=True)
                directory.write_status(path, *outcome)
        self.on_job_end(job, outcome)


def run_job(do: Callable[[], Any], send: worker_pool.Send) -> RunStatus:
    """Run one job in a worker process.

    Args:
        do: Runs the job.
        send: Receives the job's log lines and epochs, for the parent.

    Returns:
        How the job ended. An exception of `do` is not raised.
    """
    console.redirect_output(lambda kind, content: send(kind, None, content))
    send("started")
    try:
        do()
    except Exception as error:
        return _outcome(error)
    return RunStatus(RunState.DONE)


def run_pack(configs: Mapping[int, Config], cache: RunCache, send: worker_pool.Send) -> RunStatus:
    """Run several jobs in a worker process, interleaved step by step.

    Args:
        configs: Configuration of each job, by number.
        cache: Holds the data, batches and teacher outputs that the jobs share.
        send: Receives the jobs' log lines, epochs and outcomes, for the parent.

    Returns:
        The outcome of the first job that failed, or else of the first job that ended.
    """
    # All packs lock their runs in the same order, so that they cannot deadlock.
    numbers = sorted(configs, key=lambda n: str(run_dir(configs[n])))
    current_job = numbers[:1]  # a list of one, which the functions below change
    console.redirect_output(lambda kind, content: send(kind, current_job[0], content))
    send("started")
    outcomes: list[RunStatus] = []

    @contextmanager
    def log_to_own_file(index: int) -> Iterator[None]:
        current_job[0] = numbers[index]
        with console.log_to_file(run_dir(configs[numbers[index]]) / "kd.log"):
            yield

    def on_end(index: int, result: Any) -> None:
        number = numbers[index]
        config = configs[number]
        outcomes.append(
            _outcome(result) if isinstance(result, Exception) else RunStatus(RunState.DONE)
        )
        if outcomes[-1].state == RunState.DONE:
            with log_to_own_file(index):
                for line in summary_lines(config, result, run_dir(config)):
                    log.info(line)
        send("member_ended", number, outcomes[-1])

    with cache.signals.installed():
        members = [
            TrainingRun(configs[number], cache=cache, packed=len(numbers)).steps()
            for number in numbers
        ]
        run_interleaved(members, log_to_own_file, on_end)
    cache.forget("step/")
    return next((outcome for outcome in outcomes if outcome.state == RunState.FAILED), outcomes[0])


def _outcome(error: Exception) -> RunStatus:
    state = {DivergedError: RunState.DIVERGED, PrunedError: RunState.PRUNED}.get(
        type(error), RunState.FAILED
    )
    return RunStatus(state, first_line(error))


# Keys in which the jobs of one process may differ
_PER_RUN_KEYS = (
    *("seed", "optimizer", "schedule", "method.alpha", "method.beta", "method.T"),
    *keys_with(ExecutionSettings, Effect.NONE),
)


def group_compatible_jobs(jobs: Sequence[JobRecord], most: int) -> list[list[JobRecord]]:
    """Group jobs that can share one process into packs of at most `most` jobs.

    Jobs are compatible if they differ only in the seed, the weights of the method, the optimizer,
    the schedule, and keys that do not affect the training (paths, tracker, checkpoint, rerun). Jobs
    of one seed share every batch, so they are adjacent. For a job that is grouped with no other,
    the reason is logged.
    """
    groups: dict[str, list[JobRecord]] = {}
    folders: set[str] = set()
    flat_configs = {job["number"]: flatten(job["config"]) for job in jobs}
    for job in jobs:
        common = {
            key: value
            for key, value in flat_configs[job["number"]].items()
            if not is_under(key, _PER_RUN_KEYS)
        }
        # A second job of the same run waits for the first, so it must be in another pack.
        is_duplicate = job["folder"] in folders
        folders.add(job["folder"])
        groups.setdefault(f"{is_duplicate} {sorted(common.items())}", []).append(job)
    packs = []
    for group in groups.values():
        group.sort(key=lambda job: job["config"]["seed"])
        packs += [group[i : i + most] for i in range(0, len(group), most)]
        if len(group) == 1 and len(groups) > 1:
            number = group[0]["number"]
            other_group = next(members for members in groups.values() if members is not group)
            other = other_group[0]["number"]
            differing = [
                key
                for key, value in flat_configs[number].items()
                if not is_under(key, _PER_RUN_KEYS) and flat_configs[other].get(key) != value
            ]
            log.info(
                "job %d is not packed: no other job has the same %s",
                number + 1,
                ", ".join(differing) or "method keys",
            )
    return sorted(packs, key=lambda pack: pack[0]["number"])


def order_by_teacher(units: Sequence[list[JobRecord]]) -> Iterator[list[JobRecord]]:
    """Yield packs in the order in which several workers should start them.

    For each teacher that has to be trained, one job that trains it comes first. Then come the jobs
    that can run meanwhile, and last those that have to wait for a teacher. The next one is chosen
    when it is requested, by the teachers that are finished then.
    """
    remaining = [(unit, _teacher_paths(unit)) for unit in units]
    missing = set[str]().union(*(teachers for _, teachers in remaining))
    started = set[str]()
    while remaining:
        if not missing:  # keep the order, without comparing each job with all others
            yield from (unit for unit, _ in remaining)
            return
        missing = {path for path in missing if not directory.load_result(Path(path))}
        ranks = [_start_rank(teachers, missing, started) for _, teachers in remaining]
        unit, teachers = remaining.pop(ranks.index(min(ranks)))
        started |= teachers
        yield unit


def _teacher_paths(unit: list[JobRecord]) -> set[str]:
    """Return the directories of all teachers that the jobs of a pack need."""
    return {path for job in unit for path in job.get("teachers", ())}


def _start_rank(teachers: set[str], missing: set[str], started: set[str]) -> int:
    """Rank a pack by its teachers: 0 starts to train one, 1 needs no missing one, 2 has to wait."""
    if teachers & (missing - started):
        return 0
    return 2 if teachers & missing else 1


def worker_environments(
    slots: int | None, jobs: int, device: str, each_core: bool = True
) -> list[dict[str, str]]:
    """Return what each worker's environment adds: a GPU of its own, or its share of the CPU cores.

    Args:
        slots: Number of workers. None for one per GPU or, on the CPU with `each_core`, one per core
            (a single thread per training wastes the least), and otherwise one.
        jobs: Number of jobs. There are no more workers than jobs.
        device: The configured device.
        each_core: Whether to use one worker per CPU core by default.

    Returns:
        One mapping of environment variables per worker.
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
    count = max(1, min(slots or default, jobs))
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(count)]
    if count == 1:
        return [{}]
    return [
        {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count))} for _ in range(count)
    ]
