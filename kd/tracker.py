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

from kd import console
from kd.config import Config, Tracker
from kd.data import Data
from kd.evaluate import confusion
from kd.files import read_json, write_json
from kd.settings import first_line

log = logging.getLogger(__name__)


class Mirror:
    """Sends what it is told to one W&B run. After the first error it says so, once, and falls silent."""

    def __init__(self, run: Any = None):
        self.run = run

    def epoch(self, row: Mapping[str, Any]) -> None:
        """One row of history: `epoch` is the step; val_* become val/*, all else train/*."""
        named = {f"val/{n[4:]}" if n.startswith("val_") else f"train/{n}": v for n, v in row.items() if n != "epoch"}
        if row["epoch"] >= getattr(self.run, "starting_step", 0):  # else the server has it, from before an interruption
            self.send(lambda run: run.log({"epoch": row["epoch"], **named}, step=row["epoch"]))

    def finish(self, result: Mapping[str, Any], data: Data, logits: Tensor) -> None:
        """The summary, the confusion matrix of the test images, and 32 of them with what the student said."""
        self.send(lambda run: run.summary.update(_summary(result)))
        self.log(lambda: {"test/confusion": _confusion(data, logits)})
        self.log(lambda: {"test/samples": _samples(data, logits)})

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
    tags = [*config.root.tracker.tags, config.method.name]
    content = {**config.plain(), "run_id": config.identity()}
    known = read_json(folder / "wandb.json")
    id_ = str(known["id"]) if isinstance(known, dict) and "id" in known else secrets.token_hex(6)
    with _mirrored(config.root.tracker, folder, job_type, config.label(), tags, content, id_) as run:
        if run is not None:
            write_json(folder / "wandb.json", {"id": id_})
        yield Mirror(run)
    for segment in (folder / "wandb").glob(f"*run-*-{id_}*"):  # two of one second have another ending
        with contextlib.suppress(Exception):
            if run is None or segment == Path(run.dir).parent:
                continue
            (folder / "wandb" / "superseded").mkdir(exist_ok=True)
            segment.rename(folder / "wandb" / "superseded" / segment.name)


def sweep(settings: Tracker, folder: Path, tables: Mapping[str, Any], figures: Sequence[Path], text: str) -> None:
    """One run beside a sweep's own, in its group, that holds the sweep's tables, figures and verdict."""
    settings = settings.model_copy(update={"group": settings.group or group(folder), "notes": text})
    with _mirrored(settings, folder, "sweep-summary", "sweep-summary", settings.tags, {}) as run:
        mirror = Mirror(run)
        for name, table in tables.items():
            mirror.log(lambda table=table, name=name: {name: _table(table)})  # type: ignore[misc]
        for path in figures:
            mirror.log(lambda path=path: {f"figures/{path.stem}": _picture(path)})  # type: ignore[misc]


def group(folder: Path) -> str:
    """The name under which W&B gathers the runs of the sweep in `folder`."""
    return "-".join(folder.parts[-2:])


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
                disable_git=True,
                disable_code=True,
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


def _summary(result: Mapping[str, Any]) -> dict[str, Any]:
    found = {name.replace("_", "/", 1): value for name, value in result["metrics"].items()}
    found |= {f"size/{name}": value for name, value in result["size"].items()}
    if result["teacher"]:
        found |= {f"teacher/{name}": value for name, value in result["teacher"]["metrics"].items()}
    return {**found, "train_seconds": result["time"]["train_seconds"], "student": result["student"]}


def _confusion(data: Data, logits: Tensor) -> Any:
    import wandb

    counts = confusion(logits, data.test.targets, len(data.classes))
    rows: Any = [[t, p, counts[i][j]] for i, t in enumerate(data.classes) for j, p in enumerate(data.classes)]
    table = wandb.Table(columns=["Actual", "Predicted", "nPredictions"], data=rows)
    fields = {str(name): str(name) for name in table.columns}
    return wandb.plot_table("wandb/confusion_matrix/v1", table, fields, {"title": "Test images"})


def _samples(data: Data, logits: Tensor, count: int = 32) -> list[Any]:
    import wandb

    step = max(1, len(data.test) // count)
    found = []
    for place in range(0, step * min(count, len(data.test)), step):
        row = int(data.test.index[place])
        said, true = (data.classes[int(i)] for i in (logits[place].argmax(), data.test.labels[row]))
        mark = "" if said == true else "  ✗"
        found.append(wandb.Image(data.test.images[row].cpu().numpy(), caption=f"{true} → {said}{mark}"))
    return found


def _table(frame: Any) -> Any:
    import wandb

    return wandb.Table(dataframe=frame.astype(object).where(frame.notna(), None))


def _picture(path: Path) -> Any:
    import wandb

    return wandb.Image(str(path))
