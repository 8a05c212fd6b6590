"""The teacher of a run: loaded or trained, checked, and given a cache for its outputs."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kd.config.schema import Config, absolute, file_digest, run_dir
from kd.core import console
from kd.core.errors import DivergedError
from kd.core.interleave import RunCache
from kd.data import Data
from kd.runs import directory
from kd.training import teacher, teacher_cache
from kd.training.device import Device
from kd.training.teacher import Teacher, TeacherForward
from kd.training.teacher_cache import TeacherCache, TeacherCacheSpec

log = logging.getLogger(__name__)

MANY_PIXELS = 1e10  # of all views of the training images; fewer take a GPU seconds

# Train the run of a configuration, unless it is done, and return its result: train(config, title)
Train = Callable[[Config, str], dict[str, Any]]


def get_teacher(
    config: Config, dataset: Data, device: Device, cache: RunCache, train: Train
) -> Teacher:
    """Load the teacher, or an ensemble of teachers, and train what is not there yet.

    Logs the teacher's accuracy, and a warning if it is no better than the undistilled student.

    Raises:
        DivergedError: The training of the teacher diverged.
        UserError: The file `teacher.checkpoint` does not fit.
    """
    settings = config.teacher
    members: list[Teacher] = []
    if settings.checkpoint is not None:
        source = Path(settings.checkpoint).expanduser()
        members.append(_load_member(config, dataset, device, cache, source))
    else:
        for number, member in enumerate(config.as_teachers()):
            title = f"teacher {number + 1}" if settings.ensemble.size > 1 else "teacher"
            try:
                trained = train(member, title)
            except DivergedError as error:
                text = str(error).replace("optimizer.lr", "teacher.optimizer.lr")
                raise DivergedError(f"the teacher's {text}") from error
            source = run_dir(member) / "student.safetensors"
            members.append(_load_member(config, dataset, device, cache, source, trained, number))
    loaded = members[0]
    if len(members) > 1:
        cache_key = dataset, tuple(member.net for member in members), settings.ensemble.average
        loaded = cache.get_or_create(
            "teacher/all",
            cache_key,
            lambda: teacher.build_ensemble(members, settings.ensemble.average, dataset, device),
        )
    _log_accuracy(config, loaded)
    return loaded


def _load_member(
    config: Config,
    dataset: Data,
    device: Device,
    cache: RunCache,
    source: Path,
    trained: dict[str, Any] | None = None,
    number: int = 0,
) -> Teacher:
    """Load a teacher from its weights, unless the previous run of this process had it loaded."""
    cache_key = dataset, source, file_digest(source), config.teacher.network, str(device)
    loaded: Teacher = cache.get_or_create(
        f"teacher/{number}",
        cache_key,
        lambda: teacher.load(config, dataset, device, source, trained),
        "teacher/all",
    )
    return loaded


def _log_accuracy(config: Config, loaded: Teacher) -> None:
    accuracies = {
        split: loaded.metrics[f"{split}_accuracy"]
        for split in ("val", "test")
        if f"{split}_accuracy" in loaded.metrics
    }
    text = "  ".join(f"{name} {console.format_percent(x)}" for name, x in accuracies.items())
    log.info("teacher %s: %s", config.teacher_name, text or "not measured yet (data.val_size=0)")
    standard = directory.load_result(run_dir(config.as_standard()))
    if standard is None:
        return
    for split, accuracy in accuracies.items():
        undistilled = standard["metrics"].get(f"{split}_accuracy")
        if undistilled is None:
            continue
        if undistilled >= accuracy:
            log.warning(
                "this student reaches %s on %s without a teacher: the teacher is no better, "
                "so expect no gain",
                console.format_percent(undistilled),
                split,
            )
        return


def open_teacher_cache(
    config: Config, loaded: Teacher, dataset: Data, method: Any, device: Device
) -> TeacherCache:
    """Open the cache of the teacher's outputs.

    It lies beside the teacher's weights, and for `teacher.checkpoint` in `paths.cache`.
    """
    settings = config.teacher
    weights = [Path(source) for source in loaded.sources]
    own_cache = absolute(config.paths.cache)
    parent = weights[0].parent if settings.checkpoint is None else own_cache
    digest = "+".join(map(file_digest, weights))
    if len(weights) > 1:
        digest += f" {settings.ensemble.average}"
    augment = config.data.augment
    name = teacher_cache.key(
        digest,
        config.teacher.network,
        config.description.fingerprint,
        dataset.train,
        augment,
        device,
        method.mixed,
    )
    is_small = len(dataset.train) * augment.views * dataset.size**2 < MANY_PIXELS
    eager = settings.cache.fill == "eager" or (
        settings.cache.fill == "auto" and device.torch.type == "cuda" and is_small
    )
    spec = TeacherCacheSpec(
        parent / "outputs" / name,
        settings.cache.max_gb,
        settings.cache.feature_maps,
        eager and not method.mixed,
    )
    return TeacherCache(
        TeacherForward(loaded.net, method.teacher_taps, device),
        dataset.train,
        augment,
        config.seed,
        method.views,
        spec,
        method.mixed,
    )
