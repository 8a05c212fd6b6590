"""Hydra's grid of every combination, with what a sweep of trainings needs around it: checked first, reported last."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf

from hydra_plugins import _kd_grid
from hydra_plugins._kd_compose import Composer
from hydra_plugins._kd_grid import key_of


@dataclass
class GridConf:
    _target_: str = "hydra_plugins._kd_sweeper.GridSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = field(default_factory=dict)  # swept keys of an experiment


class GridSweeper(Sweeper):
    """Every job is checked before the first starts; whatever happens to the jobs, and with any launcher, all batches
    are launched and the sweep ends in a report made from files."""

    hydra_context: Any
    launcher: Any
    config: Any

    def __init__(
        self, max_batch_size: int | None = None, params: Mapping[str, str] | None = None
    ) -> None:
        self.max_batch_size = max_batch_size

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        from kd.core.errors import UserError

        self.hydra_context, self.config = hydra_context, config
        self.choices = _kd_grid.choices(hydra_context.config_loader, config)
        _kd_grid.apply_shared_config(config, self.choices)
        settings = config.hydra.sweeper
        if "n_trials" in settings:
            raise UserError(
                "hydra/sweeper: experiments that choose a search are not swept over; search one at a time"
            )
        self.max_batch_size = settings.max_batch_size
        if self.max_batch_size is not None and self.max_batch_size < 1:
            raise UserError(
                f"hydra.sweeper.max_batch_size: should be 1 or more, got {self.max_batch_size}"
            )
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from kd.sweep.scheduler import plan, report_on_exit

        if is_dry(self):
            return self.describe()
        with report_on_exit(resolve_sweep_dir(self), is_default(self)) as directory:
            settings = self.settings()
            directory.claim()
            plan(directory, self.expand(settings), total=self.count(settings))
            OmegaConf.save(self.config, resolve_sweep_dir(self) / "multirun.yaml")
            return self.launch()

    def launch(self) -> list[Sequence[JobReturn]]:
        """Launch every planned job, batch by batch. **Raises:** JobFailedError for the first that failed."""
        from kd.core.errors import JobFailedError, UserError, first_line

        size = self.max_batch_size or len(self.jobs)
        done: list[Sequence[JobReturn]] = []
        errors: list[BaseException] = []
        for first in range(0, len(self.jobs), size):
            try:
                done.append(
                    self.launcher.launch(self.jobs[first : first + size], initial_job_idx=first)
                )
            except UserError:  # the launcher's own settings are wrong
                raise
            except Exception as error:
                errors.append(error)
            else:  # asking for return_value would print it
                errors += [job._return_value for job in done[-1] if job.status is JobStatus.FAILED]
        for failed in errors:
            if not isinstance(failed, Exception):  # an interruption
                raise failed
        if errors:
            raise JobFailedError(first_line(errors[0])) from errors[0]
        return done

    def describe(self) -> None:
        """Print the jobs, and do none."""
        from kd.sweep.dry_run import describe
        from kd.sweep.scheduler import check_plan, worker_environments

        planned = list(check_plan(self.expand(self.settings())))
        local = hasattr(self.launcher, "stream")
        workers = (
            worker_environments(self.launcher.slots, len(planned), self.config.device)
            if local
            else []
        )
        describe(planned, len(workers) or None)

    def settings(self) -> list[list[str]]:
        """The overrides of each setting of the grid."""
        return _kd_grid.jobs(self.hydra_context.config_loader, self.config, self.choices)

    def count(self, settings: list[list[str]]) -> int:
        """The number of jobs, as far as it is known before they are composed."""
        return len(settings) * (
            len(self.config.seeds) if OmegaConf.is_list(self.config.seeds) else 1
        )

    def expand(self, settings: list[list[str]]) -> Iterator[tuple[list[str], dict[str, Any]]]:
        """Give what `composed` gives of each job, one for each seed of each setting; note its overrides in `jobs`."""
        self.jobs: list[list[str]] = []
        for setting in settings:
            for words, job in each_seed(self, setting, len(self.jobs)):
                self.jobs.append(words)
                yield job


def resolve_sweep_dir(sweeper: Any) -> Path:
    """The sweep's own directory."""
    return Path(str(sweeper.config.hydra.sweep.dir)).absolute()


def is_default(sweeper: Any) -> bool:
    """Whether the sweep's directory is a new one of kd's own naming."""
    unresolved: Any = OmegaConf.to_container(sweeper.config.hydra.sweep, resolve=False)
    return "kd.sweep_dir" in str(unresolved["dir"])


def composed(sweeper: Any, words: list[str], number: int = 0) -> tuple[list[str], dict[str, Any]]:
    """(what was typed, the plain configuration) of the job of this number. **Raises:** Hydra's errors."""
    from kd.cli import to_container

    if not hasattr(sweeper, "composer"):
        sweeper.composer = Composer(
            sweeper.hydra_context.config_loader, sweeper.config, to_container
        )
    if is_dry(sweeper):
        return _shown_overrides(words), sweeper.composer(
            [*words, "dry_run=false"], number
        )  # each job as it would be
    return _shown_overrides(words), sweeper.composer(words, number)


def is_dry(sweeper: Any) -> bool:
    """Whether the command is to print its jobs only."""
    return sweeper.config.get("dry_run", False) is True


def _shown_overrides(words: list[str]) -> list[str]:
    """The overrides of a job as they are shown."""
    return [word for word in filter_overrides(words) if key_of(word) != "dry_run"]


def each_seed(
    sweeper: Any, words: list[str], first: int
) -> list[tuple[list[str], tuple[list[str], dict[str, Any]]]]:
    """(Overrides, what `composed` gives for them) of a setting's jobs, one for each of its `seeds`.

    `first` is the number of the first job. **Raises:** UserError when a seed is given as well.
    """
    shown, config = composed(sweeper, words, first)
    seeds = seeds_of(words, config)
    if seeds is None:
        return [(words, (shown, config))]
    jobs: list[tuple[list[str], tuple[list[str], dict[str, Any]]]] = []
    for seed in seeds:
        own = [*(word for word in words if key_of(word) != "seeds"), f"seed={seed}"]
        typed = [*own, "seeds=null", "hydra.mode=MULTIRUN"]  # which `seeds` implied
        jobs.append(
            (typed, (_shown_overrides(own), composed(sweeper, typed, first + len(jobs))[1]))
        )
    return jobs


def seeds_of(words: list[str], config: Mapping[str, Any]) -> list[int] | None:
    """The key `seeds` of a setting. **Raises:** UserError when it is wrong, or a seed is given as well."""
    from kd.config.schema import check_seeds
    from kd.core.errors import UserError

    try:
        seeds = check_seeds(config.get("seeds"))
    except ValueError as error:
        raise UserError(f"seeds: {error}") from None
    given = [word for word in words if key_of(word) == "seed"]
    if seeds is not None and given:
        remedy = "give one of them (seeds=null turns off those of an experiment)"
        raise UserError(f"seeds: {given[0]} is given beside seeds={seeds}; {remedy}")
    return seeds
