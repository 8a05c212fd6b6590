"""The entry point, and the only place that knows Hydra: composes the configuration and hands it on as plain data."""

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
from dataclasses import replace
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
from kd.core.errors import DivergedError, SweepFailedError, UserError, unknown_key
from kd.core.registry import CONF
from kd.core.signals import SignalHandler, TerminatedError


def _register_plugins() -> None:
    """Register kd's launcher and sweepers with Hydra, in this process only: other applications do not have them."""
    plugins = Plugins.instance()  # scans other packages first, whose names do not replace kd's
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
    """What was composed, resolved, without Hydra's own node and `dry_run`. Values may refer to Hydra's, as
    ${hydra:job.num}. **Raises:** UserError for a dry run."""
    with hydra_values(config):
        config = config.copy()
        with open_dict(config):
            config.pop("hydra", None)
            if (dry := config.pop("dry_run", False)) is not False:
                given = (
                    "is for the whole command, and for kd's sweepers"
                    if dry is True
                    else "should be true or false"
                )
                raise UserError(f"dry_run: {given}, got {dry!r} for a job")
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=throw_on_missing)  # type: ignore[return-value]


@contextlib.contextmanager
def hydra_values(config: DictConfig) -> Iterator[None]:
    """Inside, ${hydra:...} refers to this configuration's own node, where it has one."""
    current = HydraConfig.instance()
    before = current.cfg
    if "hydra" in config:
        current.cfg = config  # type: ignore[assignment]  # not set_config: it copies, which takes longer than planning
    try:
        yield
    finally:
        current.cfg = before


def multirun_mode(*reasons: Any) -> RunMode | None:
    """The resolver behind hydra.mode: any of these makes the command a multirun; without one -m does."""
    return RunMode.MULTIRUN if any(reason not in (None, False) for reason in reasons) else None


OmegaConf.register_new_resolver("kd.mode", multirun_mode, replace=True)


def run_dir(*, _root_: DictConfig) -> str:
    """The resolver behind hydra.run.dir: only a valid configuration has an identity, and so a directory."""
    from kd.config.schema import run_dir, validate_config
    from kd.training.run import check_resume_compatible

    check_resume_compatible(config := validate_config(to_container(_root_)))
    return str(run_dir(config))


OmegaConf.register_new_resolver("kd.run_dir", run_dir, replace=True)


def sweep_dir(mode: Any, dry_run: Any, wanted: str) -> str:
    """The resolver behind hydra.sweep.dir: `wanted`, or, where another sweep has that, the next free name after it.

    The directory is made here, at once: two sweeps that start in the same second do not share one.
    """
    if mode != RunMode.MULTIRUN or dry_run is True:
        return wanted
    Path(wanted).parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        place = wanted if number == 1 else f"{wanted}-{number}"
        with contextlib.suppress(FileExistsError):
            Path(place).mkdir()
            return place
    raise AssertionError


OmegaConf.register_new_resolver(
    "kd.sweep_dir", sweep_dir, replace=True, use_cache=True
)  # jobs inherit the cache


def prepare(composed: DictConfig, sweep: str | None) -> Any:
    """The checked configuration of a job, this process made ready for it. `sweep`: the directory of its sweep."""
    from kd.config.schema import validate_config
    from kd.training import device

    config = replace(
        validate_config(to_container(composed)), sweep=Path(sweep).absolute() if sweep else None
    )
    device.configure_process(config.root.threads)
    logging.raiseExceptions = (
        False  # a log that cannot be written is no reason to say so for each line
    )
    return config


def task(composed: DictConfig, tell: Any = None, shared: Any = None) -> None:
    """One job of Hydra's, by whatever launcher; its files go to the run's own directory."""
    from kd.config.schema import run_dir
    from kd.training.finalize import summary_lines
    from kd.training.run import log, run

    streams.protect()  # a launcher's own process may not have come through `main`
    job = HydraConfig.get()
    try:
        _change_directory(Path(job.runtime.cwd))
        config = prepare(composed, job.sweep.dir if job.mode == RunMode.MULTIRUN else None)
        single = job.mode != RunMode.MULTIRUN
        for line in summary_lines(
            config, run(config, tell=tell, shared=shared, single=single), run_dir(config)
        ):
            log.info(line)
    except Exception as error:
        if job.mode == RunMode.MULTIRUN:
            raise
        raise RefusedError from error


def _change_directory(directory: Path) -> None:
    """With hydra.job.chdir Hydra has changed to the job's directory; paths are relative to where kd was started."""
    if directory.is_dir():
        os.chdir(directory)  # Hydra itself changes back after the job


@streams.protected
def main() -> None:
    """`python -m kd` and `kd`. Exit code 0: done; 1: a job failed; 2: a mistake that the user can mend, in one line."""
    full = os.environ.get("HYDRA_FULL_ERROR")
    try:
        # Hydra hands its errors on, instead of printing and exiting
        flags, overrides, directories = split_arguments(sys.argv[1:])
        _check_overrides(overrides)
        sys.argv[1:] = [*flags, *overrides]
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


def _check_overrides(words: list[str]) -> None:
    """Raise UserError for what Hydra would do that kd does not want, or would refuse with a traceback."""
    for word in words:
        override = parse(word)
        key, value = override.key_or_group, override._value
        if key.split(".")[0] == "hydra":
            _refuse_code(key, value)
        elif override.is_delete() or (override.type is OverrideType.CHANGE and _is_mapping(value)):
            continue
        elif ("/" in key or (CONF / key).is_dir()) and not _is_choice(value):
            known = ", ".join(sorted(path.stem for path in (CONF / key).glob("*.yaml")))
            raise UserError(f"{key}: {value!r} is not a choice; allowed: {known or 'a name'}")


def _is_mapping(value: Any) -> bool:
    """Keys and values, or several such to sweep over: method={T:1,alpha:0.5},{T:4,alpha:0.1}."""
    values = getattr(value, "list", [value])
    return bool(values) and all(isinstance(one, dict) for one in values)


def _is_choice(value: Any) -> bool:
    """Can Hydra look for it, or for all of it, among the choices of a group?"""
    value = getattr(value, "list", getattr(value, "text", value))
    several = isinstance(value, list) and all(
        _is_choice(v) and not isinstance(v, list) for v in value
    )
    return several or isinstance(value, Glob) or (isinstance(value, str) and len(value) < 100)


_ALLOWED_PACKAGES = {
    "_target_": ("hydra", "hydra_plugins", "kd"),
    "class": ("hydra", "kd", "logging"),
}
_INSTANTIATED = r"hydra($|\.(callbacks|launcher|sweeper|job_logging|hydra_logging))"  # what Hydra makes objects of


def _refuse_code(path: str, value: Any) -> None:
    """Raise UserError where this would make Hydra import or call what is not its own, a plugin's or kd's."""
    value = getattr(value, "list", getattr(value, "text", value))
    key, said = path.rpartition(".")[2], str(value)
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_code(f"{path}.{name}", inner)
    elif isinstance(value, list):
        for inner in value:
            _refuse_code(path, inner)
    elif path.startswith("hydra.sweeper.params."):
        _check_overrides([f"{path.removeprefix('hydra.sweeper.params.')}={said}"])
    elif key in _ALLOWED_PACKAGES and not _is_class(said, _ALLOWED_PACKAGES[key]):
        allowed = ", ".join(f"{package}.*" for package in _ALLOWED_PACKAGES[key])
        raise UserError(
            f"{path}: {said!r} would run foreign code; allowed: the classes in {allowed}"
        )
    elif key == "()" or "ext://" in said or "pkg://" in said:
        raise UserError(
            f"{path}: {said!r} would run foreign code; it cannot be given as an override"
        )
    elif re.match(_INSTANTIATED, path) and re.match(
        r"\$\{(?!now:|oc\.env:|hydra\.sweep\.|hydra\.runtime\.output_dir)", said
    ):
        raise UserError(
            f"{path}: {said!r} could lead to foreign code; write out what it stands for"
        )


def _is_class(name: str, packages: tuple[str, ...]) -> bool:
    """Is it a class in a module of these packages, and not what such a module has imported from elsewhere?"""
    module, _, last = name.rpartition(".")
    with contextlib.suppress(ImportError, ValueError):
        return (
            module.split(".")[0] in packages
            and last[:1].isupper()
            and find_spec(module) is not None
        )
    return False


def _printable(text: str) -> str:
    """On one line, and as it is, whatever the names in it hold."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _explain(error: BaseException) -> tuple[int, str | None]:
    """(exit code, one line), or (1, None) for an error that is not the user's."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for one in chain:
        if isinstance(one, SweepFailedError | DivergedError):
            return 1, str(one)
        if isinstance(one, UserError):
            return 2, str(one)
    for one in chain:
        if isinstance(one, OSError) and one.errno in _WRITE_ERRORS:
            exists = bool(one.filename) and os.path.exists(one.filename)  # noqa: PTH110 - of any name
            if exists and not os.access(one.filename, os.R_OK):
                return 2, f"cannot read {one.filename} ({one.strerror})"
            other = "paths.runs=PATH, or a sweep's with hydra.sweep.dir=PATH"
            return (
                2,
                f"cannot write to {one.filename or 'the disk'} ({one.strerror}); choose another folder with {other}",
            )
    for one in chain:
        if isinstance(one, RecursionError) and (circle := describe_defaults_cycle(one)):
            return 2, circle
        if str(one).startswith("Only one of --run"):  # Hydra's flags
            if {"-m", "--multirun"} & set(sys.argv) and any(
                word.startswith(("-c", "--c")) for word in sys.argv
            ):
                return (
                    2,
                    "--cfg prints one configuration, without -m; dry_run=true lists the jobs of a sweep",
                )
            return 2, str(one)
        if isinstance(one, HydraException | OmegaConfBaseException) and str(one):
            return 2, _reword(one, str(one.__cause__ or ""))
    raised_in = (
        Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if error.__traceback__
        else Path()
    )
    if any(
        raised_in.is_relative_to(Path(str(module.__file__)).parent)
        for module in (hydra, omegaconf, logging)
    ):
        what = str(error.__cause__ or error) or type(error).__name__
        return 2, f"Hydra refuses these words ({what}); HYDRA_FULL_ERROR=1 shows where"
    return 1, None


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
    """Hydra's own errors, as one line, without its advice to force an unknown key in with `+`."""
    text = str(error)
    if found := re.search(r"Error merging override (\S+?)=", text):
        return f"{found[1]}: {cause.splitlines()[0] if cause else 'is not allowed'}"
    if found := re.search(r"LexerNoViableAltException: (\S+?)=", text):  # such as ~
        return f"{found[1]}: the value must be quoted, for Hydra and for the shell: \"{found[1]}='...'\""
    if "does not support sweep type" in text:
        return "interval(a,b) is for hydra/sweeper=optuna; a grid takes values, as method.T=1,2,4"
    if found := re.search(r"Could not override '([^']+)'", text):
        near = re.search(r"Did you mean to override (?:one of )?(.*)\?", text)
        node = getattr(error.__cause__, "parent_node", None)
        if near:  # a group that is to be overridden
            return f"{found[1]}: unknown key; did you mean {near[1]}?"
        if not isinstance(node, DictConfig):
            return f"{found[1]}: unknown key; `--cfg job` shows the valid ones"
        return unknown_key(found[1], [str(key) for key in node if key != "hydra"])
    if found := re.search(r"Multiple values for (\S+)\. To override", text):
        return (
            f"{found[1]}: there is one already; choose another with {found[1]}=..., without the +"
        )
    if "Missing mandatory value" in text and (found := re.search(r"full_key: (\S+)", text)):
        return f"{found[1]}: this key is missing; set it with {found[1]}=..."
    if found := re.search(r"(.*?)\s+full_key: (\S+)", text, re.DOTALL):
        return f"{found[2]}: {' '.join(found[1].split())}"
    return " ".join(text.split("Config search path")[0].split())


if __name__ == "__main__":
    main()
