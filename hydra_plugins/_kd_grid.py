"""The jobs of a grid, as overrides. A swept group may bring a grid of its own: +experiment=temperature,compare."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

# what a sweep has once; an experiment's other settings for Hydra are composed for each job
SHARED = ("launcher", "sweeper", "sweep", "callbacks", "hydra_logging", "verbose")


@dataclass(frozen=True)
class Choice:
    """One combination of the swept groups that have settings for Hydra."""

    overrides: dict[str, str]  # {key: override}, as {"experiment": "+experiment=compare"}
    hydra: DictConfig  # Hydra's node, composed with it

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.hydra.sweeper.get("params") or {})


def parsed(loader: Any, params: Mapping[str, Any], arguments: Iterable[str]) -> dict[str, Override]:
    """Overrides by key: those of `hydra.sweeper.params`, then what is typed. The last one of a key holds, with + or
    without. **Raises:** UserError naming the key."""
    from kd.config.overrides import parse

    overrides: dict[str, Override] = {}
    for word in [*(f"{key}={value}" for key, value in params.items()), *arguments]:
        override = parse(word, config_loader=loader)
        overrides[override.get_key_element().lstrip("+")] = override
    return overrides


def values(override: Override) -> list[str]:
    """Every `key=value` that an override stands for. **Raises:** UserError where there is none."""
    from kd.core.errors import UserError, first_line

    key = override.get_key_element()
    if override.is_delete() and override.value_type is None:
        return [key]
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    name = override.key_or_group
    if not override.is_discrete_sweep():
        raise UserError(
            f"{name}: interval(a,b) is for hydra/sweeper=optuna; a grid takes values, as {name}=1,2,4"
        )
    try:
        found = [f"{key}={value}" for value in override.sweep_string_iterator()]
    except Exception as error:  # a step of 0, a glob over what is no group
        raise UserError(f"{name}: {first_line(error)}") from error
    if not found:
        raise UserError(
            f"{name}: {str(override.input_line).partition('=')[2]} stands for no value, so for no job"
        )
    return found


def product(overrides: Mapping[str, Override]) -> list[list[str]]:
    """Every combination, the last key changing first."""
    return [list(words) for words in itertools.product(*map(values, overrides.values()))]


def choices(loader: Any, config: DictConfig) -> list[Choice]:
    """Every combination of the swept groups that have settings for Hydra, which composes a sweep without them."""
    task, typed = _raw_overrides(config, "task"), _raw_overrides(config, "hydra")
    name = config.hydra.job.config_name
    overrides = parsed(loader, config.hydra.sweeper.get("params") or {}, task)
    repository = loader._parse_overrides_and_create_caching_repo(name, typed)[1]
    swept = {}
    for key, override in overrides.items():
        group = override.key_or_group
        if override.is_discrete_sweep() and repository.group_exists(group):
            words = values(override)
            if any(_sets_hydra(repository, group, word) for word in words):
                swept[key] = words
    groups = [o for o in overrides.values() if repository.group_exists(o.key_or_group)]
    fixed = [
        word for override in groups if not override.is_sweep_override() for word in values(override)
    ]
    found = []
    for combination in itertools.product(*swept.values()) if swept else ():
        words = [*typed, *fixed, *combination]
        composed = loader.load_configuration(
            config_name=name, overrides=words, run_mode=RunMode.MULTIRUN
        )
        found.append(Choice(dict(zip(swept, combination, strict=True)), composed.hydra))
    return found


def _raw_overrides(config: DictConfig, kind: str) -> list[str]:
    """The overrides as typed: ${hydra:job.num} is for a job to resolve."""
    return list(OmegaConf.to_container(config.hydra.overrides[kind], resolve=False))  # type: ignore[arg-type]


def _sets_hydra(repository: Any, group: str, word: str) -> bool:
    """May this choice change Hydra's own settings? It is read, but not composed: that takes much longer."""
    choice = word.partition("=")[2]
    if choice.startswith("{"):
        return False  # keys and values, merged into the node of the group
    loaded = repository.load_config(f"{group}/{choice}")
    if loaded is None:
        return True  # composing it shows what it is, or what is wrong
    if loaded.header["package"] == "_global_" and "hydra" in loaded.config:
        return True
    for default in loaded.defaults_list or ():
        if default.is_self():
            continue
        if not default.is_override() or default.group.lstrip("/").startswith("hydra/"):
            return True
    return False


def apply_shared_config(config: DictConfig, found: Sequence[Choice]) -> None:
    """Give the sweep the launcher, and all else it has only once, on which the choices agree.

    **Raises:** UserError where they do not.
    """
    from kd.core.errors import UserError

    if not found:
        return
    first = _shared_hydra_config(found[0])
    for other in found[1:]:
        for part, setting in _shared_hydra_config(other).items():
            if setting != first[part]:
                pair = f"{' '.join(found[0].overrides.values())} and {' '.join(other.overrides.values())}"
                raise UserError(
                    f"hydra.{part}: {pair} differ in it; sweep over them in commands of their own"
                )
    master = _shared_hydra_config(Choice({}, config.hydra))
    with open_dict(config.hydra):
        for part in SHARED:
            if first[part] != master[part]:
                config.hydra[part] = found[0].hydra[part]


def _shared_hydra_config(choice: Choice) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(
        OmegaConf.masked_copy(choice.hydra, list(SHARED)), resolve=False
    )
    plain["sweeper"].pop("params", None)
    return dict(plain)


def jobs(loader: Any, config: DictConfig, found: Sequence[Choice]) -> list[list[str]]:
    """The overrides of every job: one grid, or one for each choice that has swept keys of its own."""
    params = dict(config.hydra.sweeper.get("params") or {})
    arguments = _raw_overrides(config, "task")
    announce_seeds(params, arguments)
    if all(choice.params == params for choice in found):
        return product(parsed(loader, without_seed(params, arguments), arguments))
    every: list[list[str]] = []
    for choice in found:
        overrides = parsed(loader, without_seed(choice.params, arguments), arguments)
        overrides |= {
            key: parsed(loader, {}, [word])[key] for key, word in choice.overrides.items()
        }
        every += product(overrides)
    return every


def without_seed(params: Mapping[str, Any] | None, arguments: Sequence[str]) -> dict[str, Any]:
    """The swept keys of an experiment, without its seeds where others are typed as `seeds`."""
    typed = {key_of(word): word.partition("=")[2] for word in arguments}
    replaced = typed.get("seeds", "null") != "null"
    return {key: value for key, value in (params or {}).items() if not (replaced and key == "seed")}


def announce_seeds(params: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """Log that the seeds of an experiment are not used, where others are typed."""
    if dropped := set(params) - set(without_seed(params, arguments)):
        typed = next(word for word in arguments if key_of(word) == "seeds")
        getLogger("kd").info("%s replaces the experiment's seed=%s", typed, params[dropped.pop()])


def key_of(word: str) -> str:
    """The key of an override, without + or ~."""
    return word.partition("=")[0].lstrip("+~")
