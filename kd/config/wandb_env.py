"""W&B's environment variables, read for a command that may start many W&B runs. An explicit `tracker.*` key wins."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import ValidationError

from kd.config.wandb_names import name_type
from kd.core.errors import UserError
from kd.core.settings import Settings

Mode = Literal["online", "offline", "disabled"]
T = TypeVar("T", bound=Settings)

# `shared` is for several processes that write to one run; each run of kd has one writer
MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
CONSOLE = ("auto", "off", "wrap", "redirect", "wrap_raw", "wrap_emu")
TRUE, FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")
KEYS = {
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
    "group": "WANDB_RUN_GROUP",
    "tags": "WANDB_TAGS",
    "notes": "WANDB_NOTES",
}


class Trial(NamedTuple):
    """The W&B run that a `wandb agent` has created for this command, or that WANDB_RUN_ID names without an agent."""

    run_id: str
    sweep_id: str | None
    parameters: dict[str, Any]  # those that the agent chose, by their dotted keys


def mode() -> Mode | None:
    """The mode that WANDB_DISABLED or WANDB_MODE asks for, if any. **Raises:** UserError for an unknown word."""
    if flag("WANDB_DISABLED"):
        return "disabled"
    word = os.environ.get("WANDB_MODE")
    if not word:
        return None
    if word not in MODES:
        raise UserError(f"WANDB_MODE: {word!r} is not known; allowed: {', '.join(MODES)}")
    return MODES[word]


def flag(name: str) -> bool:
    """A variable that is true or false. **Raises:** UserError."""
    word = os.environ.get(name, "").strip().lower()
    if word not in (*TRUE, *FALSE):
        raise UserError(f"{name}: {word!r} is neither true nor false")
    return word in TRUE


def apply_environment(settings: T, explicit_mode: str) -> T:
    """`settings` (of the tracker) whose open keys are taken from the environment. **Raises:** UserError."""
    if explicit_mode == "disabled" or (explicit_mode == "auto" and mode() == "disabled"):
        return settings
    flag("WANDB_SILENT")
    console()
    for kind, variable in (("id", "WANDB_RUN_ID"), ("job_type", "WANDB_JOB_TYPE")):
        if text := os.environ.get(variable):
            name_type(kind, text, variable)
    _check_server()
    for key, variable in KEYS.items():
        if getattr(settings, key) is not None or not (text := os.environ.get(variable)):
            continue
        value = [tag.strip() for tag in text.split(",") if tag.strip()] if key == "tags" else text
        try:
            settings = type(settings).model_validate({**settings.model_dump(), key: value})
        except ValidationError as error:
            what = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
            raise UserError(
                f"{variable}: {what.removeprefix('Input ')}, got {text[:200]!r}"
            ) from error
    return settings


def _check_server() -> None:
    """An address that W&B ignores would send the runs to its public server."""
    address = os.environ.get("WANDB_BASE_URL", "")
    try:
        known = urlsplit(address).scheme in ("http", "https") and bool(urlsplit(address).hostname)
    except ValueError:
        known = False
    if address and not known:
        raise UserError(
            f"WANDB_BASE_URL: {address!r} is no address; allowed: such as https://api.wandb.ai"
        )


def console() -> str:
    """How W&B captures the terminal: not at all unless WANDB_CONSOLE asks for it. **Raises:** UserError."""
    word = os.environ.get("WANDB_CONSOLE") or "off"
    if word not in CONSOLE:
        raise UserError(f"WANDB_CONSOLE: {word!r} is not known; allowed: {', '.join(CONSOLE)}")
    return word


def agent_trial() -> Trial | None:
    """The run that this command is to report to, if it is given one."""
    run_id = os.environ.get("WANDB_RUN_ID")
    if not run_id:
        return None
    return Trial(run_id, os.environ.get("WANDB_SWEEP_ID") or None, _parameters())


def refuse_seed() -> None:
    """**Raises:** UserError where a W&B sweep searches over `seed`, which would choose the luckiest one."""
    if os.environ.get("WANDB_SWEEP_ID") and "seed" in _parameters():
        raise UserError(
            "seed: it is a parameter of the W&B sweep, which would choose the luckiest one; "
            "put seeds=[0,1,2] into the sweep's command instead, and a trial's value is the mean over them"
        )


def refuse_choice() -> None:
    """For several settings without validation images. **Raises:** UserError where the agent of a W&B sweep waits for
    the value of the best of them."""
    if os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID"):
        raise UserError(
            "data.val_size: a trial of a W&B sweep has the value of the setting that validation chooses, and there are "
            "no validation images; allowed: data.val_size above 0, or one setting in a trial"
        )


def _parameters() -> dict[str, Any]:
    """What the agent's file says: `{name: {value: ...}}`, beside keys of W&B's own."""
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
