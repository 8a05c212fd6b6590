"""Parses the command line before Hydra does, and checks the composed configuration.

The command line is split into Hydra's flags and overrides, and each override is parsed here, so
that every mistake is reported in one line. `Checks` refuses what only the composed configuration
shows.
"""

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
    """A command line: Hydra's flags, overrides as typed, and the user's config directories."""

    flags: list[str]
    overrides: list[str]
    directories: list[str]


def split_arguments(args: Sequence[str]) -> Arguments:
    """Split a command line into Hydra's flags and its overrides, which may come in any order.

    Args:
        args: The command line without the name of the program.

    Returns:
        The flags, the overrides, and the absolute paths of the user's configuration directories.

    Raises:
        UserError: If a flag or an override is invalid, or a directory does not exist.
    """
    parser = get_args_parser()
    parser.error = _raise_flag_error  # type: ignore[method-assign]
    parsed = parser.parse_intermixed_args(args)
    if parsed.experimental_rerun is not None:
        raise UserError(
            "--experimental-rerun: reads a pickle, which could run code; "
            "repeat the overrides instead"
        )
    if sum(bool(re.match(r"(--config-d\w*|-cd)", arg)) for arg in args) > 1:
        raise UserError(
            "--config-dir: given more than once; "
            "to use several directories, set hydra.searchpath=[DIR,DIR]"
        )
    overrides = list(parsed.overrides)
    flags = _without(args, overrides)
    if parsed.shell_completion:
        return Arguments(flags, overrides, [])
    if parsed.config_name is None and parsed.config_path is None:
        # kd's own primary configuration has no `experiment` in its defaults list
        overrides = [re.sub(r"^experiment(?=[=@])", "+experiment", text) for text in overrides]
    parsed_overrides = [parse(text) for text in overrides]
    _refuse_repeated(parsed_overrides)
    return Arguments(flags, overrides, _directories(parsed, parsed_overrides))


def _without(args: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Return `args` without `overrides`, which are some of them, in the same order."""
    flags: list[str] = []
    remaining = list(overrides)
    for arg in args:
        if remaining and arg == remaining[0]:
            remaining.pop(0)
        else:
            flags.append(arg)
    return flags


def _raise_flag_error(message: str) -> NoReturn:
    raise UserError(f"{message}; --hydra-help lists the flags")


def _refuse_repeated(overrides: Sequence[Override]) -> None:
    """Refuse two `+group=...`: a sweep would use only the last, and a single run refuses them."""
    counts = Counter(override.get_key_element() for override in overrides if override.is_add())
    for key, times in counts.items():
        if times > 1:
            name = key.removeprefix("+")
            raise UserError(
                f"{name}: given {times} times; "
                f"use {key}=a,b to sweep over both, or {key}=[a,b] to combine groups"
            )


def _directories(parsed: argparse.Namespace, overrides: Sequence[Override]) -> list[str]:
    """Return the absolute paths from `--config-dir` and `hydra.searchpath`."""
    entries = [] if parsed.config_dir is None else [("--config-dir", parsed.config_dir)]
    for override in overrides:
        value = override.value()
        if override.key_or_group == "hydra.searchpath" and isinstance(value, list):
            entries += [("hydra.searchpath", str(entry)) for entry in value]
    directories = []
    for key, entry in entries:
        if "://" in entry and not entry.startswith("file://"):
            continue
        path = Path(entry.removeprefix("file://")).absolute()
        if not path.is_dir():
            raise UserError(f"{key}: there is no directory {path}")
        directories.append(str(path))
    return directories


def parse(text: str, **context: Any) -> Override:
    """Parse one override.

    Args:
        text: The override as typed, such as `method.T=4`.
        **context: Arguments for Hydra's `OverridesParser.create`.

    Returns:
        Hydra's parsed form of the override.

    Raises:
        UserError: If it cannot be parsed; the message names the key and how to write it.
    """
    key, equals, value = text.partition("=")
    name = key.strip().lstrip("+~")
    if not name:
        raise UserError(f"{text!r}: the key is missing; write key=value")
    if not equals and not text.startswith("~"):
        raise UserError(f"{name}: the value is missing; write {key}=...")
    try:
        return OverridesParser.create(**context).parse_overrides([text])[0]
    except HydraException as error:
        raise UserError(f"{name}: {_remedy(key, value, str(error))}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: {first_line(error)}") from error


def _remedy(key: str, value: str, reason: str) -> str:
    """Return what is wrong with `key=value` and how to write it."""
    if evaluating := re.search(r"while evaluating (.*)", reason):
        return evaluating[1]
    if re.search(r"\s", key):
        return f"a key cannot contain spaces; write {''.join(key.split())}={value.strip()}"
    unquoted = value.strip("'\"")
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", unquoted).replace("'", r"\'")
    quoted = f"{key}='{escaped}'"
    shell = f'"{quoted}"' if not re.search(r'["$`\\!]', quoted) else shlex.quote(quoted)
    remedy = f"quote the value for Hydra and for the shell: {shell}"
    if value.startswith(("[", "{")):  # perhaps a list or a mapping
        problem = reason.splitlines()[0]
        return f"{problem}; close any open bracket, or if the value is text, {remedy}"
    return remedy


def describe_defaults_cycle(error: RecursionError) -> str:
    """Return which configurations include each other, if a cycle of defaults lists caused `error`.

    Returns:
        One line, or an empty string if the recursion has another cause.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    paths = [
        frame.f_locals.get("path")
        for frame in frames
        if frame.f_code.co_name == "_create_defaults_tree_impl"
    ]
    cycle = list(dict.fromkeys(str(path) for path in paths[-20:] if path))
    if not cycle:
        return ""
    return f"{cycle[0]}: its defaults list leads back to itself (via {', '.join(cycle)})"


class Checks(Callback):
    """A Hydra callback that refuses settings which Hydra would silently ignore.

    Hydra calls it with the composed configuration, before any work is done.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Check the configuration of a single run."""
        _run_check(_refuse_multirun_settings, config)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Check the configuration of a multirun, and select kd's sweeper."""
        _run_check(_select_sweeper, config)


def _run_check(check: Any, config: DictConfig) -> None:
    try:
        check(config)
    except UserError as error:
        # Hydra turns an Exception raised in a callback into a warning
        raise RefusedError from error


def _refuse_multirun_settings(config: DictConfig) -> None:
    """Refuse a launcher or sweeper in a single run, which has neither: a multirun was intended."""
    hydra_overrides: Any = OmegaConf.to_container(config.hydra.overrides.hydra, resolve=False)
    for text in hydra_overrides:
        key = parse(text).key_or_group
        if re.match(r"hydra[./](launcher|sweeper)", key):
            raise UserError(f"{key}: only used in a multirun; add -m")
    # A user's primary configuration may choose them for later multiruns, and hydra.mode=RUN is a
    # deliberate choice
    if config.hydra.job.config_name != "config":
        return
    if any(arg.startswith("hydra.mode=") for arg in sys.argv):
        return
    for node, defaults in _default_settings().items():
        settings: Any = OmegaConf.to_container(config.hydra[node], resolve=False)
        changed = [
            key for key, value in settings.items() if key not in defaults or defaults[key] != value
        ]
        if changed:
            path = f"hydra/{node}" if "_target_" in changed else f"hydra.{node}.{changed[0]}"
            raise UserError(f"{path}: set by an experiment, but only used in a multirun; add -m")


def _default_settings() -> dict[str, Any]:
    """Return the settings of kd's default launcher and sweeper."""
    from hydra_plugins._kd_launcher import LocalConf
    from hydra_plugins._kd_sweeper import GridConf

    return {
        "launcher": OmegaConf.to_container(OmegaConf.structured(LocalConf)),
        "sweeper": OmegaConf.to_container(OmegaConf.structured(GridConf)),
    }


def _select_sweeper(config: DictConfig) -> None:
    """Replace Hydra's basic sweeper, which has no plan and no report, by kd's grid; refuse others.

    Other sweepers would get no objective value from kd.
    """
    target = str(config.hydra.sweeper.get("_target_"))
    if target == "hydra._internal.core_plugins.basic_sweeper.BasicSweeper":
        config.hydra.sweeper._target_ = _default_settings()["sweeper"]["_target_"]
    elif not target.startswith("hydra_plugins._kd_"):
        choice = config.hydra.runtime.choices.get("hydra/sweeper")
        raise UserError(
            f"hydra/sweeper: {choice!r} cannot plan and report training runs; allowed: grid, optuna"
        )
