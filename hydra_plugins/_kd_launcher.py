"""kd's launcher, `hydra/launcher=local`: run jobs in worker processes on this machine.

Hydra accepts launchers and sweepers only from this namespace package, which all Hydra applications
of the environment share. Hydra skips modules whose names begin with an underscore, so kd's modules
are imported and registered only by `kd.cli`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra import version
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, configure_log, setup_globals
from hydra.core.utils import run_job as run_hydra_job
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf, open_dict


@dataclass
class LocalConf:
    """The configuration of the launcher."""

    _target_: str = "hydra_plugins._kd_launcher.LocalLauncher"
    # Number of worker processes; null for one per GPU or, without GPUs, one per core.
    slots: int | None = None
    # Jobs that a worker runs at once, interleaved step by step, sharing batches and teacher.
    jobs_per_worker: int = 1
    # How often to retry a job that failed or was killed.
    max_retries: int = 0
    # Number of failed jobs after which no more are started; null for no limit.
    stop_after: int | None = None


class LocalLauncher(Launcher):
    """Runs jobs in processes on this machine, each job in the directory of its run.

    A process runs many jobs. The arguments are those of `LocalConf`.
    """

    def __init__(
        self,
        slots: int | None = None,
        jobs_per_worker: int = 1,
        max_retries: int = 0,
        stop_after: int | None = None,
    ) -> None:
        self.slots = slots
        self.jobs_per_worker = jobs_per_worker
        self.max_retries = max_retries
        self.stop_after = stop_after
        self.failures = 0

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Store what jobs need, and check the launcher's settings."""
        from kd.core.errors import UserError

        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config
        minimums = {"slots": 1, "jobs_per_worker": 1, "max_retries": 0, "stop_after": 1}
        for key, minimum in minimums.items():
            value = getattr(self, key)
            if value is not None and value < minimum:
                raise UserError(f"hydra.launcher.{key}: should be {minimum} or more, got {value}")

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run a batch of the planned jobs.

        Each JobReturn is COMPLETED, because a failed job does not fail the sweep. The files of the
        runs record how each job ended.
        """
        from kd.report.tables import read_plan
        from kd.sweep.scheduler import (
            group_compatible_jobs,
            order_by_teacher,
            worker_environments,
        )

        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        planned = read_plan(Path(str(self.config.hydra.sweep.dir)).absolute())
        overrides_by_number = {
            number: list(overrides)
            for number, overrides in zip(numbers, job_overrides, strict=True)
        }
        batch = [planned[number] for number in numbers]
        workers = len(worker_environments(self.slots, len(batch), self.config.device))
        max_pack = min(
            self.jobs_per_worker, -(-len(batch) // workers)
        )  # so that every worker gets jobs
        units = [[job] for job in batch]
        if max_pack > 1:
            units = group_compatible_jobs(batch, max_pack)
        ordered = order_by_teacher(units) if workers > 1 else units
        jobs = ([(job, overrides_by_number[job["number"]]) for job in unit] for unit in ordered)
        self.stream(
            lambda: next(jobs, None),
            len(planned),
            worker_environments(self.slots, len(units), self.config.device),
        )
        return [
            JobReturn(overrides=overrides, status=JobStatus.COMPLETED)
            for overrides in job_overrides
        ]

    def stream(self, source: Any, total: int, environments: Any, **hooks: Any) -> None:
        """Run jobs as a source provides them; see `LocalScheduler` and `worker_environments`.

        Args:
            source: Returns the next jobs as a list of (planned job, overrides), or None.
            total: Number of jobs of the sweep, to be shown.
            environments: Additional environment variables of each worker.
            hooks: The callbacks of `LocalScheduler`.
        """
        from kd.sweep.progress import sweep_progress
        from kd.sweep.scheduler import LocalScheduler

        if self.stop_after is not None and self.failures >= self.stop_after:  # in an earlier batch
            return

        setup_globals()
        job_name = JobRuntime.instance().get("name")
        # As plain strings, because a comparison with an element of a ListConfig would resolve it
        fixed: Any = OmegaConf.to_container(self.config.hydra.overrides.task, resolve=False)
        work = JobRunner(
            self.hydra_context, self.config, self.task_function, version.getbase(), job_name
        )
        scheduler = LocalScheduler(
            source,
            work,
            environments,
            sweep_progress(total, fixed),
            self.max_retries,
            self.stop_after,
            self.failures,
            **hooks,
        )
        scheduler.run()
        self.failures = scheduler.failures


@dataclass
class JobRunner:
    """Runs any job of the sweep in a worker process; picklable."""

    hydra_context: Any
    config: Any
    task_function: Any
    version_base: Any
    name: str
    cache: Any = None  # the RunCache of a process, created by its first job

    def __call__(self, jobs: dict[int, list[str]], send: Any) -> Any:
        """Run jobs together, given their overrides by number, and return their outcome."""
        from kd.core.interleave import RunCache
        from kd.runs.status import RunState, RunStatus
        from kd.sweep.scheduler import run_job, run_pack
        from kd.training.device import set_threads

        setup_globals()
        version.setbase(str(self.version_base))
        JobRuntime.instance().set("name", self.name)
        set_threads()
        Plugins.instance()  # discovers the plugins whose nodes are part of the configuration
        self.cache = self.cache or RunCache()
        if len(jobs) == 1:
            ((number, overrides),) = jobs.items()
            return run_job(lambda: self._run_one(number, overrides, send), send)
        try:
            configs = {
                number: self._prepare(number, overrides) for number, overrides in jobs.items()
            }
        except Exception as error:
            return RunStatus(RunState.FAILED, repr(error))
        return run_pack(configs, self.cache, send)

    def _compose(self, number: int, overrides: list[str]) -> Any:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
            # Each run has its own directory. Hydra's multiruns do not use hydra.run.dir.
            config.hydra.run.dir = "${kd.run_dir:}"
        return config

    def _run_one(self, number: int, overrides: list[str], send: Any) -> None:
        job_return = run_hydra_job(
            hydra_context=self.hydra_context,
            config=self._compose(number, overrides),
            job_dir_key="hydra.run.dir",
            job_subdir_key=None,
            task_function=partial(self.task_function, report=send, cache=self.cache),
        )
        if job_return.status is not JobStatus.COMPLETED:
            raise job_return._return_value  # reading return_value would print it

    def _prepare(self, number: int, overrides: list[str]) -> Any:
        """Return the checked configuration of one of several jobs; write .hydra/ as Hydra does."""
        from kd.cli import hydra_values, prepare

        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        composed = self._compose(number, overrides)
        output_dir = Path(str(composed.hydra.run.dir)).absolute()
        with open_dict(composed):
            composed.hydra.runtime.output_dir = str(output_dir)
            job = composed.copy()
            sweep_dir = job.hydra.sweep.dir
            output_subdir = job.hydra.output_subdir
            hydra = job.pop("hydra")
        if output_subdir is not None:
            hydra_dir = output_dir / output_subdir
            hydra_dir.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(job, hydra_dir / "config.yaml")
            OmegaConf.save(OmegaConf.create({"hydra": hydra}), hydra_dir / "hydra.yaml")
            OmegaConf.save(hydra.overrides.task, hydra_dir / "overrides.yaml")
        with hydra_values(composed):
            return prepare(job, sweep_dir)
