"""The command line: Hydra composes the configuration, and a job runs it as plain data.

Within `kd`, only this module and `kd.config.overrides` import Hydra.
"""

import contextlib
import errno
import itertools
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
import omegaconf
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Glob, OverrideType
from hydra.core.plugins import Plugins
from hydra.core.utils import env_override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from hydra_plugins._kd_launcher import LocalConf, LocalLauncher
from hydra_plugins._kd_optuna import OptunaConf, OptunaSweeper
from hydra_plugins._kd_search_path import DIRECTORIES, UserDirectoriesFirst, UserSource
from hydra_plugins._kd_sweeper import GridConf, GridSweeper
from kd.config.overrides import RefusedError, describe_defaults_cycle, parse, split_arguments
from kd.config.wandb_env import refuse_seed
from kd.core import streams
from kd.core.errors import RENAMED, DivergedError, SweepFailedError, UserError, unknown_key
from kd.core.registry import CONF
from kd.core.signals import SignalHandler, TerminatedError


def _register_plugins() -> None:
    """Register kd's launcher and sweepers with Hydra, in this process only.

    Other applications that use Hydra do not get them.
    """
    # This scans other packages first, so that their plugins do not replace kd's of the same name
    plugins = Plugins.instance()
    for group, name, node, plugin in (
        ("hydra/launcher", "local", LocalConf, LocalLauncher),
        ("hydra/sweeper", "grid", GridConf, GridSweeper),
        ("hydra/sweeper", "optuna", OptunaConf, OptunaSweeper),
    ):
        ConfigStore.instance().store(group=group, name=name, node=node, provider="kd")
        plugins.register(plugin)
    plugins.register(UserSource)
    plugins.register(UserDirectoriesFirst)


_register_plugins()


def to_container(config: DictConfig, throw_on_missing: bool = True) -> dict[str, Any]:
    """Convert a composed configuration to plain data, without Hydra's own node and `dry_run`.

    Values may refer to Hydra's node, as in ${hydra:job.num}.

    Args:
        config: What Hydra composed for a job.
        throw_on_missing: Whether a missing mandatory value is an error.

    Raises:
        UserError: If `dry_run` is set, which is only for the whole command.
    """
    with hydra_values(config):
        config = config.copy()
        with open_dict(config):
            config.pop("hydra", None)
            dry_run = config.pop("dry_run", False)
            if dry_run is not False:
                problem = (
                    "applies to the whole command and needs one of kd's sweepers"
                    if dry_run is True
                    else "should be true or false"
                )
                raise UserError(f"dry_run: {problem}, got {dry_run!r} for a job")
        return OmegaConf.to_container(  # type: ignore[return-value]
            config, resolve=True, throw_on_missing=throw_on_missing
        )


@contextlib.contextmanager
def hydra_values(config: DictConfig) -> Iterator[None]:
    """Within the block, resolve ${hydra:...} from the `hydra` node of `config`, if it has one."""
    current = HydraConfig.instance()
    previous = current.cfg
    if "hydra" in config:
        # Not set_config, which copies: that takes longer than planning a job
        current.cfg = config  # type: ignore[assignment]
    try:
        yield
    finally:
        current.cfg = previous


def multirun_mode(*reasons: Any) -> RunMode | None:
    """Resolve hydra.mode: MULTIRUN if any reason is neither null nor false.

    Otherwise None, which leaves the choice to -m.
    """
    return RunMode.MULTIRUN if any(reason not in (None, False) for reason in reasons) else None


OmegaConf.register_new_resolver("kd.mode", multirun_mode, replace=True)


def run_dir(*, _root_: DictConfig) -> str:
    """Resolve hydra.run.dir. Only a valid configuration has an identity, and so a directory."""
    from kd.config.schema import run_dir
    from kd.config.validate import validate_config
    from kd.training.run import check_resume_compatible

    config = validate_config(to_container(_root_))
    check_resume_compatible(config)
    return str(run_dir(config))


OmegaConf.register_new_resolver("kd.run_dir", run_dir, replace=True)


def sweep_dir(mode: Any, dry_run: Any, requested: str) -> str:
    """Resolve hydra.sweep.dir: `requested`, or the next free name if another sweep has it.

    The directory is made here, at once, so that two sweeps that start in the same second do not
    share one.
    """
    if mode != RunMode.MULTIRUN or dry_run is True:
        return requested
    Path(requested).parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        candidate = requested if number == 1 else f"{requested}-{number}"
        with contextlib.suppress(FileExistsError):
            Path(candidate).mkdir()
            return candidate
    raise AssertionError


# use_cache: the jobs of a sweep inherit the resolver's cache, and so its directory
OmegaConf.register_new_resolver("kd.sweep_dir", sweep_dir, replace=True, use_cache=True)


def prepare(composed: DictConfig, sweep: str | None) -> Any:
    """Return the checked configuration of a job, and set up this process for it.

    Args:
        composed: What Hydra composed for the job.
        sweep: The directory of the job's sweep, or None for a single run.

    Raises:
        UserError: If the configuration is invalid.
    """
    from kd.config.validate import validate_config
    from kd.training import device

    config = validate_config(to_container(composed))
    config = config.replace(sweep=Path(sweep).absolute() if sweep else None)
    device.configure_process(config.threads)
    # If a log cannot be written, do not print a traceback for each of its lines
    logging.raiseExceptions = False
    return config


def task(composed: DictConfig, report: Any = None, cache: Any = None) -> None:
    """Run one Hydra job, under any launcher. Its files go to the run's own directory.

    Args:
        composed: What Hydra composed for the job.
        report: Called after each epoch of the student; returns True to end the run.
        cache: A `RunCache` shared by the jobs of this process.
    """
    from kd.config.schema import run_dir
    from kd.training.finalize import summary_lines
    from kd.training.run import TrainingRun, log

    streams.protect()  # a launcher's own process may not have come through `main`
    job = HydraConfig.get()
    try:
        _change_directory(Path(job.runtime.cwd))
        config = prepare(composed, job.sweep.dir if job.mode == RunMode.MULTIRUN else None)
        single = job.mode != RunMode.MULTIRUN
        result = TrainingRun(config, report=report, cache=cache, single=single).execute()
        for line in summary_lines(config, result, run_dir(config)):
            log.info(line)
    except Exception as error:
        if job.mode == RunMode.MULTIRUN:
            raise
        raise RefusedError from error


def _change_directory(directory: Path) -> None:
    """Change back to where kd was started, to which paths are relative.

    With hydra.job.chdir Hydra has changed to the job's directory. It changes back after the job.
    """
    if directory.is_dir():
        os.chdir(directory)


@streams.protected()
def main() -> None:
    """Run `kd`, also as `python -m kd`.

    The exit code is 0 if everything is done, 1 if a job failed, 2 for a mistake by the user
    (reported in one line), and 128 plus the number of the signal if a signal ended the command.
    """
    full = os.environ.get("HYDRA_FULL_ERROR")
    try:
        flags, overrides, directories = split_arguments(sys.argv[1:])
        _check_overrides(overrides)
        sys.argv[1:] = [*flags, *overrides]
        # HYDRA_FULL_ERROR: Hydra raises its errors instead of printing them and exiting
        variables = {"HYDRA_FULL_ERROR": "1", DIRECTORIES: json.dumps(directories)}
        refuse_seed()
        with SignalHandler().installed(), env_override(variables):
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)()
    except KeyboardInterrupt as interrupt:
        code = interrupt.code if isinstance(interrupt, TerminatedError) else 130
        print(f"kd: {'interrupted' if code == 130 else 'terminated'}", file=sys.stderr)
        sys.exit(code)
    except (Exception, RefusedError) as raised:
        error = raised.__cause__ or raised if isinstance(raised, RefusedError) else raised
        code, line = _explain(error)
        if line is None or (full and full != "0"):
            raise error from None
        print(f"kd: {_printable(line)}", file=sys.stderr)
        sys.exit(code)


def _check_overrides(overrides: list[str]) -> None:
    """Refuse overrides that would run code, or that Hydra would refuse with a traceback.

    Raises:
        UserError: For the first such override.
    """
    for text in overrides:
        override = parse(text)
        key = override.key_or_group
        value = override._value
        if key.split(".")[0] == "hydra":
            _refuse_code(key, value)
        elif override.is_delete() or (override.type is OverrideType.CHANGE and _is_mapping(value)):
            continue
        elif ("/" in key or (CONF / key).is_dir()) and not _is_choice(value):
            choices = ", ".join(sorted(path.stem for path in (CONF / key).glob("*.yaml")))
            raise UserError(f"{key}: {value!r} is not a choice; allowed: {choices or 'a name'}")


def _is_mapping(value: Any) -> bool:
    """Return whether a value is a mapping, or several to sweep over.

    For example method={T:1,alpha:0.5},{T:4,alpha:0.1}.
    """
    values = getattr(value, "list", [value])
    return bool(values) and all(isinstance(element, dict) for element in values)


def _is_choice(value: Any) -> bool:
    """Return whether Hydra can look up a value, or each of several, among a group's choices."""
    value = getattr(value, "list", getattr(value, "text", value))
    several = isinstance(value, list) and all(
        _is_choice(element) and not isinstance(element, list) for element in value
    )
    return several or isinstance(value, Glob) or (isinstance(value, str) and len(value) < 100)


_ALLOWED_PACKAGES = {
    "_target_": ("hydra", "hydra_plugins", "kd"),
    "class": ("hydra", "kd", "logging"),
}
# The nodes from which Hydra makes objects
_INSTANTIATED = r"hydra($|\.(callbacks|launcher|sweeper|job_logging|hydra_logging))"


def _refuse_code(path: str, value: Any) -> None:
    """Refuse a value that would make Hydra import or call anything but Hydra, its plugins and kd.

    Raises:
        UserError: If the value could run other code.
    """
    value = getattr(value, "list", getattr(value, "text", value))
    key = path.rpartition(".")[2]
    text = str(value)
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_code(f"{path}.{name}", inner)
    elif isinstance(value, list):
        for inner in value:
            _refuse_code(path, inner)
    elif path.startswith("hydra.sweeper.params."):
        _check_overrides([f"{path.removeprefix('hydra.sweeper.params.')}={text}"])
    elif key in _ALLOWED_PACKAGES and not _is_class(text, _ALLOWED_PACKAGES[key]):
        allowed = ", ".join(f"{package}.*" for package in _ALLOWED_PACKAGES[key])
        raise UserError(
            f"{path}: {text!r} would run untrusted code; allowed: the classes in {allowed}"
        )
    elif key == "()" or "ext://" in text or "pkg://" in text:
        raise UserError(
            f"{path}: {text!r} would run untrusted code; it is not allowed as an override"
        )
    elif re.match(_INSTANTIATED, path) and re.match(
        r"\$\{(?!now:|oc\.env:|hydra\.sweep\.|hydra\.runtime\.output_dir)", text
    ):
        raise UserError(
            f"{path}: {text!r} could resolve to untrusted code; write out the value itself"
        )


def _is_class(name: str, packages: tuple[str, ...]) -> bool:
    """Return whether `name` is a class in a module of `packages`.

    A name that such a module has imported from elsewhere, as in `logging.os.system`, is not.
    """
    module, _, last = name.rpartition(".")
    with contextlib.suppress(ImportError, ValueError):
        return (
            module.split(".")[0] in packages
            and last[:1].isupper()
            and find_spec(module) is not None
        )
    return False


def _printable(text: str) -> str:
    """Return `text` on one line, with unprintable characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _explain(error: BaseException) -> tuple[int, str | None]:
    """Return (exit code, one line), or (1, None) for an error that is not the user's."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for link in chain:
        if isinstance(link, SweepFailedError | DivergedError):
            return 1, str(link)
        if isinstance(link, UserError):
            return 2, str(link)
    for link in chain:
        if isinstance(link, OSError) and link.errno in _WRITE_ERRORS:
            return 2, _explain_write_error(link)
    for link in chain:
        if isinstance(link, RecursionError) and (cycle := describe_defaults_cycle(link)):
            return 2, cycle
        if str(link).startswith("Only one of --run"):  # Hydra's flags
            return 2, _explain_flags(str(link))
        if isinstance(link, HydraException | OmegaConfBaseException) and str(link):
            return 2, _reword(link, str(link.__cause__ or ""))
    raised_in = (
        Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if error.__traceback__
        else Path()
    )
    if any(
        raised_in.is_relative_to(Path(str(module.__file__)).parent)
        for module in (hydra, omegaconf, logging)
    ):
        reason = str(error.__cause__ or error) or type(error).__name__
        return 2, (
            f"Hydra rejected the configuration ({reason}); "
            "set HYDRA_FULL_ERROR=1 to see the traceback"
        )
    return 1, None


def _explain_write_error(error: OSError) -> str:
    exists = bool(error.filename) and os.path.exists(error.filename)  # noqa: PTH110 - any type
    if exists and not os.access(error.filename, os.R_OK):
        return f"cannot read {error.filename} ({error.strerror})"
    return (
        f"cannot write to {error.filename or 'the disk'} ({error.strerror}); "
        "choose another folder with paths.runs=PATH, or with hydra.sweep.dir=PATH for a sweep"
    )


def _explain_flags(message: str) -> str:
    multirun = bool({"-m", "--multirun"} & set(sys.argv))
    if multirun and any(arg.startswith(("-c", "--c")) for arg in sys.argv):
        return (
            "--cfg prints a single configuration, without -m; "
            "use dry_run=true to list the jobs of a sweep"
        )
    return message


_WRITE_ERRORS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOENT,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
}


def _reword(error: BaseException, cause: str) -> str:
    """Return a Hydra error as one line, without the advice to force an unknown key with `+`."""
    text = str(error)
    if match := re.search(r"Error merging override (\S+?)=", text):
        return f"{match[1]}: {cause.splitlines()[0] if cause else 'is not allowed'}"
    if match := re.search(r"LexerNoViableAltException: (\S+?)=", text):  # such as ~
        return f"{match[1]}: quote the value for Hydra and for the shell: \"{match[1]}='...'\""
    if "does not support sweep type" in text:
        return (
            "interval(a,b) is for hydra/sweeper=optuna; "
            "a grid takes a list of values, such as method.T=1,2,4"
        )
    if match := re.search(r"Could not override '([^']+)'", text):
        nearest = re.search(r"Did you mean to override (?:one of )?(.*)\?", text)
        node = getattr(error.__cause__, "parent_node", None)
        if nearest:  # the override is of a group
            return f"{match[1]}: unknown key; did you mean {nearest[1]}?"
        if not isinstance(node, DictConfig):
            return f"{match[1]}: unknown key; `--cfg job` lists the valid ones"
        return unknown_key(match[1], [str(key) for key in node if key != "hydra"])
    if match := re.search(r"Multiple values for (\S+)\. To override", text):
        return f"{match[1]}: already chosen; change it with {match[1]}=..., without the +"
    if "Missing mandatory value" in text and (match := re.search(r"full_key: (\S+)", text)):
        return f"{match[1]}: this key is missing; set it with {match[1]}=..."
    if match := re.search(r"(.*?)\s+full_key: (\S+)", text, re.DOTALL):
        if match[2] in RENAMED:  # in a file of the user's
            return unknown_key(match[2], [])
        return f"{match[2]}: {' '.join(match[1].split())}"
    return " ".join(text.split("Config search path")[0].split())


if __name__ == "__main__":
    main()
