"""Hydra's grid of every combination, with what a sweep of trainings needs around it: checked first, reported last."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.utils import filter_overrides


@dataclass
class GridConf:
    _target_: str = "hydra_plugins.kd_sweeper.GridSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = field(default_factory=dict)  # swept keys of an experiment


ConfigStore.instance().store(group="hydra/sweeper", name="grid", node=GridConf, provider="kd")


class GridSweeper(BasicSweeper):
    """Every job is checked before the first starts; whatever happens to the jobs, and with any launcher, the sweep
    ends in a report made from files."""

    def sweep(self, arguments: list[str]) -> Any:
        from kd.sweep import concluding

        with concluding(place(self)):
            return super().sweep(arguments)

    def get_job_batch(self) -> Sequence[Sequence[str]]:
        from kd.sweep import plan

        if self.batch_index == 0:
            jobs = [list(words) for batch in self.overrides or () for words in batch]
            plan(place(self), [composed(self, words) for words in jobs])
        return super().get_job_batch()


def place(sweeper: Any) -> Path:
    """The sweep's own directory."""
    return Path(str(sweeper.config.hydra.sweep.dir)).absolute()


def composed(sweeper: Any, words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """(what was typed, the plain configuration) of one job of a sweeper's. **Raises:** Hydra's errors."""
    from kd.cli import plain

    config = sweeper.hydra_context.config_loader.load_sweep_config(sweeper.config, words)
    return list(filter_overrides(words)), plain(config)
