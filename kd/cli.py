"""The entry point, and the only place that knows Hydra: composes the configuration and hands it on as plain data."""

import contextlib
import errno
import itertools
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import env_override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from kd.settings import UserError

_HERE = Path(__file__).resolve().parent
CONF = next(path for path in (_HERE / "conf", _HERE.parent / "conf") if path.is_dir())  # wheel, or source tree


def plain(config: DictConfig) -> dict[str, Any]:
    """What was composed, resolved, without Hydra's own node."""
    config = config.copy()
    with open_dict(config):
        config.pop("hydra", None)
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def run_dir(*, _root_: DictConfig) -> str:
    """The resolver behind hydra.run.dir: only a valid configuration has an identity, and so a directory."""
    from kd.config import check
    from kd.run import folder_of

    return str(folder_of(check(plain(_root_))))


OmegaConf.register_new_resolver("kd.run_dir", run_dir, replace=True)


def sweep_dir(mode: Any, wanted: str) -> str:
    """The resolver behind hydra.sweep.dir: `wanted`, or, where another sweep has that, the next free name after it.

    The directory is made here, at once: two sweeps that start in the same second do not share one.
    """
    if mode != RunMode.MULTIRUN:
        return wanted
    for number in itertools.count(1):
        place = wanted if number == 1 else f"{wanted}-{number}"
        with contextlib.suppress(FileExistsError):
            Path(place).mkdir(parents=True)
            return place
    raise AssertionError


OmegaConf.register_new_resolver("kd.sweep_dir", sweep_dir, replace=True, use_cache=True)  # jobs inherit the cache


def prepare(composed: DictConfig, sweep: str | None) -> Any:
    """The checked configuration of a job, this process made ready for it. `sweep`: the directory of its sweep."""
    from kd import device, tracker
    from kd.config import check

    if sweep and composed.tracker.group is None:
        composed.tracker.group = tracker.group(Path(sweep).absolute())
    config = check(plain(composed))
    device.settle(config.root.threads)
    return config


def task(composed: DictConfig, tell: Any = None, shared: Any = None) -> None:
    """One job of Hydra's, by whatever launcher; its files go to the run's own directory."""
    from kd.run import folder_of, log, run, summary

    job = HydraConfig.get()
    config = prepare(composed, job.sweep.dir if job.mode == RunMode.MULTIRUN else None)
    for line in summary(config, run(config, tell=tell, shared=shared), folder_of(config)):
        log.info(line)


class TerminatedError(KeyboardInterrupt):
    """SIGTERM: as Ctrl-C, with another exit code."""


def _terminate(*_: Any) -> None:
    raise TerminatedError


def main() -> None:
    """`python -m kd` and `kd`. Exit code 0: done; 1: a job failed; 2: a mistake that the user can mend, in one line."""
    sys.argv[1:] = sorted(
        sys.argv[1:], key=lambda word: not word.startswith("-") and "=" in word
    )  # flags may come last
    full = os.environ.get("HYDRA_FULL_ERROR")
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        with env_override({"HYDRA_FULL_ERROR": "1"}):  # Hydra hands its errors on, instead of printing and exiting
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)()
    except KeyboardInterrupt as interrupt:
        ended = isinstance(interrupt, TerminatedError)
        print(f"kd: {'terminated' if ended else 'interrupted'}", file=sys.stderr)
        sys.exit(143 if ended else 130)
    except BrokenPipeError:  # `kd --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if full and full != "0":
            raise
        code, line = _explain(error)
        if line is None:
            raise
        print(f"kd: {line}", file=sys.stderr)
        sys.exit(code)
    finally:
        signal.signal(signal.SIGTERM, before)


def _explain(error: BaseException) -> tuple[int, str | None]:
    """(exit code, one line), or (1, None) for an error that is not the user's."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for one in chain:
        if type(one).__name__ in ("SweepFailedError", "DivergedError"):
            return 1, str(one)
        if isinstance(one, UserError):
            return 2, str(one)
    for one in chain:
        if str(one).startswith("Only one of --run"):  # Hydra's flags
            return 2, str(one)
        if isinstance(one, HydraException | OmegaConfBaseException) and str(one):
            return 2, _reword(str(one), str(one.__cause__ or ""))
        if isinstance(one, OSError) and one.filename and one.errno in _UNWRITABLE:
            other = "paths.runs=PATH, or a sweep's with hydra.sweep.dir=PATH"
            return 2, f"cannot write to {one.filename} ({one.strerror}); choose another folder with {other}"
    return 1, None


_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOSPC, errno.EDQUOT}


def _reword(text: str, cause: str) -> str:
    """Hydra's own errors, as one line, without its advice to force an unknown key in with `+`."""
    if found := re.search(r"Error merging override (\S+?)=", text):
        return f"{found[1]}: {cause.splitlines()[0] if cause else 'is not allowed'}"
    if "does not support sweep type" in text:
        return "interval(a,b) is for hydra/sweeper=optuna; a grid takes values, as method.T=1,2,4"
    if found := re.search(r"Could not override '([^']+)'", text):
        return f"{found[1]}: there is no such key here; `--cfg job` shows those there are"
    if "Missing mandatory value" in text and (found := re.search(r"full_key: (\S+)", text)):
        return f"{found[1]}: this key is missing; set it with {found[1]}=..."
    return " ".join(text.split("Config search path")[0].split())


if __name__ == "__main__":
    main()
