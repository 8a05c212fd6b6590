"""Weights & Biases, as a mirror: the truth is in the run's own files, and nothing here may stop a training."""

import contextlib
import logging
import netrc
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from torch import Tensor

from kd import artifacts, console, dashboard
from kd.config import Config, Tracker
from kd.data import Data
from kd.files import read_json, write_json
from kd.settings import first_line
from kd.train import DivergedError, PrunedError
from kd.wandb_rules import shortened

log = logging.getLogger(__name__)


class Mirror:
    """Sends what it is told to one W&B run. After the first error it says so, once, and falls silent."""

    def __init__(self, run: Any = None, settings: Tracker | None = None):
        self.run, self.settings = run, settings
        self.rows: list[Mapping[str, Any]] = []

    def epoch(self, row: Mapping[str, Any]) -> None:
        """One row of history: `epoch` is the step; val_* become val/*, all else train/*."""
        self.rows.append(row)
        named = {f"val/{n[4:]}" if n.startswith("val_") else f"train/{n}": v for n, v in row.items() if n != "epoch"}
        if row["epoch"] >= getattr(self.run, "starting_step", 0):  # else the server has it, from before an interruption
            self.send(lambda run: run.log({"epoch": row["epoch"], **named}, step=row["epoch"]))
            self.send(lambda run: run.summary.update(dashboard.best(self.rows)))

    def finish(self, result: Mapping[str, Any], data: Data, logits: Tensor) -> None:
        """The summary, the confusion matrix of the test images, and some of them with the student's predictions."""
        self.send(lambda run: run.summary.update(dashboard.summary(result)))
        self.log(lambda: {"test/confusion": dashboard.confusion_matrix(data, logits)})
        if self.settings and self.settings.samples:
            count = self.settings.samples
            self.log(lambda: {"test/samples": dashboard.samples(data, logits, count)})

    def weights(self, config: Config, folder: Path, result: Mapping[str, Any]) -> None:
        """The weights of a finished run in `folder`, and those of its teacher, where artifacts are wanted."""
        if self.settings and self.settings.artifacts:
            self.send(lambda run: artifacts.log(run, config, folder, result))

    def alert(self, error: BaseException, folder: Path) -> None:
        """Tell who follows the run that it diverged or failed: not of one that the user or a search stopped."""
        if isinstance(error, Exception) and not isinstance(error, PrunedError):
            title = "Run diverged" if isinstance(error, DivergedError) else "Run failed"
            text = f"{folder.name}: {first_line(error)}\n\nfiles: {folder}"
            self.send(lambda run: run.alert(title, text, level="ERROR"))

    def log(self, make: Callable[[], Mapping[str, Any]]) -> None:
        """What `make()` gives, also where making it fails."""
        self.send(lambda run: run.log(make()))

    def send(self, act: Callable[[Any], Any]) -> None:
        """`act(run)`, unless W&B is off or has failed before."""
        if self.run is None:
            return
        try:
            act(self.run)
        except Exception as error:
            log.warning("W&B: %s; logging to it stops, the training goes on", first_line(error))
            self.run = None


@contextlib.contextmanager
def open(config: Config, folder: Path, job_type: str) -> Iterator[Mirror]:
    """A mirror for one run; when the block ends the W&B run is finished, as failed if an error leaves the block.

    A run that goes on after an interruption keeps its W&B id, and is to be told all its epochs again: online those that
    the server has are passed over, and each offline segment holds all from the first (of a killed process nothing may
    be left), so that a sync of it replaces what was synced before. In the end the earlier ones go to superseded/.
    """
    settings = config.root.tracker
    tags = list(dict.fromkeys([*settings.tags, shortened("tag", config.method.name)]))
    name = shortened("name", config.label())
    settings = settings.model_copy(update={"notes": dashboard.notes(settings.notes, folder, config.sweep)})
    content = {**config.plain(), "run_id": config.identity()}
    known = read_json(folder / "wandb.json")
    id_ = str(known["id"]) if isinstance(known, dict) and "id" in known else secrets.token_hex(6)
    with _mirrored(settings, folder, job_type, name, tags, content, id_) as run:
        if run is not None:
            write_json(folder / "wandb.json", {"id": id_})
        mirror = Mirror(run, settings)
        mirror.send(dashboard.define_axes)
        try:
            yield mirror
        except BaseException as error:
            mirror.alert(error, folder)
            raise
    for segment in (folder / "wandb").glob(f"*run-*-{id_}*"):  # two of one second have another ending
        with contextlib.suppress(Exception):
            if run is None or segment == Path(run.dir).parent:
                continue
            (folder / "wandb" / "superseded").mkdir(exist_ok=True)
            segment.rename(folder / "wandb" / "superseded" / segment.name)


def sweep(settings: Tracker, folder: Path, tables: Mapping[str, Any], figures: Sequence[Path], text: str) -> None:
    """One run beside a sweep's own, in its group, that holds the sweep's tables, figures and verdict."""
    notes = dashboard.notes(settings.notes, folder, folder, text)
    settings = settings.model_copy(update={"group": settings.group or group(folder), "notes": notes})
    with _mirrored(settings, folder, "sweep-summary", "sweep-summary", settings.tags, {}) as run:
        mirror = Mirror(run)
        for name, table in tables.items():
            mirror.log(lambda table=table, name=name: {name: dashboard.table(table)})  # type: ignore[misc]
        for path in figures:
            mirror.log(lambda path=path: {f"figures/{path.stem}": dashboard.picture(path)})  # type: ignore[misc]


def group(folder: Path) -> str:
    """The name under which W&B gathers the runs of the sweep in `folder`."""
    return shortened("group", "-".join(folder.parts[-2:]))


@contextlib.contextmanager
def _mirrored(
    settings: Tracker,
    folder: Path,
    job_type: str,
    name: str,
    tags: Sequence[str],
    content: Mapping[str, Any],
    id_: str | None = None,
) -> Iterator[Any]:
    """A W&B run, or None when there is to be none or none can be had."""
    mode: str = settings.mode if settings.mode != "auto" else os.environ.get("WANDB_MODE") or _auto()
    if mode not in ("online", "offline"):
        yield None
        return
    said = {"group": settings.group, "job_type": job_type, "name": name, "tags": tags, "config": content,
            "notes": settings.notes, "project": settings.project, "entity": settings.entity,
            "id": id_}  # fmt: skip
    run, code = _start(settings.timeout, folder, "online" if mode == "online" else "offline", said), 1
    try:
        yield run
        code = 0
    finally:
        if run is not None:
            with contextlib.suppress(Exception):
                run.finish(exit_code=code)
            _say_where(run)


def _start(timeout: int, folder: Path, mode: Literal["online", "offline"], said: Mapping[str, Any]) -> Any:
    """wandb.init that cannot ask, cannot hang and cannot fail: online falls back to offline, offline to nothing."""
    import wandb

    try:
        return wandb.init(
            mode=mode,
            dir=str(folder),
            # a sync of an offline segment that says `resume` appends it to what the server has of earlier ones
            resume="allow" if mode == "online" and said["id"] else None,
            settings=wandb.Settings(
                init_timeout=timeout,
                finish_timeout=4 * timeout,
                reinit="create_new",  # the default returns the run that a crashed job left open
                console="off",
                silent=True,
                **dashboard.settings(),
            ),
            **said,
        )
    except Exception as error:
        after = "; it is kept offline" if mode == "online" else "; this run is not mirrored"
        log.warning("W&B (%s): %s%s", mode, first_line(error), after)
        return _start(timeout, folder, "offline", said) if mode == "online" else None


def _auto() -> Literal["online", "offline"]:
    """Online when a key is configured, offline otherwise; the user is never asked."""
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    base = os.environ.get("WANDB_BASE_URL")
    hosts = {urlparse(base).hostname} if base else {"api.wandb.ai", "api.forge.coreweave.com"}
    path = os.environ.get("NETRC") or next((p for n in (".netrc", "_netrc") if (p := Path.home() / n).exists()), None)
    with contextlib.suppress(OSError, netrc.NetrcParseError, TypeError):
        if path and hosts & set(netrc.netrc(str(path)).hosts):
            return "online"
    return "offline"


def _say_where(run: Any) -> None:
    with contextlib.suppress(Exception):
        if not run.offline:
            log.info("W&B      %s", run.url)
        else:
            place = console.place(Path(run.dir).parent)
            log.info("W&B      offline; to see it: wandb leet %s; to upload it: wandb sync %s", place, place)
