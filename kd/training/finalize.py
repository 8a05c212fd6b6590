"""What a run leaves: it reads the test images, once, and keeps weights, metrics and the words that sum them up."""

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kd.config.schema import Config, model_name, run_dir
from kd.core import console, io, tensors
from kd.core.errors import UserError
from kd.data import Data
from kd.methods import Method
from kd.models import Net, weights
from kd.runs import directory
from kd.training import metrics
from kd.training.device import Device
from kd.training.environment import environment
from kd.training.teacher import Teacher
from kd.training.teacher_cache import TeacherCache


class RunComponents(NamedTuple):
    """What a run is made of."""

    images: Data
    device: Device
    tutor: Teacher | None
    student: Net
    method: Method
    teach: TeacherCache | None


def measure(
    config: Config, rows: list[dict[str, Any]], parts: RunComponents, times: dict[str, Any]
) -> tuple[dict[str, Any], torch.Tensor]:
    """Read the test images, once. **Returns:** what result.json is to hold, and the test logits."""
    images, device, tutor, method = parts.images, parts.device, parts.tutor, parts.method
    deployed = method.deploy(parts.student)
    logits = metrics.predict(deployed, images.test, device)
    taught = metrics.predict(tutor.net, images.test, device) if tutor else None
    test = metrics.metrics(logits, images.test.targets, taught)
    last = rows[-1]
    result = {
        "id": config.identity(),
        "method": config.method.name,
        "student": model_name(config.student),
        "seed": config.root.seed,
        "epochs": config.epochs,
        "metrics": {f"test_{k}": v for k, v in test.items()}
        | {k: last[k] for k in last if k.startswith("val_")},
        "teacher": _describe_teacher(config, tutor, taught, images),
        "reliability": metrics.reliability(logits, images.test.targets),
        "size": metrics.size(deployed, images.size)
        | {"method_params": metrics.count(method.parameters())},
        "time": {
            **times,  # of the training; `packed`: runs that shared them; `resumed`: how often it went on
            "epoch_seconds": [row["seconds"] for row in rows],
            "images_per_second": sum(row["images_per_second"] for row in rows) / len(rows),
            "teacher_read": parts.teach.hit_rate
            if parts.teach
            else None,  # the part it need not compute
        },
        "content": config.description.fingerprint,
        "samples": {
            "train": images.train.epoch_size,
            "val": len(images.val or ()),
            "test": len(images.test),
        },
        "environment": environment(device),
        "config": config.to_dict(),
    }
    return result, logits


def save_result(
    config: Config, kept: directory.RunDirectory, parts: RunComponents, result: dict[str, Any]
) -> None:
    """Write weights and result. **Raises:** UserError where that cannot be done; then they lie in another place."""
    images, train = parts.images, parts.images.train
    card = weights.build_metadata(
        config.student.model_dump(), images.classes, images.size, train.mean, train.std
    )
    if parts.method.graft is not None:
        card["graft"] = {"teacher": config.teacher.model_dump(), **parts.method.graft}

    def write(folder: Path) -> None:
        weights.save(parts.method.deploy(parts.student), folder / "student.safetensors", card)
        if extra := parts.method.state_dict():
            with io.atomic_write(folder / "method.safetensors") as part:
                tensors.save(extra, part)

    try:
        write(kept.folder)
        kept.finish(result)
    except OSError as error:
        what, then = (
            f"paths.runs: cannot write to {kept.folder} ({error.strerror})",
            "it is lost: no room elsewhere",
        )
        with suppress(OSError):
            rescued = directory.RunDirectory(
                Path(tempfile.mkdtemp(prefix=f"kd-{kept.folder.name}-")), config.to_dict()
            )
            rescued.write_history(kept.rows)
            write(rescued.folder)
            rescued.finish(result)
            then = f"the finished run is in {rescued.folder}: make room, and move its files"
        raise UserError(f"{what}; {then}") from error


def _describe_teacher(
    config: Config, tutor: Teacher | None, taught: Any, images: Data
) -> dict[str, Any] | None:
    """What the result says of its teacher."""
    if tutor is None:
        return None
    measured = {f"test_{k}": v for k, v in metrics.metrics(taught, images.test.targets).items()}
    size = metrics.size(tutor.net, images.size)
    source = tutor.sources[0] if len(tutor.sources) == 1 else list(tutor.sources)
    said = {"name": config.teacher_name, "source": source, "chosen": config.chooses_teacher}
    return {**said, "metrics": tutor.metrics | measured, **size}


def summary_lines(config: Config, result: dict[str, Any], folder: Path) -> list[str]:
    """The last lines of a run: teacher, student, how much of the gap was closed, where the files are."""
    accuracy = result["metrics"]["test_accuracy"]
    lines = []
    if result["teacher"]:
        tutor = result["teacher"]
        top = tutor["metrics"]["test_accuracy"]
        lines.append(
            f"teacher  {tutor['name']:<10} test {console.format_percent(top)}  {tutor['params']:,} parameters"
        )
    lines.append(
        f"student  {result['student']:<10} test {console.format_percent(accuracy)}  {result['size']['params']:,} parameters"
        f"  (method={result['method']}, seed={result['seed']}, {result['epochs']} epochs)"
    )
    standard = directory.load_result(run_dir(config.as_standard()))
    if result["teacher"] and standard:
        base = standard["metrics"]["test_accuracy"]
        gap = (
            f", {100 * (accuracy - base) / (top - base):.0f} % of its gap to the teacher closed"
            if top > base
            else ""
        )
        lines.append(
            f"against  standard   test {console.format_percent(base)}  {100 * (accuracy - base):+.2f} points{gap}"
        )
    elif result["teacher"]:
        lines.append(
            "against  standard   not run yet: the same command with method=standard gives the baseline"
        )
    return [*lines, f"files    {console.display_path(folder)}"]
