"""Hydra finds launchers only in this namespace package. It is imported by every Hydra app, so it imports little."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf, open_dict


@dataclass
class LocalConf:
    _target_: str = "hydra_plugins.kd_launcher.LocalLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="local", node=LocalConf, provider="kd")


class LocalLauncher(Launcher):
    """kd's launcher: checks every job before the first starts, gives each job its run's own directory."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from kd.cli import plain
        from kd.sweep import check_all, run_all

        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        folder = Path(str(self.config.hydra.sweep.dir)).absolute()
        loader = self.hydra_context.config_loader
        configs = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            config = loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
                if OmegaConf.select(config, "tracker.group", throw_on_missing=False) is None:
                    config.tracker.group = "-".join(folder.parts[-2:])
            configs.append(config)
        words = [list(filter_overrides(overrides)) for overrides in job_overrides]
        folders = check_all([plain(config) for config in configs], words)
        folder.mkdir(parents=True, exist_ok=True)
        returned: list[JobReturn] = []

        def start(number: int) -> BaseException | None:
            job = run_job(
                hydra_context=self.hydra_context, task_function=self.task_function, config=configs[number],
                job_dir_key="hydra.run.dir", job_subdir_key=None,
            )  # fmt: skip
            configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
            returned.append(job)
            return None if job.status is JobStatus.COMPLETED else job._return_value

        run_all(folder, words, folders, start)
        return returned
