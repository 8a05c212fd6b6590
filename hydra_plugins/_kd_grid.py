"""Expand a grid into the overrides of its jobs.

A swept group may contribute a grid of its own, as in +experiment=temperature,compare.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

# The parts of Hydra's node that a sweep has only once. An experiment's other settings for Hydra
# are composed for each job.
SHARED = ("launcher", "sweeper", "sweep", "callbacks", "hydra_logging", "verbose")


@dataclass(frozen=True)
class Choice:
    """One combination of the swept groups that have settings for Hydra."""

    overrides: dict[str, str]  # {key: override}, such as {"experiment": "+experiment=compare"}
    hydra: DictConfig  # Hydra's node, composed with these overrides

    @property
    def params(self) -> dict[str, Any]:
        """The swept keys of this choice."""
        return dict(self.hydra.sweeper.get("params") or {})


def parsed(loader: Any, params: Mapping[str, Any], arguments: Iterable[str]) -> dict[str, Override]:
    """Parse overrides: first `hydra.sweeper.params`, then those of the command line.

    Returns:
        The overrides by key, without a leading +. The last override of a key takes precedence.

    Raises:
        UserError: An override is invalid; the message names its key.
    """
    from kd.config.overrides import parse

    overrides: dict[str, Override] = {}
    for text in [*(f"{key}={value}" for key, value in params.items()), *arguments]:
        override = parse(text, config_loader=loader)
        overrides[override.get_key_element().lstrip("+")] = override
    return overrides


def values(override: Override) -> list[str]:
    """Return every `key=value` that an override expands to.

    Raises:
        UserError: It expands to none, or cannot be expanded.
    """
    from kd.core.errors import UserError, first_line

    key = override.get_key_element()
    if override.is_delete() and override.value_type is None:
        return [key]
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    name = override.key_or_group
    if not override.is_discrete_sweep():
        raise UserError(
            f"{name}: interval(a,b) is for hydra/sweeper=optuna; a grid takes a list of values, "
            f"such as {name}=1,2,4"
        )
    try:
        assignments = [f"{key}={value}" for value in override.sweep_string_iterator()]
    except Exception as error:  # for example a step of 0, or a glob over something not a group
        raise UserError(f"{name}: {first_line(error)}") from error
    if not assignments:
        value = str(override.input_line).partition("=")[2]
        raise UserError(f"{name}: {value} expands to no values, so there are no jobs")
    return assignments


def product(overrides: Mapping[str, Override]) -> list[list[str]]:
    """Return every combination of values as a list of overrides; the last key varies fastest."""
    combinations = itertools.product(*map(values, overrides.values()))
    return [list(combination) for combination in combinations]


def choices(loader: Any, config: DictConfig) -> list[Choice]:
    """Return every combination of the swept groups that have settings for Hydra.

    Hydra itself composes the configuration of a sweep without its swept groups.
    """
    task_overrides = _raw_overrides(config, "task")
    hydra_overrides = _raw_overrides(config, "hydra")
    config_name = config.hydra.job.config_name
    overrides = parsed(loader, config.hydra.sweeper.get("params") or {}, task_overrides)
    repository = loader._parse_overrides_and_create_caching_repo(config_name, hydra_overrides)[1]
    swept: dict[str, list[str]] = {}
    for key, override in overrides.items():
        group = override.key_or_group
        if override.is_discrete_sweep() and repository.group_exists(group):
            assignments = values(override)
            if any(_sets_hydra(repository, group, assignment) for assignment in assignments):
                swept[key] = assignments
    fixed: list[str] = []
    for override in overrides.values():
        if repository.group_exists(override.key_or_group) and not override.is_sweep_override():
            fixed += values(override)
    combinations: list[Choice] = []
    for combination in itertools.product(*swept.values()) if swept else ():
        composed = loader.load_configuration(
            config_name=config_name,
            overrides=[*hydra_overrides, *fixed, *combination],
            run_mode=RunMode.MULTIRUN,
        )
        combinations.append(Choice(dict(zip(swept, combination, strict=True)), composed.hydra))
    return combinations


def _raw_overrides(config: DictConfig, kind: str) -> list[str]:
    """Return the overrides as typed, since only a job can resolve ${hydra:job.num}."""
    overrides: Any = OmegaConf.to_container(config.hydra.overrides[kind], resolve=False)
    return list(overrides)


def _sets_hydra(repository: Any, group: str, assignment: str) -> bool:
    """Return whether a choice of a group may change Hydra's own settings.

    Its file is read but not composed, which would take much longer.
    """
    choice = assignment.partition("=")[2]
    if choice.startswith("{"):
        return False  # keys and values, merged into the node of the group
    loaded = repository.load_config(f"{group}/{choice}")
    if loaded is None:
        return True  # composing it will show what it is, or what is wrong
    if loaded.header["package"] == "_global_" and "hydra" in loaded.config:
        return True
    for default in loaded.defaults_list or ():
        if default.is_self():
            continue
        if not default.is_override() or default.group.lstrip("/").startswith("hydra/"):
            return True
    return False


def apply_shared_config(config: DictConfig, swept_choices: Sequence[Choice]) -> None:
    """Set the launcher, and the other `SHARED` parts, to what the swept choices agree on.

    Args:
        config: The configuration of the sweep, changed in place.
        swept_choices: The result of `choices`.

    Raises:
        UserError: The choices do not agree.
    """
    from kd.core.errors import UserError

    if not swept_choices:
        return
    first = _shared_hydra_config(swept_choices[0])
    for other in swept_choices[1:]:
        for part, setting in _shared_hydra_config(other).items():
            if setting != first[part]:
                one_choice = " ".join(swept_choices[0].overrides.values())
                other_choice = " ".join(other.overrides.values())
                raise UserError(
                    f"hydra.{part}: {one_choice} and {other_choice} set it differently; sweep over "
                    "them in separate commands"
                )
    master = _shared_hydra_config(Choice({}, config.hydra))
    with open_dict(config.hydra):
        for part in SHARED:
            if first[part] != master[part]:
                config.hydra[part] = swept_choices[0].hydra[part]


def _shared_hydra_config(choice: Choice) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(
        OmegaConf.masked_copy(choice.hydra, list(SHARED)), resolve=False
    )
    plain["sweeper"].pop("params", None)
    return dict(plain)


def jobs(loader: Any, config: DictConfig, swept_choices: Sequence[Choice]) -> list[list[str]]:
    """Return the overrides of every job.

    The jobs are one grid, or one grid per choice if choices have swept keys of their own.

    Args:
        loader: Hydra's configuration loader.
        config: The configuration of the sweep.
        swept_choices: The result of `choices`.
    """
    params = dict(config.hydra.sweeper.get("params") or {})
    arguments = _raw_overrides(config, "task")
    announce_seeds(params, arguments)
    if all(choice.params == params for choice in swept_choices):
        return product(parsed(loader, without_seed(params, arguments), arguments))
    all_jobs: list[list[str]] = []
    for choice in swept_choices:
        overrides = parsed(loader, without_seed(choice.params, arguments), arguments)
        overrides |= {
            key: parsed(loader, {}, [override])[key] for key, override in choice.overrides.items()
        }
        all_jobs += product(overrides)
    return all_jobs


def without_seed(params: Mapping[str, Any] | None, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the swept keys of an experiment, without `seed` if the command line sets `seeds`."""
    typed = {key_of(override): override.partition("=")[2] for override in arguments}
    replaced = typed.get("seeds", "null") != "null"
    return {key: value for key, value in (params or {}).items() if not (replaced and key == "seed")}


def announce_seeds(params: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """Log that the seeds of an experiment are not used, if the command line replaces them."""
    if dropped := set(params) - set(without_seed(params, arguments)):
        typed = next(override for override in arguments if key_of(override) == "seeds")
        getLogger("kd").info("%s replaces the experiment's seed=%s", typed, params[dropped.pop()])


def key_of(override: str) -> str:
    """Return the key of an override, without + or ~."""
    return override.partition("=")[0].lstrip("+~")
