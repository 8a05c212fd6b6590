"""Logging to Weights & Biases, as a copy of the run's own files. W&B errors never stop training."""

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
from kd.config.schema import Config
from kd.core.errors import DivergedError, PrunedError, first_line
from kd.core.execution import TrackerSettings
from kd.core.io import read_json, write_json
from kd.core.wandb_names import shorten_name
from kd.data import Data
from kd.runs.directory import read_history
from kd.training import artifacts, dashboard, wandb_run

log = logging.getLogger(__name__)

GROUP = "wandb.json"  # in a sweep's directory


class WandbRun:
    """Sends epochs, results and weights to one W&B run.

    After the first error it logs one warning and sends nothing more.

    Args:
        run: The W&B run, or None to send nothing.
        settings: The configuration keys `tracker.*`.
    """

    def __init__(self, run: Any = None, settings: TrackerSettings | None = None):
        self.run = run
        self.settings = settings
        self.logged_rows: list[Mapping[str, Any]] = []

    def log_epoch(self, row: Mapping[str, Any]) -> None:
        """Log a row of the history.

        `epoch` is the step; the keys `val_*` become `val/*`, and all others `train/*`.
        """
        self.logged_rows.append(row)
        named = {
            f"val/{n[4:]}" if n.startswith("val_") else f"train/{n}": v
            for n, v in row.items()
            if n != "epoch"
        }
        # earlier epochs are on the server already, from before an interruption
        if row["epoch"] >= getattr(self.run, "starting_step", 0):
            self.send(lambda run: run.log({"epoch": row["epoch"], **named}, step=row["epoch"]))
            self.send(lambda run: run.summary.update(dashboard.best(self.logged_rows)))

    def finish(self, result: Mapping[str, Any], data: Data, logits: Tensor) -> None:
        """Log the summary, and the confusion matrix and example predictions of the test images.

        Args:
            result: Content of the run's `result.json`.
            data: The data set.
            logits: The student's logits of the test images, [n, classes].
        """
        self.send(lambda run: run.summary.update(dashboard.summary(result)))
        self.log(lambda: {"test/confusion": dashboard.confusion_matrix(data, logits)})
        if self.settings and self.settings.samples:
            count = self.settings.samples
            self.log(lambda: {"test/samples": dashboard.samples(data, logits, count)})

    def log_weights(self, config: Config, folder: Path, result: Mapping[str, Any]) -> None:
        """Log the weights of a finished run and of its teachers, if `tracker.artifacts` is set."""
        if self.settings and self.settings.artifacts:
            self.send(lambda run: artifacts.log(run, config, folder, result))

    def alert(self, error: BaseException, folder: Path) -> None:
        """Send an alert that the run diverged or failed; none if a user or a search stopped it."""
        if isinstance(error, Exception) and not isinstance(error, PrunedError):
            title = "Run diverged" if isinstance(error, DivergedError) else "Run failed"
            text = f"{folder.name}: {first_line(error)}\n\nfiles: {folder}"
            self.send(lambda run: run.alert(title, text, level="ERROR"))

    def log(self, make: Callable[[], Mapping[str, Any]]) -> None:
        """Log the values that `make()` returns; an error in `make` counts as an error of W&B."""
        self.send(lambda run: run.log(make()))

    def send(self, act: Callable[[Any], Any]) -> None:
        """Call `act(run)`, unless W&B is off or has failed before."""
        if self.run is None:
            return
        try:
            act(self.run)
        except Exception as error:
            log.warning("W&B: %s; logging to W&B stops, training continues", first_line(error))
            self.run = None


@contextlib.contextmanager
def open(config: Config, folder: Path, job_type: str, single: bool = False) -> Iterator[WandbRun]:
    """Log one run to W&B, and finish its W&B run at the end of the block.

    An error that leaves the block marks the W&B run as failed.

    A run that is resumed keeps its W&B id, and all its epochs must be logged again. Online, those
    that the server has are skipped. Offline, each segment contains all epochs from the first, so
    that syncing it replaces what was synced before; the segments of a killed process may be lost.
    At the end, earlier segments are moved to `superseded/`.

    Args:
        config: Configuration of the run.
        folder: Directory of the run.
        job_type: `student` or a name of a teacher.
        single: This is the only run of its command, to which W&B's variables for one run apply
            (WANDB_RUN_ID, WANDB_NAME).

    Yields:
        The object that logs to the W&B run; it sends nothing if there is no such run.
    """
    run_settings = _run_settings(config, folder, job_type, single)
    with wandb_run.started(config.tracker, folder, run_settings) as run:
        if run is not None:
            _write_run_id(run, run_settings, folder)
        tracker = WandbRun(run, config.tracker)
        tracker.send(dashboard.define_axes)
        try:
            yield tracker
        except BaseException as error:
            tracker.alert(error, folder)
            raise
    if run is None:
        return
    own = Path(run.dir).parent
    for segment in wandb_run.segments(own.parent, run.id):
        with contextlib.suppress(OSError):
            if segment != own:
                (own.parent / "superseded").mkdir(exist_ok=True)
                segment.rename(own.parent / "superseded" / segment.name)


def _write_run_id(run: Any, run_settings: wandb_run.RunSettings, folder: Path) -> None:
    """Write to `folder` which W&B run belongs to it, and where to find that."""
    record = {"id": run.id, **({"group": run_settings.group} if run_settings.group else {})}
    if run.offline:
        record["offline"] = os.path.relpath(Path(run.dir).parent, folder.absolute())
    elif run.url:
        record["url"] = run.url
    try:
        write_json(folder / "wandb.json", record)
    except OSError as error:
        log.warning(
            "W&B: %s; if this run is interrupted, it will resume as a new W&B run",
            first_line(error),
        )


def republish(config: Config, folder: Path, result: Mapping[str, Any]) -> None:
    """Log a run finished earlier to the W&B run that a sweep agent created, if there is one.

    Args:
        config: Configuration of the run.
        folder: Directory of the run.
        result: Content of the run's `result.json`.
    """
    trial = wandb_env.agent_trial()
    if trial is None:
        return
    run_settings = _run_settings(config, folder, "student", single=True)
    with wandb_run.started(config.tracker, folder, run_settings) as run:
        _log_rows(run, read_history(folder), dashboard.summary(result))


def report_trial(
    settings: TrackerSettings,
    folder: Path,
    results: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Log the means over the seeds of one setting to the W&B run of the agent, if there is one.

    Args:
        settings: The configuration keys `tracker.*`.
        folder: Directory of the sweep.
        results: The results of the setting's runs.
        rows: The history of their means.
    """
    trial = wandb_env.agent_trial()
    if trial is None or not results:
        return
    if trial.sweep_id is None:
        log.warning("W&B: WANDB_RUN_ID=%s is ignored: this command has several runs", trial.run_id)
        return
    seeds = [result["seed"] for result in results]
    config = {**results[0]["config"], "seeds": seeds}
    config.pop("seed", None)
    name = f"{results[0]['method']}-{results[0]['student']}-{len(seeds)}-seeds"
    run_settings = wandb_run.RunSettings(
        name=shorten_name("name", name),
        job_type="trial",
        group=settings.group or group(folder),
        tags=_tags(settings, str(results[0]["method"])),
        notes=dashboard.notes(settings.notes, folder, folder),
        config=config,
        id=trial.run_id,
        trial=trial,
    )
    with wandb_run.started(settings, folder, run_settings) as run:
        _log_rows(run, rows, _mean([dashboard.summary(result) for result in results]))


def report_sweep(
    settings: TrackerSettings,
    folder: Path,
    tables: Mapping[str, Any],
    figures: Sequence[Path],
    text: str,
) -> None:
    """Log a sweep's tables, figures and verdict as an extra run in the group of its runs.

    Args:
        settings: The configuration keys `tracker.*`.
        folder: Directory of the sweep.
        tables: Data frames by name.
        figures: Image files.
        text: The sweep's conclusion in words.
    """
    run_settings = wandb_run.RunSettings(
        name=shorten_name("name", os.environ.get("WANDB_NAME") or "sweep-summary"),
        job_type="sweep-summary",
        group=settings.group or group(folder),
        tags=settings.tags or [],
        notes=dashboard.notes(settings.notes, folder, folder, text),
    )
    with wandb_run.started(settings, folder, run_settings) as run:
        tracker = WandbRun(run)
        for name, table in tables.items():
            tracker.log(lambda table=table, name=name: {name: dashboard.table(table)})  # type: ignore[misc]
        for path in figures:
            tracker.log(lambda path=path: {f"figures/{path.stem}": dashboard.picture(path)})  # type: ignore[misc]


def group(folder: Path) -> str:
    """Return the name of the W&B group for the runs of the sweep in `folder`; see `name_group`."""
    record = read_json(folder / GROUP)
    if isinstance(record, dict) and "group" in record:
        return str(record["group"])
    return shorten_name("group", "-".join(folder.parts[-2:]))


def name_group(folder: Path, jobs: Sequence[Mapping[str, Any]]) -> None:
    """Choose the name of the W&B group for the sweep in `folder`, and write it there.

    The name depends on the study of a search, or else on the jobs, so that the same sweep has the
    same name wherever and whenever it is started again.
    """
    study = read_json(folder / "study.json")
    if isinstance(study, dict) and "study" in study:
        name = f"search-{study['study']}"
    else:
        ids = sorted({job["id"] for job in jobs})
        digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:8]
        methods = list(dict.fromkeys(job["config"]["method"]["name"] for job in jobs))
        more = f"-and-{len(methods) - 4}-more" if len(methods) > 4 else ""
        name = f"{'-'.join(methods[:4])}{more}-{digest}"
    write_json(folder / GROUP, {"group": shorten_name("group", name)})


def _run_settings(
    config: Config, folder: Path, job_type: str, single: bool
) -> wandb_run.RunSettings:
    """Return the identity of a run on W&B.

    Its id is the one given by the agent, else the one that the run had before, else a new one.
    """
    settings = config.tracker
    record = read_json(folder / "wandb.json")
    record = record if isinstance(record, dict) else {}
    trial = wandb_env.agent_trial() if single else None
    run_id = trial.run_id if trial else record.get("id")
    name = os.environ.get("WANDB_NAME") if single else None
    job_type_override = os.environ.get("WANDB_JOB_TYPE") if job_type == "student" else None
    return wandb_run.RunSettings(
        name=shorten_name("name", name or config.run_name()),
        job_type=job_type_override or job_type,
        group=settings.group
        or record.get("group")
        or (group(config.sweep) if config.sweep else None),
        tags=_tags(settings, config.method.name),
        notes=dashboard.notes(settings.notes, folder, config.sweep),
        config={**config.to_dict(), "run_id": config.identity()},
        id=str(run_id or secrets.token_hex(6)),
        resume=run_id is not None and run_id == record.get("id"),
        trial=trial,
    )


def _tags(settings: TrackerSettings, method: str) -> list[str]:
    """Return the user's tags and the method, without duplicates."""
    return list(dict.fromkeys([*(settings.tags or []), shorten_name("tag", method)]))


def _log_rows(run: Any, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    """Log the history and the summary of a finished run."""
    tracker = WandbRun(run)
    tracker.send(dashboard.define_axes)
    for row in rows:
        tracker.log_epoch(row)
    tracker.send(lambda run: run.summary.update(summary))


def _mean(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means of numbers, and other values if they are equal in all summaries."""
    means: dict[str, Any] = {}
    for name, first in summaries[0].items():
        values = [summary.get(name) for summary in summaries]
        if isinstance(first, int | float) and all(
            isinstance(value, int | float) for value in values
        ):
            means[name] = sum(values) / len(values)  # type: ignore[arg-type]
        elif all(value == first for value in values):
            means[name] = first
    return means
