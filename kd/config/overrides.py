"""What is typed, split into flags and overrides before Hydra reads it, and the checks that need the composed rest."""

import argparse
import re
import shlex
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from kd.core.errors import UserError, first_line


class RefusedError(BaseException):
    """Carries an error (its cause) past Hydra, which would print or swallow it."""


class Arguments(NamedTuple):
    """A command line: Hydra's flags, the overrides in the order typed, and the user's configuration directories."""

    flags: list[str]
    overrides: list[str]
    directories: list[str]


def split_arguments(words: Sequence[str]) -> Arguments:
    """Flags and overrides may come in any order. **Raises:** UserError."""
    parser = get_args_parser()
    parser.error = _raise_flag_error  # type: ignore[method-assign]
    parsed = parser.parse_intermixed_args(words)
    if parsed.experimental_rerun is not None:
        raise UserError(
            "--experimental-rerun: it reads a pickle, which could run code; give the overrides again"
        )
    if sum(bool(re.match(r"(--config-d\w*|-cd)", word)) for word in words) > 1:
        raise UserError(
            "--config-dir: given twice; for several directories: hydra.searchpath=[DIR,DIR]"
        )
    flags, rest = [], list(parsed.overrides)
    for word in words:
        if rest and word == rest[0]:
            rest.pop(0)
        else:
            flags.append(word)
    overrides = list(parsed.overrides)
    if parsed.shell_completion:
        return Arguments(flags, overrides, [])
    if (
        parsed.config_name is None and parsed.config_path is None
    ):  # kd's own, in which `experiment` is no default
        overrides = [re.sub(r"^experiment(?=[=@])", "+experiment", word) for word in overrides]
    typed = [parse(word) for word in overrides]
    _refuse_repeated(typed)
    return Arguments(flags, overrides, _directories(parsed, typed))


def _raise_flag_error(message: str) -> NoReturn:
    raise UserError(f"{message}; --hydra-help lists the flags")


def _refuse_repeated(typed: Sequence[Override]) -> None:
    """A sweep would use only the last of two `+group=...`; a single run refuses them."""
    added = Counter(one.get_key_element() for one in typed if one.is_add())
    for key, times in added.items():
        if times > 1:
            name = key.removeprefix("+")
            raise UserError(
                f"{name}: given {times} times; {key}=a,b sweeps over both, {key}=[a,b] combines groups"
            )


def _directories(parsed: argparse.Namespace, typed: Sequence[Override]) -> list[str]:
    """`--config-dir` and the directories of `hydra.searchpath`. **Raises:** UserError where there is none."""
    named = [] if parsed.config_dir is None else [("--config-dir", parsed.config_dir)]
    for override in typed:
        value = override.value()
        if override.key_or_group == "hydra.searchpath" and isinstance(value, list):
            named += [("hydra.searchpath", str(entry)) for entry in value]
    found = []
    for key, entry in named:
        if "://" in entry and not entry.startswith("file://"):
            continue
        path = Path(entry.removeprefix("file://")).absolute()
        if not path.is_dir():
            raise UserError(f"{key}: there is no directory {path}")
        found.append(str(path))
    return found


def parse(word: str, **context: Any) -> Override:
    """One override. **Raises:** UserError naming the key and how to write it."""
    key, equals, value = word.partition("=")
    name = key.strip().lstrip("+~")
    if not name:
        raise UserError(f"{word!r}: the key is missing; give key=value")
    if not equals and not word.startswith("~"):
        raise UserError(f"{name}: the value is missing; give {key}=...")
    try:
        return OverridesParser.create(**context).parse_overrides([word])[0]
    except HydraException as error:
        raise UserError(f"{name}: {_remedy(key, value, str(error))}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: {first_line(error)}") from error


def _remedy(key: str, value: str, reason: str) -> str:
    if evaluating := re.search(r"while evaluating (.*)", reason):
        return evaluating[1]
    if re.search(r"\s", key):
        return f"no space is allowed in a key; give {''.join(key.split())}={value.strip()}"
    text = value.strip("'\"")
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", r"\'")
    quoted = f"{key}='{escaped}'"
    shell = f'"{quoted}"' if not re.search(r'["$`\\!]', quoted) else shlex.quote(quoted)
    remedy = f"the value must be quoted, for Hydra and for the shell: {shell}"
    if value.startswith(("[", "{")):  # perhaps a list or a mapping
        return f"{reason.splitlines()[0]}; if a bracket is open, close it; if it is text, {remedy}"
    return remedy


def describe_defaults_cycle(error: RecursionError) -> str:
    """Which configurations include themselves, where Hydra recursed into their defaults lists for ever."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    paths = [
        frame.f_locals.get("path")
        for frame in frames
        if frame.f_code.co_name == "_create_defaults_tree_impl"
    ]
    circle = list(dict.fromkeys(str(path) for path in paths[-20:] if path))
    return (
        f"{circle[0]}: its defaults list leads back to itself (by {', '.join(circle)})"
        if circle
        else ""
    )


class Checks(Callback):
    """Refuse what Hydra would ignore in silence. Hydra calls it with the composed configuration, before any work."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        _checked(_refuse_multirun_settings, config)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        _checked(_select_sweeper, config)


def _checked(check: Any, config: DictConfig) -> None:
    try:
        check(config)
    except UserError as error:
        raise RefusedError from error  # Hydra turns an Exception of a callback into a warning


def _refuse_multirun_settings(config: DictConfig) -> None:
    """A single run has neither launcher nor sweeper: whoever chose one expected a multirun."""
    typed: Any = OmegaConf.to_container(config.hydra.overrides.hydra, resolve=False)
    for word in typed:
        key = parse(word).key_or_group
        if re.match(r"hydra[./](launcher|sweeper)", key):
            raise UserError(f"{key}: only a multirun uses it; add -m")
    if config.hydra.job.config_name != "config" or any(
        word.startswith("hydra.mode=") for word in sys.argv
    ):
        return  # a primary configuration of the user's may choose for later multiruns; hydra.mode=RUN is deliberate
    for part, standard in _standard().items():
        chosen: Any = OmegaConf.to_container(config.hydra[part], resolve=False)
        differ = [
            key for key, value in chosen.items() if key not in standard or standard[key] != value
        ]
        if differ:
            path = f"hydra/{part}" if "_target_" in differ else f"hydra.{part}.{differ[0]}"
            raise UserError(
                f"{path}: an experiment chooses it, but only a multirun uses it; add -m"
            )


def _standard() -> dict[str, Any]:
    from hydra_plugins._kd_launcher import LocalConf
    from hydra_plugins._kd_sweeper import GridConf

    return {
        "launcher": OmegaConf.to_container(OmegaConf.structured(LocalConf)),
        "sweeper": OmegaConf.to_container(OmegaConf.structured(GridConf)),
    }


def _select_sweeper(config: DictConfig) -> None:
    """Hydra's own sweeper is kd's grid without plan and report. Others would get no number from kd to go by."""
    target = str(config.hydra.sweeper.get("_target_"))
    if target == "hydra._internal.core_plugins.basic_sweeper.BasicSweeper":
        config.hydra.sweeper._target_ = _standard()["sweeper"]["_target_"]
    elif not target.startswith("hydra_plugins._kd_"):
        choice = config.hydra.runtime.choices.get("hydra/sweeper")
        raise UserError(
            f"hydra/sweeper: {choice!r} can neither plan nor report trainings; allowed: grid, optuna"
        )
