"""Reads W&B's environment variables, for a command that may start many W&B runs.

An explicit `tracker.*` key takes precedence over its variable.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import ValidationError

from kd.core.errors import UserError
from kd.core.settings import Settings
from kd.core.wandb_names import check_name

Mode = Literal["online", "offline", "disabled"]
T = TypeVar("T", bound=Settings)

# `shared` is for several processes that write to one run; each run of kd has a single writer
MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
CONSOLE = ("auto", "off", "wrap", "redirect", "wrap_raw", "wrap_emu")
TRUE = ("1", "true", "yes", "on")
FALSE = ("", "0", "false", "no", "off")
KEYS = {
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
    "group": "WANDB_RUN_GROUP",
    "tags": "WANDB_TAGS",
    "notes": "WANDB_NOTES",
}


class Trial(NamedTuple):
    """The W&B run that a `wandb agent` created for this command, or that WANDB_RUN_ID names."""

    run_id: str
    sweep_id: str | None
    parameters: dict[str, Any]  # those chosen by the agent, by their dotted keys


def mode() -> Mode | None:
    """Return the mode set by WANDB_DISABLED or WANDB_MODE, or None if neither is set.

    Raises:
        UserError: If WANDB_MODE is not a known mode, or WANDB_DISABLED is neither true nor false.
    """
    if flag("WANDB_DISABLED"):
        return "disabled"
    name = os.environ.get("WANDB_MODE")
    if not name:
        return None
    if name not in MODES:
        raise UserError(f"WANDB_MODE: {name!r} is not known; allowed: {', '.join(MODES)}")
    return MODES[name]


def flag(name: str) -> bool:
    """Return whether the environment variable `name` is true; unset means false.

    Raises:
        UserError: If its value is neither true nor false.
    """
    value = os.environ.get(name, "").strip().lower()
    if value not in (*TRUE, *FALSE):
        raise UserError(f"{name}: should be true or false, got {value!r}")
    return value in TRUE


def apply_environment(settings: T, explicit_mode: str) -> T:
    """Return the tracker's settings, with unset keys taken from the environment.

    Args:
        settings: The settings of the tracker.
        explicit_mode: The configuration key `tracker.mode`.

    Raises:
        UserError: If a variable that W&B reads has an invalid value.
    """
    if explicit_mode == "disabled" or (explicit_mode == "auto" and mode() == "disabled"):
        return settings
    flag("WANDB_SILENT")
    console()
    for kind, variable in (("id", "WANDB_RUN_ID"), ("job_type", "WANDB_JOB_TYPE")):
        if text := os.environ.get(variable):
            check_name(kind, text, variable)
    _check_server()
    for key, variable in KEYS.items():
        if getattr(settings, key) is not None or not (text := os.environ.get(variable)):
            continue
        value = [tag.strip() for tag in text.split(",") if tag.strip()] if key == "tags" else text
        try:
            settings = type(settings).model_validate({**settings.model_dump(), key: value})
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
            raise UserError(
                f"{variable}: {problem.removeprefix('Input ')}, got {text[:200]!r}"
            ) from error
    return settings


def _check_server() -> None:
    """Refuse an invalid WANDB_BASE_URL: W&B would ignore it and use its public server."""
    address = os.environ.get("WANDB_BASE_URL", "")
    try:
        valid = urlsplit(address).scheme in ("http", "https") and bool(urlsplit(address).hostname)
    except ValueError:
        valid = False
    if address and not valid:
        raise UserError(
            f"WANDB_BASE_URL: {address!r} is not a web address; "
            "allowed: a URL such as https://api.wandb.ai"
        )


def console() -> str:
    """Return how W&B captures the terminal: "off" unless WANDB_CONSOLE is set.

    Raises:
        UserError: If WANDB_CONSOLE is not one of `CONSOLE`.
    """
    value = os.environ.get("WANDB_CONSOLE") or "off"
    if value not in CONSOLE:
        raise UserError(f"WANDB_CONSOLE: {value!r} is not known; allowed: {', '.join(CONSOLE)}")
    return value


def agent_trial() -> Trial | None:
    """Return the W&B run that this command reports to, or None if WANDB_RUN_ID is not set."""
    run_id = os.environ.get("WANDB_RUN_ID")
    if not run_id:
        return None
    return Trial(run_id, os.environ.get("WANDB_SWEEP_ID") or None, _parameters())


def refuse_seed() -> None:
    """Refuse a W&B sweep that searches over `seed`, as it would select the luckiest one.

    Raises:
        UserError: If `seed` is a parameter of the W&B sweep.
    """
    if os.environ.get("WANDB_SWEEP_ID") and "seed" in _parameters():
        raise UserError(
            "seed: cannot be a parameter of a W&B sweep, which would select the luckiest seed; "
            "put seeds=[0,1,2] into the sweep's command instead, "
            "and each trial reports the mean over them"
        )


def refuse_choice() -> None:
    """Refuse several settings without validation images in a trial of a W&B sweep.

    The agent of the sweep waits for the value of the best setting. Call this only where there are
    several settings and no validation images.

    Raises:
        UserError: If this command is a trial of a W&B sweep.
    """
    if os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID"):
        raise UserError(
            "data.val_size: a trial of a W&B sweep reports the value of the setting that is best "
            "on validation images, and there are none; "
            "allowed: data.val_size above 0, or one setting per trial"
        )


def _parameters() -> dict[str, Any]:
    """Return the parameters in the agent's file.

    The file has the form `{name: {value: ...}}`, together with keys of W&B's own.
    """
    path = os.environ.get("WANDB_SWEEP_PARAM_PATH")
    if not path:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    nodes = content.items() if isinstance(content, Mapping) else ()
    return {
        str(name): node["value"]
        for name, node in nodes
        if isinstance(node, Mapping) and "value" in node
    }
