"""One run, from a checked configuration to its directory: data, teacher, student, training, evaluation, record."""

import logging
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import save_file

from kd import console, data, evaluate, models, outputs, record, store, teacher, tracker
from kd.config import Config, file_digest, model_name
from kd.data import Data
from kd.device import Device, resolve
from kd.methods import Batch, Spec
from kd.models import Out
from kd.outputs import Outputs, Place
from kd.pack import Shared, alone
from kd.seeds import seeded
from kd.teacher import Live, Teacher
from kd.train import DivergedError, train

log = logging.getLogger(__name__)


class PrunedError(Exception):
    """Whoever watches the run found that it is not worth going on."""


def run(
    config: Config,
    title: str = "student",
    tell: Callable[..., bool] | None = None,
    shared: Shared | None = None,
) -> dict[str, Any]:
    """Train, evaluate and record what `config` says, unless that was done before; return the content of result.json.

    `tell("epoch", row)` is called after each epoch of the student; its answer True ends the run. `shared` keeps images
    and teacher for the next run of this process.
    **Raises:** UserError for what a user can mend; DivergedError when the loss is not finite; PrunedError.
    """
    shared = shared or Shared()
    try:
        return alone(steps(config, title, tell, shared))
    finally:
        shared.forget("step/")


def steps(
    config: Config, title: str, tell: Callable[..., bool] | None, shared: Shared, packed: int = 1
) -> Generator[None, None, dict[str, Any]]:
    """`run`, a step at a time, so that several can go in turn (`packed`: how many do)."""
    folder = folder_of(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder, title):
        found = record.finished(folder)
        if found is not None and not config.root.rerun:
            log.info("%s: found in %s (rerun=true trains it again)", title, console.place(folder))
            return found
        if found is not None:
            record.set_aside(folder)
        cache = _path(config.root.paths.cache)
        root = config.root
        device = resolve(root.device, root.precision, cache, root.kernels == "auto", root.compile)
        kept = record.Record(folder, config.plain())
        try:
            with kept.running():
                same = config.data, config.described, cache, device.torch
                images = shared.last("images", same, lambda: data.load(*same), "teacher", "step/")
                return (yield from _distill(config, kept, images, device, title, tell, shared, packed))
        except (Exception, KeyboardInterrupt) as error:
            shared.forget("teacher")  # whatever happened to it is over with this run
            states = {DivergedError: "diverged", PrunedError: "pruned", KeyboardInterrupt: "killed"}
            kept.ended(next((name for kind, name in states.items() if isinstance(error, kind)), "failed"), error)
            raise


@contextmanager
def _alone(folder: Path, title: str) -> Iterator[None]:
    """One process has a run; who wants the same waits, and then finds it. The lock ends with its process."""
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s: waiting for the process that trains it", title)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def folder_of(config: Config) -> Path:
    """Where a run with this configuration is kept."""
    return _path(config.root.paths.runs) / config.label()


def _path(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _distill(
    config: Config,
    kept: record.Record,
    images: Data,
    device: Device,
    title: str,
    tell: Callable[..., bool] | None,
    shared: Shared,
    packed: int,
) -> Generator[None, None, dict[str, Any]]:
    seed = config.root.seed
    tutor = _teacher(config, images, device, shared) if config.needs_teacher else None

    with seeded(seed, "student"):
        student = device.place(models.build(config.student, len(images.classes), images.size))
    taught_by = tutor.net if tutor else None
    shapes = taught_by.shapes(images.size) if taught_by else {}
    spec = Spec(student.shapes(images.size), shapes, len(images.classes), images.samples, taught_by)
    with seeded(seed, "method"):
        method = device.place(config.method_class(config.method, spec))

    teach = _outputs(config, tutor, images, method, device) if tutor else None

    def said(batch: Batch) -> Out:
        assert teach is not None
        asked = seed, method.views, len(batch.x), batch.epoch
        same = images, config.teaching, config.teacher, method.teacher_taps, asked
        return shared.last(f"step/teacher/{seed}", same, lambda: teach(batch))

    def rows() -> Iterator[dict[str, Any] | None]:
        spent, begun = 0.0, time.time()  # while others have their turn the clock stands still
        for row in train(
            student, said if teach else None, method, images.train, config.data.augment, config.root.optimizer,
            config.root.schedule, config.epochs, config.root.batch_size, seed, device, shared,
        ):  # fmt: skip
            spent += time.time() - begun
            if row is None:
                yield None
                begun = time.time()
                continue
            speed = images.train.batches(config.root.batch_size) * config.root.batch_size / spent
            begun = time.time()
            found = validate()
            yield {**row, **found, "seconds": spent + time.time() - begun, "images_per_second": speed}
            spent, begun = 0.0, time.time()

    def validate() -> dict[str, float]:
        if images.val is None:
            return {}
        logits = evaluate.infer(method.deploy(student), images.val, device)
        found = evaluate.metrics(logits, images.val.targets, tutor.val_logits if tutor else None)
        return {f"val_{name}": value for name, value in found.items()}

    started = time.time()
    with tracker.open(config, kept.folder, title) as mirror:
        for row in console.watch(title, rows(), config.epochs):
            if row is None:
                yield
                continue
            kept.epoch(row)
            mirror.epoch(row)
            if tell and tell("epoch", row):
                raise PrunedError(f"stopped after epoch {row['epoch']}: other trials do better")
        if tutor and teach:
            try:
                tutor.guard.check()
            except RuntimeError:
                teach.discard()
                raise
        seconds = time.time() - started

        deployed = method.deploy(student)
        logits = evaluate.infer(deployed, images.test, device)  # the test images are read once, here
        taught = evaluate.infer(tutor.net, images.test, device) if tutor else None
        test = evaluate.metrics(logits, images.test.targets, taught)
        last = kept.rows[-1]
        result = {
            "id": config.identity(),
            "method": config.method.name,
            "student": model_name(config.student),
            "seed": seed,
            "epochs": config.epochs,
            "metrics": {f"test_{k}": v for k, v in test.items()} | {k: last[k] for k in last if k.startswith("val_")},
            "teacher": _about(config, tutor, taught, images),
            "reliability": evaluate.reliability(logits, images.test.targets),
            "size": evaluate.size(deployed, images.size) | {"method_params": evaluate.count(method.parameters())},
            "time": {
                "train_seconds": seconds,
                "packed": packed,  # runs that shared these seconds
                "epoch_seconds": [row["seconds"] for row in kept.rows],
                "images_per_second": sum(row["images_per_second"] for row in kept.rows) / len(kept.rows),
                "teacher_read": teach.known if teach else None,  # the part it need not compute
            },
            "content": config.described.fingerprint,
            "samples": {"train": len(images.train), "val": len(images.val or ()), "test": len(images.test)},
            "environment": record.environment(device),
            "config": config.plain(),
        }
        card = store.card(config.student.model_dump(), images.classes, images.size, images.train.mean, images.train.std)
        store.save(deployed, kept.folder / "student.safetensors", card)
        if extra := method.state_dict():
            save_file({k: v.cpu().contiguous() for k, v in extra.items()}, kept.folder / "method.safetensors")
        mirror.finish(result, images, logits)
        kept.finish(result)
    return result


def _teacher(config: Config, images: Data, device: Device, shared: Shared) -> Teacher:
    """Find or train the teacher, say how good it is, and warn when it has nothing to teach."""
    given, trained = config.teaching.checkpoint, None
    source = Path(given).expanduser() if given else folder_of(config.as_teacher()) / "student.safetensors"
    if given is None:
        try:
            trained = alone(steps(config.as_teacher(), "teacher", None, shared))
        except DivergedError as error:
            raise DivergedError(f"the teacher's {error}".replace("optimizer.lr", "teacher.optimizer.lr")) from error
    same = images, source, file_digest(source), config.teacher, str(device)
    found: Teacher = shared.last("teacher", same, lambda: teacher.load(config, images, device, source, trained))
    known = "  ".join(
        f"{split} {console.percent(found.metrics[f'{split}_accuracy'])}"
        for split in ("val", "test")
        if f"{split}_accuracy" in found.metrics
    )
    log.info("teacher %s: %s", model_name(config.teacher), known or "not measured yet (data.val_size=0)")
    standard = record.finished(folder_of(config.as_standard()))
    for split in ("val", "test"):
        name = f"{split}_accuracy"
        if standard and name in standard["metrics"] and name in found.metrics:
            if standard["metrics"][name] >= found.metrics[name]:
                log.warning(
                    "this student trained without a teacher already reaches %s on %s: the teacher has nothing to add",
                    console.percent(standard["metrics"][name]), split,
                )  # fmt: skip
            break
    return found


def _outputs(config: Config, tutor: Teacher, images: Data, method: Any, device: Device) -> Outputs:
    """What the teacher says, kept beside it (or, of a file of the user's own, in the cache)."""
    live, wanted, weights = Live(tutor.net, method.teacher_taps, device), config.teaching.store, Path(tutor.source)
    beside = weights.parent if config.teaching.checkpoint is None else _path(config.root.paths.cache)
    augment, content = config.data.augment, config.described.fingerprint
    name = outputs.key(file_digest(weights), config.teacher, content, images.train, augment, device)
    small = len(images.train) * augment.views * images.size**2 < 1e10  # pixels to look at: seconds on a GPU
    whole = wanted.fill == "whole" or (wanted.fill == "auto" and device.torch.type == "cuda" and small)
    place = Place(beside / "outputs" / name, wanted.gigabytes, wanted.maps, whole)
    return Outputs(live, images.train, augment, config.root.seed, method.views, place)


def _about(config: Config, tutor: Teacher | None, taught: Any, images: Data) -> dict[str, Any] | None:
    """What the result says of its teacher."""
    if tutor is None:
        return None
    measured = {f"test_{k}": v for k, v in evaluate.metrics(taught, images.test.targets).items()}
    size = evaluate.size(tutor.net, images.size)
    return {"name": model_name(config.teacher), "source": tutor.source, "metrics": tutor.metrics | measured, **size}


def summary(config: Config, result: dict[str, Any], folder: Path) -> list[str]:
    """The last lines of a run: teacher, student, how much of the gap was closed, where the files are."""
    accuracy = result["metrics"]["test_accuracy"]
    lines = []
    if result["teacher"]:
        tutor = result["teacher"]
        top = tutor["metrics"]["test_accuracy"]
        lines.append(f"teacher  {tutor['name']:<10} test {console.percent(top)}  {tutor['params']:,} parameters")
    lines.append(
        f"student  {result['student']:<10} test {console.percent(accuracy)}  {result['size']['params']:,} parameters"
        f"  (method={result['method']}, seed={result['seed']}, {result['epochs']} epochs)"
    )
    standard = record.finished(folder_of(config.as_standard()))
    if result["teacher"] and standard:
        base = standard["metrics"]["test_accuracy"]
        gap = f", {100 * (accuracy - base) / (top - base):.0f} % of its gap to the teacher closed" if top > base else ""
        lines.append(f"against  standard   test {console.percent(base)}  {100 * (accuracy - base):+.2f} points{gap}")
    elif result["teacher"]:
        lines.append("against  standard   not run yet: the same command with method=standard gives the baseline")
    return [*lines, f"files    {console.place(folder)}"]
