"""kd's grid sweeper, `hydra/sweeper=grid`: check every combination first, and report at the end."""

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
    """The configuration of the sweeper."""

    _target_: str = "hydra_plugins._kd_sweeper.GridSweeper"
    # Number of jobs that are launched at once; null for all.
    max_batch_size: int | None = None
    # The swept keys of an experiment.
    params: dict[str, str] | None = field(default_factory=dict)


class GridSweeper(Sweeper):
    """Runs every combination of the swept keys.

    All jobs are checked before the first starts. Whatever happens to the jobs, and with any
    launcher, all batches are launched, and the sweep ends in a report made from files.
    """

    hydra_context: Any
    launcher: Any
    config: Any

    def __init__(
        self, max_batch_size: int | None = None, params: Mapping[str, str] | None = None
    ) -> None:
        self.max_batch_size = max_batch_size

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Create the launcher, with the settings of experiments that are selected."""
        from kd.core.errors import UserError

        self.hydra_context = hydra_context
        self.config = config
        self.choices = _kd_grid.choices(hydra_context.config_loader, config)
        _kd_grid.apply_shared_config(config, self.choices)
        settings = config.hydra.sweeper
        if "n_trials" in settings:
            raise UserError(
                "hydra/sweeper: experiments that select a search cannot be swept over; run one "
                "search at a time"
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
        """Plan, run and report on the jobs of the grid."""
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
        """Launch all planned jobs, batch by batch.

        Returns:
            What the launcher returned for each batch.

        Raises:
            JobFailedError: A job or a batch failed; the message is that of the first failure. It is
                raised after all batches have been launched.
            UserError: The launcher's own settings are invalid.
        """
        from kd.core.errors import JobFailedError, UserError, first_line

        size = self.max_batch_size or len(self.jobs)
        done: list[Sequence[JobReturn]] = []
        errors: list[BaseException] = []
        for first in range(0, len(self.jobs), size):
            try:
                done.append(
                    self.launcher.launch(self.jobs[first : first + size], initial_job_idx=first)
                )
            except UserError:  # the launcher's own settings are invalid
                raise
            except Exception as error:
                errors.append(error)
            else:  # reading return_value instead of _return_value would print the error
                errors += [job._return_value for job in done[-1] if job.status is JobStatus.FAILED]
        for failure in errors:
            if not isinstance(failure, Exception):  # an interruption
                raise failure
        if errors:
            raise JobFailedError(first_line(errors[0])) from errors[0]
        return done

    def describe(self) -> None:
        """Print the jobs, without running any."""
        from kd.sweep.dry_run import describe
        from kd.sweep.scheduler import check_plan, worker_environments

        planned = list(check_plan(self.expand(self.settings())))
        workers: list[dict[str, str]] = []
        if hasattr(self.launcher, "stream"):  # kd's own launcher, on this machine
            workers = worker_environments(self.launcher.slots, len(planned), self.config.device)
        describe(planned, len(workers) or None)

    def settings(self) -> list[list[str]]:
        """Return the overrides of each setting of the grid."""
        return _kd_grid.jobs(self.hydra_context.config_loader, self.config, self.choices)

    def count(self, settings: list[list[str]]) -> int:
        """Return the number of jobs, as far as it is known before they are composed."""
        seeds = len(self.config.seeds) if OmegaConf.is_list(self.config.seeds) else 1
        return len(settings) * seeds

    def expand(self, settings: list[list[str]]) -> Iterator[tuple[list[str], dict[str, Any]]]:
        """Yield the result of `composed` for each job, one per seed of each setting.

        The overrides of each job are stored in `jobs`.
        """
        self.jobs: list[list[str]] = []
        for setting in settings:
            for overrides, job in each_seed(self, setting, len(self.jobs)):
                self.jobs.append(overrides)
                yield job


def resolve_sweep_dir(sweeper: Any) -> Path:
    """Return the directory of the sweep."""
    return Path(str(sweeper.config.hydra.sweep.dir)).absolute()


def is_default(sweeper: Any) -> bool:
    """Return whether the sweep's directory is a new one that kd named."""
    unresolved: Any = OmegaConf.to_container(sweeper.config.hydra.sweep, resolve=False)
    return "kd.sweep_dir" in str(unresolved["dir"])


def composed(
    sweeper: Any, overrides: list[str], number: int = 0
) -> tuple[list[str], dict[str, Any]]:
    """Return the displayed overrides and the plain configuration of a job.

    Args:
        sweeper: The sweeper, which keeps a `Composer` in its attribute `composer`.
        overrides: All overrides of the job.
        number: Number of the job.

    Raises:
        HydraException: Hydra cannot compose the configuration; OmegaConf's errors are also raised.
    """
    from kd.cli import to_container

    if not hasattr(sweeper, "composer"):
        sweeper.composer = Composer(
            sweeper.hydra_context.config_loader, sweeper.config, to_container
        )
    displayed = _displayed_overrides(overrides)
    if is_dry(sweeper):  # compose each job as it would be run
        return displayed, sweeper.composer([*overrides, "dry_run=false"], number)
    return displayed, sweeper.composer(overrides, number)


def is_dry(sweeper: Any) -> bool:
    """Return whether the command only prints its jobs."""
    return sweeper.config.get("dry_run", False) is True


def _displayed_overrides(overrides: list[str]) -> list[str]:
    """Return the overrides of a job that are displayed."""
    return [override for override in filter_overrides(overrides) if key_of(override) != "dry_run"]


def each_seed(
    sweeper: Any, overrides: list[str], first: int
) -> list[tuple[list[str], tuple[list[str], dict[str, Any]]]]:
    """Compose the jobs of a setting, one for each of its `seeds`.

    Args:
        sweeper: The sweeper.
        overrides: The overrides of the setting.
        first: Number of the first job.

    Returns:
        For each job its overrides and the result of `composed` for them.

    Raises:
        UserError: `seeds` is invalid, or a seed is given as well.
    """
    displayed, config = composed(sweeper, overrides, first)
    seeds = seeds_of(overrides, config)
    if seeds is None:
        return [(overrides, (displayed, config))]
    jobs: list[tuple[list[str], tuple[list[str], dict[str, Any]]]] = []
    for seed in seeds:
        others = [override for override in overrides if key_of(override) != "seeds"]
        typed = [*others, f"seed={seed}"]
        complete = [*typed, "seeds=null", "hydra.mode=MULTIRUN"]  # the mode that `seeds` implied
        displayed = _displayed_overrides(typed)
        jobs.append((complete, (displayed, composed(sweeper, complete, first + len(jobs))[1])))
    return jobs


def seeds_of(overrides: list[str], config: Mapping[str, Any]) -> list[int] | None:
    """Return the key `seeds` of a setting.

    Raises:
        UserError: It is invalid, or a seed is given as well.
    """
    from kd.core.errors import UserError
    from kd.core.execution import check_seeds

    try:
        seeds = check_seeds(config.get("seeds"))
    except ValueError as error:
        raise UserError(f"seeds: {error}") from None
    given = [override for override in overrides if key_of(override) == "seed"]
    if seeds is not None and given:
        remedy = "give only one of them (seeds=null turns off an experiment's seeds)"
        raise UserError(f"seeds: {given[0]} and seeds={seeds} are both given; {remedy}")
    return seeds
