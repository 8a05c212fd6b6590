"""Hydra finds launchers only in this namespace package. It is imported by every Hydra app, so it imports little."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra import version
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import open_dict


@dataclass
class LocalConf:
    _target_: str = "hydra_plugins.kd_launcher.LocalLauncher"
    slots: int | None = None  # worker processes; null: one for each GPU, one without GPUs. More than GPUs share them
    max_failures: int = 0  # how often a job that failed or was killed is tried again


ConfigStore.instance().store(group="hydra/launcher", name="local", node=LocalConf, provider="kd")


class LocalLauncher(Launcher):
    """Processes on this machine, each of which runs many jobs, every one in its run's own directory."""

    def __init__(self, slots: int | None = None, max_failures: int = 0) -> None:
        self.slots, self.max_failures = slots, max_failures

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        from kd.settings import UserError

        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        for key, value, least in (("slots", self.slots, 1), ("max_failures", self.max_failures, 0)):
            if value is not None and value < least:
                raise UserError(f"hydra.launcher.{key}: should be {least} or more, got {value}")

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """What kd.sweep has planned. Each JobReturn is COMPLETED: one job's failure is not the sweep's, and the files
        say what came of it."""
        from kd.sweep import read_plan

        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        planned = read_plan(Path(str(self.config.hydra.sweep.dir)).absolute())
        jobs = ((planned[n], (n, list(words))) for n, words in zip(numbers, job_overrides, strict=True))
        self.stream(lambda: next(jobs, None), len(planned))
        return [JobReturn(overrides=words, status=JobStatus.COMPLETED) for words in job_overrides]

    def stream(self, source: Any, total: int, **hooks: Any) -> None:
        """Do the jobs of a source that gives (planned job, (number, overrides)); see kd.sweep.run_local."""
        from kd.sweep import run_local, slots

        setup_globals()
        name = JobRuntime.instance().get("name")
        work = Work(self.hydra_context, self.config, self.task_function, version.getbase(), name)
        environments = slots(self.slots, total, self.config.device)
        run_local(source, total, work, environments, self.max_failures, **hooks)


@dataclass
class Work:
    """What a worker process needs to run any job of the sweep."""

    hydra_context: Any
    config: Any
    task_function: Any
    version_base: Any
    name: str

    def __call__(self, job: tuple[int, list[str]], tell: Any) -> Any:
        from kd.sweep import attempt

        def do() -> None:
            setup_globals()
            version.setbase(str(self.version_base))
            JobRuntime.instance().set("name", self.name)
            Plugins.instance()  # finds the plugins, whose nodes the configuration is composed of
            number, words = job
            config = self.hydra_context.config_loader.load_sweep_config(self.config, words)
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
            done = run_job(
                hydra_context=self.hydra_context, config=config, job_dir_key="hydra.run.dir", job_subdir_key=None,
                task_function=partial(self.task_function, tell=tell),
            )  # fmt: skip
            if done.status is not JobStatus.COMPLETED:
                raise done._return_value  # asking for return_value would print it

        return attempt(do, tell)
