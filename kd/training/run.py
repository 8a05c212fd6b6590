"""One run, from a checked configuration to its directory: data, teacher, student, training, evaluation, record."""

import logging
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kd import data, models
from kd.config.schema import Config, absolute, file_digest, run_dir
from kd.core import console, locks
from kd.core.errors import DivergedError, PrunedError, UserError, first_line
from kd.core.interleave import RunCache, run_to_completion
from kd.core.rng import seeded
from kd.core.settings import flatten
from kd.data import Data
from kd.data.batch import Batch
from kd.data.loader import misalign_batch
from kd.methods import MethodContext
from kd.models import ModelOutput
from kd.runs import directory, schema
from kd.training import metrics, teacher, teacher_cache, tracking
from kd.training.checkpoint import Checkpoints
from kd.training.device import Device, resolve
from kd.training.environment import numerics
from kd.training.finalize import RunComponents, measure, save_result
from kd.training.loop import TrainingState, train
from kd.training.teacher import Teacher, TeacherForward
from kd.training.teacher_cache import TeacherCache, TeacherCacheSpec

log = logging.getLogger(__name__)


def run(
    config: Config,
    title: str = "student",
    tell: Callable[..., bool] | None = None,
    shared: RunCache | None = None,
    single: bool = False,
) -> dict[str, Any]:
    """Train, evaluate and record what `config` says, unless that was done before; return the content of result.json.

    A run that was interrupted goes on from its last checkpoint. `tell("epoch", row)` is called after each epoch of the
    student; its answer True ends the run. `shared` keeps images and teacher for the next run of this process. A signal
    that ends the process waits for the end of a step, and for a checkpoint. `single`: see kd.training.tracking.open.
    **Raises:** UserError for what a user can mend; DivergedError when the loss is not finite; PrunedError.
    """
    shared = shared or RunCache()
    try:
        with shared.signals.installed():
            return run_to_completion(steps(config, title, tell, shared, single=single))
    finally:
        shared.forget("step/")


def steps(
    config: Config,
    title: str,
    tell: Callable[..., bool] | None,
    shared: RunCache,
    packed: int = 1,
    single: bool = False,
) -> Generator[None, None, dict[str, Any]]:
    """`run`, a step at a time, so that several can go in turn (`packed`: how many do)."""
    check_single_seed(config)
    folder, root = run_dir(config), config.root
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _run_lock(folder, title, shared):
        found = directory.load_result(folder)
        if found is not None and not root.rerun:
            Checkpoints(folder).clear()  # of a process that was killed at its very end
            notice = {"notice": title == "student"}
            log.info(
                "%s: found in %s (rerun=true trains it again)",
                title,
                console.display_path(folder),
                extra=notice,
            )
            if single:
                tracking.republish(config, folder, found)
            return found
        if root.rerun:
            directory.archive_previous_run(folder)
        check_resume_compatible(config)
        cache = absolute(root.paths.cache)
        device = resolve(root.device, root.precision, cache, root.kernels == "auto", root.compile)
        kept = directory.RunDirectory(folder, config.to_dict())
        try:
            with kept.running():
                same = config.data, config.description, cache, device.torch
                images = shared.get_or_create(
                    "images", same, lambda: data.load(*same), "teacher", "step/"
                )
                result = yield from _distill(
                    config, kept, images, device, title, tell, shared, packed, single
                )
        except (Exception, KeyboardInterrupt) as error:
            shared.forget("teacher")  # whatever happened to it is over with this run
            states = {DivergedError: "diverged", PrunedError: "pruned", KeyboardInterrupt: "killed"}
            kept.mark_ended(
                next((name for kind, name in states.items() if isinstance(error, kind)), "failed"),
                error,
            )
            raise
        Checkpoints(folder).clear()
        return result


def check_single_seed(config: Config) -> None:
    """Refuse the configuration of several runs. **Raises:** UserError."""
    if config.root.seeds is not None:
        remedy = "they need -m, without hydra.mode=RUN, and hydra/sweeper=grid or optuna"
        raise UserError(f"seeds: several seeds are several runs; {remedy}")


def check_resume_compatible(config: Config) -> None:
    """A run that was interrupted goes on as it began, or not at all. **Raises:** UserError, which says what differs.

    Most keys name another run, with a directory of its own. This is for those that do not, and yet change its numbers.
    """
    check_single_seed(config)
    folder = run_dir(config)
    if config.root.rerun or not Checkpoints(folder).exists() or directory.load_result(folder):
        return
    said, _ = schema.read_record(schema.Config, folder / "config.yaml")
    if said is None:
        return
    began, now = flatten(said), flatten(config.to_dict())
    differ = [
        key for key in ("device", "kernels", "compile", "threads") if began.get(key) != now[key]
    ]
    if differ:
        said = ", ".join(f"{key}={began.get(key)} then and {key}={now[key]} now" for key in differ)
        where = console.display_path(folder)
        raise UserError(
            f"{differ[0]}: the run in {where} was interrupted with {said}; give the same, or rerun=true"
        )


@contextmanager
def _run_lock(folder: Path, title: str, shared: RunCache) -> Iterator[None]:
    """One process has a run; who wants the same waits, and then finds it."""
    path, waiting = (
        folder.with_name(f".{folder.name}.lock"),
        f"{title}: waiting for the process that trains it",
    )
    # of others in this process, which may be between two steps
    with locks.hold(path, waiting, patience=0, pause=shared.signals.raise_if_requested):
        yield


def _build_components(
    config: Config, images: Data, device: Device, shared: RunCache
) -> RunComponents:
    seed = config.root.seed
    tutor = _teacher(config, images, device, shared) if config.needs_teacher else None
    with seeded(seed, "student"):
        student = device.prepare_module(
            models.build(config.student, len(images.classes), images.size)
        )
    taught_by = tutor.net if tutor else None
    if config.labels < 1:
        given = images, config.labels, config.needs_teacher
        images = shared.get_or_create(
            f"step/labels/{seed}",
            given,
            lambda: data.keep_label_fraction(images, config.labels, seed, config.needs_teacher),
        )
    shapes = taught_by.shapes(images.size) if taught_by else {}
    labels = torch.full((images.samples,), -1)
    labels[images.train.index.cpu()] = images.train.targets.cpu()
    spec = MethodContext(
        student.shapes(images.size),
        shapes,
        len(images.classes),
        images.samples,
        student,
        taught_by,
        config.epochs,
        labels,
    )
    with seeded(seed, "method"):
        method = device.prepare_module(config.method_class(config.method, spec))
    teach = _teacher_cache(config, tutor, images, method, device) if tutor else None
    if config.misaligned:
        log.warning(
            "teacher.outputs=misaligned: every image is taught, on purpose, with another image's outputs"
        )
    return RunComponents(images, device, tutor, student, method, teach)


def _distill(
    config: Config,
    kept: directory.RunDirectory,
    images: Data,
    device: Device,
    title: str,
    tell: Callable[..., bool] | None,
    shared: RunCache,
    packed: int,
    single: bool,
) -> Generator[None, None, dict[str, Any]]:
    parts = _build_components(config, images, device, shared)
    state = TrainingState(parts.student, parts.method, config.root.optimizer)
    checkpoints = Checkpoints(kept.folder, *config.root.checkpoint.model_dump().values())
    began = _restore_checkpoint(checkpoints, state, kept, device, title)
    started, clock = time.monotonic(), EpochTimer(began["clock"])

    def save() -> None:
        seconds = began["seconds"] + time.monotonic() - started
        more = {
            "rows": kept.rows,
            "clock": clock.seconds,
            "seconds": seconds,
            "numerics": numerics(device),
        }
        if checkpoints.save(
            state.epoch, state.step, {**state.dump(), **more, "resumed": began["resumed"]}
        ):
            log.debug("%s: checkpoint after epoch %d and %d steps", title, state.epoch, state.step)

    with tracking.open(config, kept.folder, title, single) as mirror, shared.signals.deferring():
        for row in kept.rows:
            mirror.log_epoch(row)
        stop = [tell("epoch", row) for row in kept.rows] if tell else []
        rows = _rows(config, parts, state, clock, shared)
        for new in console.log_progress(title, rows, config.epochs, kept.rows):
            if new is not None:
                kept.append_epoch(new)
            if checkpoints.due(state.epoch, state.step) or shared.signals.pending:
                save()
            if new is not None:
                mirror.log_epoch(new)
                stop = [tell("epoch", new)] if tell else []
            shared.signals.raise_if_requested()
            if stop and stop[-1]:
                raise PrunedError(f"stopped after epoch {kept.rows[-1]['epoch']} by its search")
            if new is None:
                try:
                    yield
                except KeyboardInterrupt:
                    save()
                    raise
        if parts.tutor and parts.teach:
            try:
                parts.tutor.guard.check()
            except RuntimeError:
                parts.teach.discard()
                raise
        seconds = began["seconds"] + time.monotonic() - started
        times = {"train_seconds": seconds, "packed": packed, "resumed": began["resumed"]}
        result, logits = measure(config, kept.rows, parts, times)
        mirror.finish(result, images, logits)
        save_result(config, kept, parts, result)
        mirror.log_weights(config, kept.folder, result)
    return result


class EpochTimer:
    """The seconds of an epoch. While other runs have their turn it stands still."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.started_at = seconds, time.monotonic()

    def start(self) -> None:
        self.started_at = time.monotonic()

    def stop(self) -> float:
        self.seconds += time.monotonic() - self.started_at
        return self.seconds


def _rows(
    config: Config, parts: RunComponents, state: TrainingState, clock: EpochTimer, shared: RunCache
) -> Iterator[dict[str, Any] | None]:
    """The training, with what is known of the validation images after each epoch."""
    root, images, method, teach = config.root, parts.images, parts.method, parts.teach

    def said(batch: Batch) -> ModelOutput:
        assert teach is not None
        if config.misaligned:
            batch = misalign_batch(
                batch, images.train, root.seed, config.data.augment, method.views
            )
        asked = root.seed, method.views, method.mixed, len(batch.x), batch.epoch, config.misaligned
        same = (
            images,
            teach.spec.folder,
            method.teacher_taps,
            asked,
        )  # the folder is named by all that it depends on
        return shared.get_or_create(f"step/teacher/{root.seed}", same, lambda: teach(batch))

    def validate() -> dict[str, float]:
        if images.val is None:
            return {}
        logits = metrics.predict(method.deploy(parts.student), images.val, parts.device)
        found = metrics.metrics(
            logits, images.val.targets, parts.tutor.val_logits if parts.tutor else None
        )
        return {f"val_{name}": value for name, value in found.items()}

    clock.start()
    for row in train(
        state,
        said if teach else None,
        images.train,
        config.data.augment,
        root.schedule,
        config.epochs,
        root.batch_size,
        root.seed,
        parts.device,
        shared,
    ):
        spent = clock.stop()
        if row is not None:
            speed = images.train.batches(root.batch_size) * root.batch_size / max(spent, 1e-9)
            clock.start()
            row = {**row, **validate(), "seconds": clock.stop(), "images_per_second": speed}
            clock.seconds = 0.0
        yield row
        clock.start()


def _restore_checkpoint(
    checkpoints: Checkpoints,
    state: TrainingState,
    kept: directory.RunDirectory,
    device: Device,
    title: str,
) -> dict[str, Any]:
    """Take up the run where its last checkpoint left it, if there is one. **Raises:** UserError when it cannot."""
    found = checkpoints.load()
    if found is None:
        return {"clock": 0.0, "seconds": 0.0, "resumed": 0}
    now, was, where = numerics(device), found["numerics"], console.display_path(kept.folder)
    for what in ("device", "precision", "kernels"):
        if was[what] != now[what]:
            said = f"{what} {was[what]}, here it is {now[what]}"
            raise UserError(
                f"{what}: the run in {where} was interrupted with {said}; go on there, or rerun=true"
            )
    if was != now:
        said = ", ".join(f"{k} {v} (now {now[k]})" for k, v in was.items() if v != now[k])
        log.warning(
            "%s was interrupted with %s: its last bits may differ from those of a whole run",
            where,
            said,
        )
    try:
        state.load(found)
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        what = first_line(error)
        raise UserError(
            f"rerun: the checkpoint in {where} does not fit ({what}); rerun=true begins anew"
        ) from error
    kept.write_history(found["rows"])
    what = "%s: goes on after epoch %d and %d steps, from %s"
    log.info(what, title, state.epoch, state.step, where, extra={"notice": True})
    return {**found, "resumed": found["resumed"] + 1}


def _teacher(config: Config, images: Data, device: Device, shared: RunCache) -> Teacher:
    """Find or train the teacher, say how good it is, and warn when it has nothing to teach."""
    if config.teacher_settings.checkpoint is not None:
        found = [
            _load_teacher(
                config,
                images,
                device,
                shared,
                Path(config.teacher_settings.checkpoint).expanduser(),
                None,
            )
        ]
    else:
        found = []
        for one in config.as_teachers():
            kind = f"teacher {len(found) + 1}" if config.teacher_settings.members > 1 else "teacher"
            try:
                trained = run_to_completion(steps(one, kind, None, shared))
            except DivergedError as error:
                raise DivergedError(
                    f"the teacher's {error}".replace("optimizer.lr", "teacher.optimizer.lr")
                ) from error
            source = run_dir(one) / "student.safetensors"
            found.append(_load_teacher(config, images, device, shared, source, trained, len(found)))
    tutor = found[0]
    if len(found) > 1:
        same = images, tuple(one.net for one in found), config.teacher_settings.mean
        tutor = shared.get_or_create(
            "teacher/all",
            same,
            lambda: teacher.build_ensemble(found, config.teacher_settings.mean, images, device),
        )
    known = "  ".join(
        f"{split} {console.format_percent(tutor.metrics[f'{split}_accuracy'])}"
        for split in ("val", "test")
        if f"{split}_accuracy" in tutor.metrics
    )
    log.info("teacher %s: %s", config.teacher_name, known or "not measured yet (data.val_size=0)")
    standard = directory.load_result(run_dir(config.as_standard()))
    for split in ("val", "test"):
        name = f"{split}_accuracy"
        if standard and name in standard["metrics"] and name in tutor.metrics:
            if standard["metrics"][name] >= tutor.metrics[name]:
                log.warning(
                    "this student trained without a teacher already reaches %s on %s: the teacher has nothing to add",
                    console.format_percent(standard["metrics"][name]),
                    split,
                )
            break
    return tutor


def _load_teacher(
    config: Config,
    images: Data,
    device: Device,
    shared: RunCache,
    source: Path,
    trained: Any,
    number: int = 0,
) -> Teacher:
    """A teacher from its weights, or the one that was loaded from them before."""
    same = images, source, file_digest(source), config.teacher, str(device)
    found: Teacher = shared.get_or_create(
        f"teacher/{number}",
        same,
        lambda: teacher.load(config, images, device, source, trained),
        "teacher/all",
    )
    return found


def _teacher_cache(
    config: Config, tutor: Teacher, images: Data, method: Any, device: Device
) -> TeacherCache:
    """What the teacher says, kept beside it (or, of a file of the user's own, in the cache)."""
    live, wanted = (
        TeacherForward(tutor.net, method.teacher_taps, device),
        config.teacher_settings.store,
    )
    weights = [Path(source) for source in tutor.sources]
    beside = (
        weights[0].parent
        if config.teacher_settings.checkpoint is None
        else absolute(config.root.paths.cache)
    )
    augment, content = config.data.augment, config.description.fingerprint
    digest = "+".join(map(file_digest, weights)) + (
        f" {config.teacher_settings.mean}" if len(weights) > 1 else ""
    )
    name = teacher_cache.key(
        digest, config.teacher, content, images.train, augment, device, method.mixed
    )
    small = (
        len(images.train) * augment.views * images.size**2 < 1e10
    )  # pixels to look at: seconds on a GPU
    whole = wanted.fill == "whole" or (
        wanted.fill == "auto" and device.torch.type == "cuda" and small
    )
    place = TeacherCacheSpec(
        beside / "outputs" / name, wanted.gigabytes, wanted.maps, whole and not method.mixed
    )
    return TeacherCache(
        live, images.train, augment, config.root.seed, method.views, place, method.mixed
    )
