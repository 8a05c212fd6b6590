"""kd's launcher: `hydra/launcher=local`.

Hydra accepts launchers and sweepers only from this namespace package, which belongs to every Hydra application of the
environment. It skips modules whose names begin with an underscore, so that those of kd are imported and registered
only by `kd.cli`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra import version
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf, open_dict


@dataclass
class LocalConf:
    _target_: str = "hydra_plugins._kd_launcher.LocalLauncher"
    slots: int | None = (
        None  # worker processes; null: one for each GPU or, without GPUs, for each core
    )
    pack: int = 1  # jobs that a worker runs at once, a step of each in turn, with one batch and one teacher for all
    max_failures: int = 0  # how often a job that failed or was killed is tried again
    stop_after: int | None = None  # failed jobs after which no other is started; null: all are


class LocalLauncher(Launcher):
    """Processes on this machine, each of which runs many jobs, every one in its run's own directory."""

    def __init__(
        self,
        slots: int | None = None,
        pack: int = 1,
        max_failures: int = 0,
        stop_after: int | None = None,
    ) -> None:
        self.slots, self.pack, self.max_failures, self.stop_after = (
            slots,
            pack,
            max_failures,
            stop_after,
        )
        self.failures = 0

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        from kd.core.errors import UserError

        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        limits = {"slots": 1, "pack": 1, "max_failures": 0, "stop_after": 1}
        for key, least in limits.items():
            value = getattr(self, key)
            if value is not None and value < least:
                raise UserError(f"hydra.launcher.{key}: should be {least} or more, got {value}")

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """What kd.sweep has planned. Each JobReturn is COMPLETED: one job's failure is not the sweep's, and the files
        say what came of it."""
        from kd.sweep.scheduler import (
            group_compatible_jobs,
            order_by_teacher,
            read_plan,
            worker_environments,
        )

        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        planned = read_plan(Path(str(self.config.hydra.sweep.dir)).absolute())
        words = {n: list(words) for n, words in zip(numbers, job_overrides, strict=True)}
        mine = [planned[n] for n in numbers]
        workers = len(worker_environments(self.slots, len(mine), self.config.device))
        most = min(self.pack, -(-len(mine) // workers))  # no worker is left without
        units = group_compatible_jobs(mine, most) if most > 1 else [[job] for job in mine]
        turns = order_by_teacher(units) if workers > 1 else units
        jobs = ([(job, words[job["number"]]) for job in unit] for unit in turns)
        self.stream(
            lambda: next(jobs, None),
            len(planned),
            worker_environments(self.slots, len(units), self.config.device),
        )
        return [JobReturn(overrides=words, status=JobStatus.COMPLETED) for words in job_overrides]

    def stream(self, source: Any, total: int, environments: Any, **hooks: Any) -> None:
        """Do the jobs of a source of lists of (planned job, overrides); see LocalScheduler and slots."""
        from kd.sweep.progress import sweep_progress
        from kd.sweep.scheduler import LocalScheduler

        if self.stop_after is not None and self.failures >= self.stop_after:  # of an earlier batch
            return

        setup_globals()
        name = JobRuntime.instance().get("name")
        work = JobRunner(
            self.hydra_context, self.config, self.task_function, version.getbase(), name
        )
        scheduler = LocalScheduler(
            source,
            work,
            environments,
            sweep_progress(total, self.config.hydra.overrides.task),
            self.max_failures,
            self.stop_after,
            self.failures,
            **hooks,
        )
        scheduler.run()
        self.failures = scheduler.failures


@dataclass
class JobRunner:
    """What a worker process needs to run any job of the sweep."""

    hydra_context: Any
    config: Any
    task_function: Any
    version_base: Any
    name: str
    shared: Any = None  # what jobs of one process have in common

    def __call__(self, jobs: dict[int, list[str]], tell: Any) -> Any:
        from kd.core.interleave import RunCache
        from kd.sweep.scheduler import Outcome, run_job, run_pack

        setup_globals()
        version.setbase(str(self.version_base))
        JobRuntime.instance().set("name", self.name)
        Plugins.instance()  # finds the plugins, whose nodes the configuration is composed of
        self.shared = self.shared or RunCache()
        if len(jobs) == 1:
            ((number, words),) = jobs.items()
            return run_job(lambda: self._run_one(number, words, tell), tell)
        try:
            configs = {number: self._prepare(number, words) for number, words in jobs.items()}
        except Exception as error:
            return Outcome("failed", repr(error))
        return run_pack(configs, self.shared, tell)

    def _compose(self, number: int, words: list[str]) -> Any:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, words)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
            config.hydra.run.dir = (
                "${kd.run_dir:}"  # each run's own; a multirun of Hydra's does not use hydra.run.dir
            )
        return config

    def _run_one(self, number: int, words: list[str], tell: Any) -> None:
        done = run_job(
            hydra_context=self.hydra_context,
            config=self._compose(number, words),
            job_dir_key="hydra.run.dir",
            job_subdir_key=None,
            task_function=partial(self.task_function, tell=tell, shared=self.shared),
        )
        if done.status is not JobStatus.COMPLETED:
            raise done._return_value  # asking for return_value would print it

    def _prepare(self, number: int, words: list[str]) -> Any:
        """The checked configuration of one of several jobs, .hydra/ written as run_job does."""
        from kd.cli import hydra_values, prepare

        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        composed = self._compose(number, words)
        place = Path(str(composed.hydra.run.dir)).absolute()
        with open_dict(composed):
            composed.hydra.runtime.output_dir = str(place)
            job = composed.copy()
            sweep, kept, hydra = job.hydra.sweep.dir, job.hydra.output_subdir, job.pop("hydra")
        if kept is not None:
            (place / kept).mkdir(parents=True, exist_ok=True)
            OmegaConf.save(job, place / kept / "config.yaml")
            OmegaConf.save(OmegaConf.create({"hydra": hydra}), place / kept / "hydra.yaml")
            OmegaConf.save(hydra.overrides.task, place / kept / "overrides.yaml")
        with hydra_values(composed):
            return prepare(job, sweep)
