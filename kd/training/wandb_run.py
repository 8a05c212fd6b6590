"""Starting and finishing W&B runs.

W&B cannot stop, hang or prompt here. A run that cannot be logged online is logged offline, and is
complete there.
"""

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
from kd.config.wandb_env import Mode, Trial
from kd.core import console
from kd.core.errors import first_line
from kd.core.execution import TrackerSettings
from kd.core.settings import flatten
from kd.training import dashboard

log = logging.getLogger(__name__)

# how long the end of a run waits for its last uploads, as a multiple of the timeout of a start
FINISH_FACTOR = 4.0
# seconds after which W&B's service has written all it received to its file (measured: up to 16)
FLUSH_SECONDS = 20.0
# kd sets these itself for each of its runs; also, W&B's service of another process ends with it
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
    """The name, type and other properties of a W&B run."""

    name: str
    job_type: str
    group: str | None = None
    tags: Sequence[str] = ()
    notes: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: secrets.token_hex(6))
    resume: bool = False
    trial: Trial | None = None  # the run that exists for it on the server


@contextlib.contextmanager
def started(settings: TrackerSettings, folder: Path, run_settings: RunSettings) -> Iterator[Any]:
    """Start a W&B run, and finish it at the end of the block: as failed after an error.

    Args:
        settings: The configuration keys `tracker.*`.
        folder: Directory for W&B's files.
        run_settings: Properties of the W&B run.

    Yields:
        The W&B run, or None if W&B is disabled or no run could be started.
    """
    mode = wandb_env.mode() if settings.mode == "auto" else settings.mode
    if mode == "disabled":
        yield None
        return
    run = _start(settings, folder, mode, run_settings)
    exit_code = 1
    try:
        yield run
        exit_code = 0
    finally:
        if run is not None:
            _finish(run, exit_code, max(FINISH_FACTOR * settings.timeout, FLUSH_SECONDS))


def _start(
    settings: TrackerSettings, folder: Path, mode: Mode | None, run_settings: RunSettings
) -> Any:
    """Call wandb.init so that it cannot prompt, hang or fail.

    If starting online fails, the run is started offline; if that fails too, return None.
    """
    root = _root(folder)
    if run_settings.trial and run_settings.trial.sweep_id:
        # the runs of a W&B sweep belong to its project, whatever the project of other runs
        sweep_project = {
            "project": os.environ.get("WANDB_PROJECT"),
            "entity": os.environ.get("WANDB_ENTITY"),
        }
        settings = settings.model_copy(update=sweep_project)
    _make_home_usable(root / "wandb" / "local")
    with _environment():
        if mode != "offline":
            mode = _with_key(mode)
        if mode == "disabled":
            return None
        if (
            mode == "online"
            and run_settings.resume
            and any(run.offline for run in _session()._active_runs)
        ):
            log.warning(
                "W&B (online): another run of this process could not reach the server; "
                "this run is logged offline, too"
            )
            mode = "offline"  # a failed attempt to go online would cost the run its id
        if mode == "online":
            earlier_segments = segments(root / "wandb", run_settings.id)
            try:
                run = _init(settings, root, "online", run_settings)
                with contextlib.suppress(Exception):
                    # logging the first table needs this, and would fail if the server is gone then
                    run._public_api()
                return run
            except Exception as error:
                log.warning("W&B (online): %s; logging offline", first_line(error))
            for path in segments(root / "wandb", run_settings.id):
                if path not in earlier_segments:  # it contains only a name
                    shutil.rmtree(path, ignore_errors=True)
            run_settings = _without_active_run(run_settings)
        try:
            return _init(settings, root, "offline", run_settings)
        except Exception as error:
            log.warning("W&B (offline): %s; this run is not logged to W&B", first_line(error))
            return None


def _init(settings: TrackerSettings, root: Path, mode: Mode, run_settings: RunSettings) -> Any:
    """Call wandb.init, which may fail."""
    import wandb

    options: dict[str, Any] = {
        "init_timeout": settings.timeout,
        "finish_timeout": 0.75 * FINISH_FACTOR * settings.timeout,
        "finish_timeout_raises": True,
        "reinit": "create_new",  # the default returns the run that a crashed job left open
        "console": wandb_env.console(),
        "silent": True,
        **dashboard.settings(),
    }
    if run_settings.trial and run_settings.trial.sweep_id:
        options["sweep_id"] = run_settings.trial.sweep_id
    return wandb.init(
        mode=mode,
        dir=str(root),
        id=run_settings.id,
        # not offline: syncing a segment with `resume` would append it to earlier ones on the server
        resume="allow" if mode == "online" and run_settings.resume else None,
        project=settings.project or _session().settings.project or "kd",
        entity=settings.entity,
        name=run_settings.name,
        job_type=run_settings.job_type,
        group=run_settings.group,
        tags=list(run_settings.tags),
        notes=run_settings.notes,
        config=_config(run_settings),
        settings=wandb.Settings(**options),
    )


def _config(run_settings: RunSettings) -> dict[str, Any]:
    """Merge a run's configuration with the parameters that a sweep agent chose.

    The parameters keep the names that the sweep gives them. If the choice of a config group
    (`method: logits`) has the name of a mapping, the mapping is replaced by its dotted keys
    (`method.T`).
    """
    parameters = run_settings.trial.parameters if run_settings.trial else {}
    config: dict[str, Any] = {}
    for name, value in run_settings.config.items():
        displaced = name in parameters and isinstance(value, Mapping)
        config.update(flatten(value, f"{name}.") if displaced else {name: value})
    return {**config, **parameters}


def segments(directory: Path, run_id: str) -> list[Path]:
    """Return the folders of a run's W&B files in `directory`: one per start of the run."""
    # the last group tells apart two starts in the same second
    pattern = re.compile(rf"(offline-)?run-\d{{8}}_\d{{6}}-{re.escape(run_id)}(-\d+)?")
    try:
        folders = [path for path in directory.iterdir() if pattern.fullmatch(path.name)]
    except OSError:
        return []
    return [
        path
        for path in folders
        if (path / f"run-{run_id}.wandb").exists() or not any(path.glob("run-*.wandb"))
    ]


def _session() -> Any:
    """Return W&B's state of this process, which prints nothing.

    Its settings come from files and from the environment.
    """
    import wandb

    return wandb.setup(wandb.Settings(silent=True))


def _with_key(mode: Mode | None) -> Mode:
    """Return `mode` (default: online), or offline if W&B would prompt for a missing API key."""
    try:
        from wandb.sdk.lib import wbauth

        session_settings = _session().settings
        # `wandb offline` writes the mode to a file
        if mode is None and session_settings.mode != "online":
            return wandb_env.MODES.get(session_settings.mode, "offline")
        if (
            session_settings.api_key
            or session_settings.identity_token_file
            or wbauth.read_netrc_auth(host=session_settings.base_url)
        ):
            return "online"
    except Exception as error:  # for example if the home directory cannot be read
        log.warning("W&B: cannot look up the API key (%s); logging offline", first_line(error))
        return "offline"
    if mode == "online":
        log.warning(
            "W&B: no API key for %s (`wandb login` stores one); logging offline",
            session_settings.base_url,
        )
    return "offline"


def _without_active_run(run_settings: RunSettings) -> RunSettings:
    """Return settings with which a run can be started again after a failed start.

    W&B's running service would refuse the same id. It is stopped, or else the id is changed.
    """
    import wandb

    if _session()._active_runs:  # stopping the service would end these
        return replace(run_settings, id=secrets.token_hex(6))
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()
    return run_settings


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Hide the variables from W&B that kd handles itself, and those that would make W&B fail."""
    # set for example by an agent, whose service ends with the agent's process
    os.environ.pop("WANDB_SERVICE", None)
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
    """Return W&B's error about the value of a variable, or an empty string."""
    import wandb

    try:
        wandb.Settings().update_from_env_vars({name: os.environ[name]})
    except ValidationError as error:
        return str(error.errors(include_url=False)[0]["msg"])
    except Exception as error:
        return first_line(error)
    return ""


def _root(folder: Path) -> Path:
    """Return the directory for W&B's files: WANDB_DIR if it is usable, else the run's directory."""
    wandb_dir = os.environ.get("WANDB_DIR")
    if wandb_dir and not _usable(Path(wandb_dir)):
        log.warning(
            "W&B: cannot write to WANDB_DIR=%s; its files go to %s",
            wandb_dir,
            console.display_path(folder),
        )
    return Path(wandb_dir).absolute() if wandb_dir and _usable(Path(wandb_dir)) else folder


def _make_home_usable(fallback: Path) -> None:
    """Replace W&B's directories in the home by ones in `fallback` where they cannot be used.

    This applies to the rest of the process.
    """
    from wandb import env

    for name, default in (("CACHE", env.get_cache_dir), ("DATA", env.get_data_dir)):
        try:
            path = Path(str(default()))
        except RuntimeError:
            # there is no home, and W&B computes its default even if a variable overrides it
            path = fallback / name.lower()
            os.environ[f"XDG_{name}_HOME"] = str(path)
        if not path.is_absolute() or not _usable(path):
            path = fallback / name.lower()
        # without HOME, W&B's service has no default either
        if "HOME" not in os.environ or path.is_relative_to(fallback):
            os.environ[f"WANDB_{name}_DIR"] = str(path)
    try:
        Path("~").expanduser()
    except RuntimeError:
        os.environ.setdefault("WANDB_CONFIG_DIR", str(fallback / "config"))


def _usable(path: Path) -> bool:
    """Return whether a directory exists, or can be created, and is accessible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(path, os.R_OK | os.W_OK | os.X_OK)


def _finish(run: Any, code: int, seconds: float) -> None:
    """Finish a run, and log where to find it: on the server, or in files that can be uploaded."""
    uploaded = _finish_within(run, code, None if run.offline else seconds)
    with contextlib.suppress(Exception):
        files = console.display_path(Path(run.dir).parent)
        level = logging.INFO
        if run.offline:
            line = f"offline; to see it: wandb leet {files}; to upload it: wandb sync {files}"
        elif uploaded and not _upload_errors(files / "logs" / "debug-internal.log"):
            line = str(run.url)
        else:
            level = logging.WARNING
            line = (
                "some of the data did not reach the server; "
                f"to upload it: wandb sync --include-online {files}"
            )
        if level > logging.INFO or not wandb_env.flag("WANDB_SILENT"):
            log.log(level, "W&B      %s", line)


def _finish_within(run: Any, code: int, seconds: float | None) -> bool:
    """Finish a run, and return whether that succeeded in time.

    W&B's own time limit does not work for an artifact that cannot be uploaded.

    Args:
        run: The W&B run.
        code: Exit code of the run.
        seconds: Time limit; None for no limit.
    """
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
    """Kill W&B's service of this process, which would otherwise block the exit of the process.

    It has written its files by now. It is left alone if other runs use it.
    """
    import wandb

    with contextlib.suppress(Exception, SystemExit):
        session = _session()
        if not [other for other in session._active_runs if other is not run]:
            session._connection._proc._process.kill()
            wandb.teardown()


# the parts of W&B's service that upload
_UPLOADERS = ("filestream:", "runupserter:", "runfiles:", "fileTransfer:")


def _upload_errors(path: Path) -> bool:
    """Return whether W&B's service logged a failed upload, which `finish` does not report."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        records = [json.loads(line) for line in lines if '"ERROR' in line]
    except (OSError, ValueError):
        return False
    return any(str(record.get("msg", "")).startswith(_UPLOADERS) for record in records)
