"""Hydra's grid of every combination, with what a sweep of trainings needs around it: checked first, reported last."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import filter_overrides
from omegaconf import OmegaConf

Plugins.instance()  # its scan executes BasicSweeper's module again: a subclass of the class before that would be broken

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper  # noqa: E402

from hydra_plugins import _kd_grid  # noqa: E402
from hydra_plugins._kd_compose import Composer  # noqa: E402
from hydra_plugins._kd_grid import key_of  # noqa: E402


@dataclass
class GridConf:
    _target_: str = "hydra_plugins._kd_sweeper.GridSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = field(default_factory=dict)  # swept keys of an experiment


class GridSweeper(BasicSweeper):
    """Every job is checked before the first starts; whatever happens to the jobs, and with any launcher, the sweep
    ends in a report made from files."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        from kd.settings import UserError

        self.choices = _kd_grid.choices(hydra_context.config_loader, config)
        _kd_grid.adopt(config, self.choices)
        settings = config.hydra.sweeper
        if "n_trials" in settings:
            raise UserError("hydra/sweeper: experiments that choose a search are not swept over; search one at a time")
        self.max_batch_size = settings.max_batch_size
        if self.max_batch_size is not None and self.max_batch_size < 1:
            raise UserError(f"hydra.sweeper.max_batch_size: should be 1 or more, got {self.max_batch_size}")
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def split_arguments(self, overrides: Any, max_batch_size: int | None) -> list[list[list[str]]]:  # type: ignore[override]
        """Hydra's own has one grid, in which the swept keys of swept experiments are lost."""
        return [list(batch) for batch in self.split_overrides_to_chunks(self.settings(), max_batch_size)]

    def sweep(self, arguments: list[str]) -> Any:
        from kd.sweep import concluding, plan

        if is_dry(self):
            return self.describe()
        with concluding(place(self)) as directory:
            settings = self.settings()
            directory.claim()
            plan(directory, self.expand(settings), total=self.count(settings))
            return super().sweep(arguments)

    def describe(self) -> None:
        """Print the jobs, and do none."""
        from kd.dry_run import describe
        from kd.sweep import checked, slots

        assert self.config is not None
        planned = list(checked(self.expand(self.settings())))
        local = hasattr(self.launcher, "stream")
        workers = slots(self.launcher.slots, len(planned), self.config.device) if local else []  # type: ignore[union-attr]
        describe(planned, len(workers) or None)

    def settings(self) -> list[list[str]]:
        """The overrides of each setting of the grid."""
        assert self.hydra_context is not None
        assert self.config is not None
        return _kd_grid.jobs(self.hydra_context.config_loader, self.config, self.choices)

    def count(self, settings: list[list[str]]) -> int:
        """The number of jobs, as far as it is known before they are composed."""
        assert self.config is not None
        return len(settings) * (len(self.config.seeds) if OmegaConf.is_list(self.config.seeds) else 1)

    def expand(self, settings: list[list[str]]) -> Iterator[tuple[list[str], dict[str, Any]]]:
        """Give what `composed` gives of each job, one for each seed of each setting; note its overrides in `jobs`."""
        self.jobs: list[list[str]] = []
        for setting in settings:
            for words, job in each_seed(self, setting, len(self.jobs)):
                self.jobs.append(words)
                yield job

    def get_job_batch(self) -> Sequence[Sequence[str]]:
        if self.batch_index == 0:
            self.overrides = list(self.split_overrides_to_chunks(self.jobs, self.max_batch_size))
        return super().get_job_batch()

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Compose nothing: `plan` has composed and checked every job."""


def place(sweeper: Any) -> Path:
    """The sweep's own directory."""
    return Path(str(sweeper.config.hydra.sweep.dir)).absolute()


def composed(sweeper: Any, words: list[str], number: int = 0) -> tuple[list[str], dict[str, Any]]:
    """(what was typed, the plain configuration) of the job of this number. **Raises:** Hydra's errors."""
    from kd.cli import plain

    if not hasattr(sweeper, "composer"):
        sweeper.composer = Composer(sweeper.hydra_context.config_loader, sweeper.config, plain)
    if is_dry(sweeper):
        return _shown(words), sweeper.composer([*words, "dry_run=false"], number)  # each job as it would be
    return _shown(words), sweeper.composer(words, number)


def is_dry(sweeper: Any) -> bool:
    """Whether the command is to print its jobs only."""
    return sweeper.config.get("dry_run", False) is True


def _shown(words: list[str]) -> list[str]:
    """The overrides of a job as they are shown."""
    return [word for word in filter_overrides(words) if key_of(word) != "dry_run"]


def each_seed(sweeper: Any, words: list[str], first: int) -> list[tuple[list[str], tuple[list[str], dict[str, Any]]]]:
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
        jobs.append((typed, (_shown(own), composed(sweeper, typed, first + len(jobs))[1])))
    return jobs


def seeds_of(words: list[str], config: Mapping[str, Any]) -> list[int] | None:
    """The key `seeds` of a setting. **Raises:** UserError when it is wrong, or a seed is given as well."""
    from kd.config import check_seeds
    from kd.settings import UserError

    try:
        seeds = check_seeds(config.get("seeds"))
    except ValueError as error:
        raise UserError(f"seeds: {error}") from None
    given = [word for word in words if key_of(word) == "seed"]
    if seeds is not None and given:
        remedy = "give one of them (seeds=null turns off those of an experiment)"
        raise UserError(f"seeds: {given[0]} is given beside seeds={seeds}; {remedy}")
    return seeds
