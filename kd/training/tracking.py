"""Weights & Biases, as a mirror: the truth is in the run's own files, and nothing here may stop a training."""

import contextlib
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kd.config import wandb_env
from kd.config.schema import Config, TrackerSettings
from kd.config.wandb_names import shorten_name
from kd.core.errors import DivergedError, PrunedError, first_line
from kd.core.io import read_json, write_json
from kd.data import Data
from kd.runs.directory import read_history
from kd.training import artifacts, dashboard, wandb_run

log = logging.getLogger(__name__)

GROUP = "wandb.json"  # in a sweep's directory


class WandbRun:
    """Sends what it is told to one W&B run. After the first error it says so, once, and falls silent."""

    def __init__(self, run: Any = None, settings: TrackerSettings | None = None):
        self.run, self.settings = run, settings
        self.logged_rows: list[Mapping[str, Any]] = []

    def log_epoch(self, row: Mapping[str, Any]) -> None:
        """One row of history: `epoch` is the step; val_* become val/*, all else train/*."""
        self.logged_rows.append(row)
        named = {
            f"val/{n[4:]}" if n.startswith("val_") else f"train/{n}": v
            for n, v in row.items()
            if n != "epoch"
        }
        if row["epoch"] >= getattr(
            self.run, "starting_step", 0
        ):  # else the server has it, from before an interruption
            self.send(lambda run: run.log({"epoch": row["epoch"], **named}, step=row["epoch"]))
            self.send(lambda run: run.summary.update(dashboard.best(self.logged_rows)))

    def finish(self, result: Mapping[str, Any], data: Data, logits: Tensor) -> None:
        """The summary, the confusion matrix of the test images, and some of them with the student's predictions."""
        self.send(lambda run: run.summary.update(dashboard.summary(result)))
        self.log(lambda: {"test/confusion": dashboard.confusion_matrix(data, logits)})
        if self.settings and self.settings.samples:
            count = self.settings.samples
            self.log(lambda: {"test/samples": dashboard.samples(data, logits, count)})

    def log_weights(self, config: Config, folder: Path, result: Mapping[str, Any]) -> None:
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
def open(config: Config, folder: Path, job_type: str, single: bool = False) -> Iterator[WandbRun]:
    """A mirror for one run; when the block ends the W&B run is finished, as failed if an error leaves the block.

    `single`: it is the one that its command is for, which W&B's variables for a run mean (WANDB_RUN_ID, WANDB_NAME).
    A run that goes on after an interruption keeps its W&B id, and is to be told all its epochs again: online those that
    the server has are passed over, and each offline segment holds all from the first (of a killed process nothing may
    be left), so that a sync of it replaces what was synced before. In the end the earlier ones go to superseded/.
    """
    about = _run_settings(config, folder, job_type, single)
    with wandb_run.started(config.root.tracker, folder, about) as run:
        if run is not None:
            _remember(run, about, folder)
        mirror = WandbRun(run, config.root.tracker)
        mirror.send(dashboard.define_axes)
        try:
            yield mirror
        except BaseException as error:
            mirror.alert(error, folder)
            raise
    if run is None:
        return
    own = Path(run.dir).parent
    for segment in wandb_run.segments(own.parent, run.id):
        with contextlib.suppress(OSError):
            if segment != own:
                (own.parent / "superseded").mkdir(exist_ok=True)
                segment.rename(own.parent / "superseded" / segment.name)


def _remember(run: Any, about: wandb_run.RunSettings, folder: Path) -> None:
    """Write down which W&B run is that of `folder`, and where it can be seen."""
    known = {"id": run.id, **({"group": about.group} if about.group else {})}
    if run.offline:
        known["offline"] = os.path.relpath(Path(run.dir).parent, folder.absolute())
    elif run.url:
        known["url"] = run.url
    try:
        write_json(folder / "wandb.json", known)
    except OSError as error:
        log.warning(
            "W&B: %s; if this run is interrupted, it will be another run on W&B", first_line(error)
        )


def republish(config: Config, folder: Path, result: Mapping[str, Any]) -> None:
    """Report a run that was finished before to the W&B run that a sweep's agent has created for it, if one has."""
    trial = wandb_env.agent_trial()
    if trial is None:
        return
    about = _run_settings(config, folder, "student", single=True)
    with wandb_run.started(config.root.tracker, folder, about) as run:
        _log_rows(run, read_history(folder), dashboard.summary(result))


def report_trial(
    settings: TrackerSettings,
    folder: Path,
    results: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Report one setting of a sweep to the W&B run of the agent that started it, if one did: means over its seeds.

    **Arguments:** `results` of the setting's runs; `rows`: the history of their means.
    """
    given = wandb_env.agent_trial()
    if given is None or not results:
        return
    if given.sweep_id is None:
        log.warning("W&B: WANDB_RUN_ID=%s is ignored: this command has several runs", given.run_id)
        return
    seeds = [result["seed"] for result in results]
    config = {**results[0]["config"], "seeds": seeds}
    config.pop("seed", None)
    about = wandb_run.RunSettings(
        name=shorten_name(
            "name", f"{results[0]['method']}-{results[0]['student']}-{len(seeds)}-seeds"
        ),
        job_type="trial",
        group=settings.group or group(folder),
        tags=_tags(settings, str(results[0]["method"])),
        notes=dashboard.notes(settings.notes, folder, folder),
        config=config,
        id=given.run_id,
        trial=given,
    )
    with wandb_run.started(settings, folder, about) as run:
        _log_rows(run, rows, _mean([dashboard.summary(result) for result in results]))


def report_sweep(
    settings: TrackerSettings,
    folder: Path,
    tables: Mapping[str, Any],
    figures: Sequence[Path],
    text: str,
) -> None:
    """One run beside a sweep's own, in its group, that holds the sweep's tables, figures and verdict."""
    about = wandb_run.RunSettings(
        name=shorten_name("name", os.environ.get("WANDB_NAME") or "sweep-summary"),
        job_type="sweep-summary",
        group=settings.group or group(folder),
        tags=settings.tags or [],
        notes=dashboard.notes(settings.notes, folder, folder, text),
    )
    with wandb_run.started(settings, folder, about) as run:
        mirror = WandbRun(run)
        for name, table in tables.items():
            mirror.log(lambda table=table, name=name: {name: dashboard.table(table)})  # type: ignore[misc]
        for path in figures:
            mirror.log(lambda path=path: {f"figures/{path.stem}": dashboard.picture(path)})  # type: ignore[misc]


def group(folder: Path) -> str:
    """The name under which W&B gathers the runs of the sweep in `folder`: see `name_group`."""
    known = read_json(folder / GROUP)
    if isinstance(known, dict) and "group" in known:
        return str(known["group"])
    return shorten_name("group", "-".join(folder.parts[-2:]))


def name_group(folder: Path, jobs: Sequence[Mapping[str, Any]]) -> None:
    """Name the group of the sweep in `folder`: by its study, if it searches, else by what its jobs are, so that the
    same sweep has the same name wherever and whenever it is started again."""
    study = read_json(folder / "study.json")
    if isinstance(study, dict) and "study" in study:
        name = f"search-{study['study']}"
    else:
        ids = sorted({job["id"] for job in jobs})
        digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:8]
        words = list(dict.fromkeys(job["config"]["method"]["name"] for job in jobs))
        first = "-".join(words[:4]) + (f"-and-{len(words) - 4}-more" if len(words) > 4 else "")
        name = f"{first}-{digest}"
    write_json(folder / GROUP, {"group": shorten_name("group", name)})


def _run_settings(
    config: Config, folder: Path, job_type: str, single: bool
) -> wandb_run.RunSettings:
    """What the W&B run of a run is called, and which it is: the agent's, the one it had before, or a new one."""
    settings, known = config.root.tracker, read_json(folder / "wandb.json")
    known = known if isinstance(known, dict) else {}
    given = wandb_env.agent_trial() if single else None
    id_ = given.run_id if given else known.get("id")
    name = os.environ.get("WANDB_NAME") if single else None
    kind = os.environ.get("WANDB_JOB_TYPE") if job_type == "student" else None
    return wandb_run.RunSettings(
        name=shorten_name("name", name or config.run_name()),
        job_type=kind or job_type,
        group=settings.group
        or known.get("group")
        or (group(config.sweep) if config.sweep else None),
        tags=_tags(settings, config.method.name),
        notes=dashboard.notes(settings.notes, folder, config.sweep),
        config={**config.to_dict(), "run_id": config.identity()},
        id=str(id_ or secrets.token_hex(6)),
        resume=id_ is not None and id_ == known.get("id"),
        trial=given,
    )


def _tags(settings: TrackerSettings, method: str) -> list[str]:
    return list(dict.fromkeys([*(settings.tags or []), shorten_name("tag", method)]))


def _log_rows(run: Any, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    mirror = WandbRun(run)
    mirror.send(dashboard.define_axes)
    for row in rows:
        mirror.log_epoch(row)
    mirror.send(lambda run: run.summary.update(summary))


def _mean(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers as their means, and what is no number where it is the same in all."""
    found: dict[str, Any] = {}
    for name, first in summaries[0].items():
        values = [summary.get(name) for summary in summaries]
        if isinstance(first, int | float) and all(
            isinstance(value, int | float) for value in values
        ):
            found[name] = sum(values) / len(values)  # type: ignore[arg-type]
        elif all(value == first for value in values):
            found[name] = first
    return found
