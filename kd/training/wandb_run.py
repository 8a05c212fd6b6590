"""Starts and finishes W&B runs. W&B cannot stop, hang or prompt here: what is not online is offline, and complete."""

import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kd.config import wandb_env
from kd.config.schema import TrackerSettings
from kd.config.wandb_env import Mode, Trial
from kd.core import console
from kd.core.errors import first_line
from kd.core.settings import flatten
from kd.training import dashboard

log = logging.getLogger(__name__)

FINISH_SECONDS = (
    4.0  # times the timeout of a start: how long the end of a run waits for its last uploads
)
FLUSH_SECONDS = 20.0  # seconds after which W&B's service has written to its file what it was told (measured: up to 16)
# kd decides these itself, for each of its runs; and W&B's service of another process ends with that process
HIDDEN = (
    "WANDB_MODE",
    "WANDB_PROJECT",
    "WANDB_ENTITY",
    "WANDB_TAGS",
    "WANDB_NAME",
    "WANDB_NOTES",
    "WANDB_RUN_GROUP",
    "WANDB_JOB_TYPE",
    "WANDB_DIR",
    "WANDB_RUN_ID",
    "WANDB_SWEEP_ID",
    "WANDB_SWEEP_PARAM_PATH",
    "WANDB_RESUME",
    "WANDB_RESUME_FROM",
    "WANDB_FORK_FROM",
    "WANDB_REINIT",
    "WANDB_RELOGIN",
    "WANDB_FORCE",
)


@dataclass(frozen=True)
class RunSettings:
    """What a W&B run is called and what it is a run of. `trial`: the run that exists for it on the server."""

    name: str
    job_type: str
    group: str | None = None
    tags: Sequence[str] = ()
    notes: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: secrets.token_hex(6))
    resume: bool = False
    trial: Trial | None = None


@contextlib.contextmanager
def started(settings: TrackerSettings, folder: Path, about: RunSettings) -> Iterator[Any]:
    """A W&B run, or None when there is to be none or none can be had. After an error in the block it is failed."""
    mode = wandb_env.mode() if settings.mode == "auto" else settings.mode
    if mode == "disabled":
        yield None
        return
    run, code = _start(settings, folder, mode, about), 1
    try:
        yield run
        code = 0
    finally:
        if run is not None:
            _finish(run, code, max(FINISH_SECONDS * settings.timeout, FLUSH_SECONDS))


def _start(settings: TrackerSettings, folder: Path, mode: Mode | None, about: RunSettings) -> Any:
    """wandb.init that cannot prompt, hang or fail: online falls back to offline, offline to nothing."""
    root = _root(folder)
    if about.trial and about.trial.sweep_id:  # its runs are in its project, wherever others are
        own = {"project": os.environ.get("WANDB_PROJECT"), "entity": os.environ.get("WANDB_ENTITY")}
        settings = settings.model_copy(update=own)
    _make_home_usable(root / "wandb" / "local")
    with _environment():
        if mode != "offline":
            mode = _with_key(mode)
        if mode == "disabled":
            return None
        if (
            mode == "online"
            and about.resume
            and any(run.offline for run in _session()._active_runs)
        ):
            log.warning(
                "W&B (online): another run of this process found no server; this one is kept offline, too"
            )
            mode = "offline"  # an id that is tried in vain could not be kept
        if mode == "online":
            before = segments(root / "wandb", about.id)
            try:
                run = _init(settings, root, "online", about)
                with contextlib.suppress(Exception):
                    run._public_api()  # the first table asks for it, and would be lost if the server is gone by then
                return run
            except Exception as error:
                log.warning("W&B (online): %s; it is kept offline", first_line(error))
            for path in segments(root / "wandb", about.id):
                if path not in before:  # it holds a name and no more
                    shutil.rmtree(path, ignore_errors=True)
            about = _without_active_run(about)
        try:
            return _init(settings, root, "offline", about)
        except Exception as error:
            log.warning("W&B (offline): %s; this run is not mirrored", first_line(error))
            return None


def _init(settings: TrackerSettings, root: Path, mode: Mode, about: RunSettings) -> Any:
    import wandb

    options: dict[str, Any] = {
        "init_timeout": settings.timeout,
        "finish_timeout": 0.75 * FINISH_SECONDS * settings.timeout,
        "finish_timeout_raises": True,
        "reinit": "create_new",  # the default returns the run that a crashed job left open
        "console": wandb_env.console(),
        "silent": True,
        **dashboard.settings(),
    }
    if about.trial and about.trial.sweep_id:
        options["sweep_id"] = about.trial.sweep_id
    return wandb.init(
        mode=mode,
        dir=str(root),
        id=about.id,
        # a sync of an offline segment that says `resume` appends it to what the server has of earlier ones
        resume="allow" if mode == "online" and about.resume else None,
        project=settings.project or _session().settings.project or "kd",
        entity=settings.entity,
        name=about.name,
        job_type=about.job_type,
        group=about.group,
        tags=list(about.tags),
        notes=about.notes,
        config=_config(about),
        settings=wandb.Settings(**options),
    )


def _config(about: RunSettings) -> dict[str, Any]:
    """The configuration of a run, and what a sweep's agent has chosen, under the sweep's own names: where the choice of
    a group (`method: logits`) has the name of a mapping, that mapping is there by its dotted keys (`method.T`)."""
    chosen = about.trial.parameters if about.trial else {}
    config: dict[str, Any] = {}
    for name, value in about.config.items():
        displaced = name in chosen and isinstance(value, Mapping)
        config.update(flatten(value, f"{name}.") if displaced else {name: value})
    return {**config, **chosen}


def segments(directory: Path, run_id: str) -> list[Path]:
    """The folders of W&B's files in `directory` that are of the run `run_id`: one for each time that it was started."""
    form = re.compile(
        rf"(offline-)?run-\d{{8}}_\d{{6}}-{re.escape(run_id)}(-\d+)?"
    )  # two of one second: -1
    try:
        folders = [path for path in directory.iterdir() if form.fullmatch(path.name)]
    except OSError:
        return []
    return [
        path
        for path in folders
        if (path / f"run-{run_id}.wandb").exists() or not any(path.glob("run-*.wandb"))
    ]


def _session() -> Any:
    """W&B's state of this process, which prints nothing. Its settings come from files and from the environment."""
    import wandb

    return wandb.setup(wandb.Settings(silent=True))


def _with_key(mode: Mode | None) -> Mode:
    """`mode`, by default online; but offline where W&B finds no key, since it would prompt for one."""
    try:
        from wandb.sdk.lib import wbauth

        known = _session().settings
        if mode is None and known.mode != "online":  # `wandb offline` writes it to a file
            return wandb_env.MODES.get(known.mode, "offline")
        if (
            known.api_key
            or known.identity_token_file
            or wbauth.read_netrc_auth(host=known.base_url)
        ):
            return "online"
    except Exception as error:  # such as for a home that cannot be read
        log.warning("W&B: cannot look for a key (%s); it is kept offline", first_line(error))
        return "offline"
    if mode == "online":
        log.warning(
            "W&B: there is no key for %s (`wandb login` stores one); it is kept offline",
            known.base_url,
        )
    return "offline"


def _without_active_run(about: RunSettings) -> RunSettings:
    """The same run after a start that failed: W&B's service would refuse its id for as long as it lives."""
    import wandb

    if _session()._active_runs:  # which a new service would end
        return replace(about, id=secrets.token_hex(6))
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()
    return about


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Inside, W&B does not see the variables that kd decides about, nor those that it would fail on."""
    os.environ.pop("WANDB_SERVICE", None)  # the service of an agent's process, say, ends with that
    hidden = {name: os.environ.pop(name) for name in HIDDEN if name in os.environ}
    try:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            if problem := _problem(name):
                log.warning("W&B: %s is ignored (%s)", name, problem)
                hidden[name] = os.environ.pop(name)
        yield
    finally:
        os.environ.update(hidden)


def _problem(name: str) -> str:
    """What W&B has against the value of a variable, or an empty text."""
    import wandb

    try:
        wandb.Settings().update_from_env_vars({name: os.environ[name]})
    except ValidationError as error:
        return str(error.errors(include_url=False)[0]["msg"])
    except Exception as error:
        return first_line(error)
    return ""


def _root(folder: Path) -> Path:
    """Where W&B keeps its files: WANDB_DIR if that can be used, else the run's own directory."""
    given = os.environ.get("WANDB_DIR")
    if given and not _usable(Path(given)):
        log.warning(
            "W&B: cannot write to WANDB_DIR=%s; its files go to %s",
            given,
            console.display_path(folder),
        )
    return Path(given).absolute() if given and _usable(Path(given)) else folder


def _make_home_usable(instead: Path) -> None:
    """Where W&B cannot use its directories in the home, it gets others, for as long as this process lives."""
    from wandb import env

    for name, default in (("CACHE", env.get_cache_dir), ("DATA", env.get_data_dir)):
        try:
            path = Path(str(default()))
        except (
            RuntimeError
        ):  # there is no home, and W&B computes its default even where a variable replaces it
            path = instead / name.lower()
            os.environ[f"XDG_{name}_HOME"] = str(path)
        if not path.is_absolute() or not _usable(path):
            path = instead / name.lower()
        if "HOME" not in os.environ or path.is_relative_to(
            instead
        ):  # without HOME W&B's service finds no default
            os.environ[f"WANDB_{name}_DIR"] = str(path)
    try:
        Path("~").expanduser()
    except RuntimeError:
        os.environ.setdefault("WANDB_CONFIG_DIR", str(instead / "config"))


def _usable(path: Path) -> bool:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(path, os.R_OK | os.W_OK | os.X_OK)


def _finish(run: Any, code: int, seconds: float) -> None:
    """Finish a run, and say where to find it: on the server, or in files that can be uploaded."""
    uploaded = _finish_within(run, code, None if run.offline else seconds)
    with contextlib.suppress(Exception):
        place = console.display_path(Path(run.dir).parent)
        if run.offline:
            level, line = (
                logging.INFO,
                f"offline; to see it: wandb leet {place}; to upload it: wandb sync {place}",
            )
        elif uploaded and not _upload_errors(place / "logs" / "debug-internal.log"):
            level, line = logging.INFO, str(run.url)
        else:
            level = logging.WARNING
            line = f"the server did not take all of it; to upload it: wandb sync --include-online {place}"
        if level > logging.INFO or not wandb_env.flag("WANDB_SILENT"):
            log.log(level, "W&B      %s", line)


def _finish_within(run: Any, code: int, seconds: float | None) -> bool:
    """Whether a run finishes in time. An artifact that cannot be uploaded blocks W&B's own limit."""
    errors: list[BaseException] = []

    def finish() -> None:
        try:
            run.finish(exit_code=code)
        except (Exception, SystemExit) as error:
            errors.append(error)

    if seconds is None:
        finish()
        return not errors
    thread = threading.Thread(target=finish, daemon=True)
    thread.start()
    thread.join(seconds)
    if not thread.is_alive():
        return not errors
    _kill_service(run)
    return False


def _kill_service(run: Any) -> None:
    """End W&B's service of this process, which would block the end of the process as well. It has written its files."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):
        session = _session()
        if not [other for other in session._active_runs if other is not run]:
            session._connection._proc._process.kill()
            wandb.teardown()


_PARTS = (
    "filestream:",
    "runupserter:",
    "runfiles:",
    "fileTransfer:",
)  # of W&B's service, which upload


def _upload_errors(path: Path) -> bool:
    """Whether W&B's service gave something up, which `finish` passes over in silence."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        records = [json.loads(line) for line in lines if '"ERROR' in line]
    except (OSError, ValueError):
        return False
    return any(str(record.get("msg", "")).startswith(_PARTS) for record in records)
