"""The end of a run: read the test images once, then save the weights, metrics and summary."""

import json
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kd.config.schema import Config, model_name, run_dir
from kd.core import console, io, tensors
from kd.core.errors import DivergedError, UserError
from kd.data import Data
from kd.methods import Method
from kd.models import Net, weights
from kd.runs import directory
from kd.runs.schema import RunResult, find_error
from kd.training import metrics
from kd.training.device import Device
from kd.training.environment import environment
from kd.training.teacher import Teacher
from kd.training.teacher_cache import TeacherCache


class RunComponents(NamedTuple):
    """The objects that make up a run."""

    dataset: Data
    device: Device
    teacher: Teacher | None
    student: Net
    method: Method
    teacher_cache: TeacherCache | None


def measure(
    config: Config, rows: list[dict[str, Any]], parts: RunComponents, times: dict[str, Any]
) -> tuple[dict[str, Any], torch.Tensor]:
    """Evaluate a trained student on the test images, which are read only here.

    Args:
        config: Configuration of the run.
        rows: The history, one row per epoch.
        parts: The run's components.
        times: Training time in seconds (`train_seconds`), the number of interleaved runs that
            shared it (`packed`), and how often the run was resumed (`resumed`).

    Returns:
        The content of `result.json`, and the student's logits of the test images [n, classes].

    Raises:
        DivergedError: A metric is not finite.
    """
    dataset = parts.dataset
    device = parts.device
    teacher = parts.teacher
    method = parts.method
    deployed = method.deploy(parts.student)
    logits = metrics.predict(deployed, dataset.test, device)
    teacher_logits = metrics.predict(teacher.net, dataset.test, device) if teacher else None
    test_metrics = metrics.metrics(logits, dataset.test.targets, teacher_logits)
    last = rows[-1]
    content = {
        "id": config.identity(),
        "method": config.method.name,
        "student": model_name(config.student),
        "seed": config.seed,
        "epochs": config.student.epochs,
        "metrics": {f"test_{k}": v for k, v in test_metrics.items()}
        | {k: last[k] for k in last if k.startswith("val_")},
        "teacher": _describe_teacher(config, teacher, teacher_logits, dataset),
        "reliability": metrics.reliability(logits, dataset.test.targets),
        "size": metrics.size(deployed, dataset.size)
        | {"method_params": metrics.count(method.parameters())},
        "time": {
            **times,
            "epoch_seconds": [row["seconds"] for row in rows],
            "images_per_second": sum(row["images_per_second"] for row in rows) / len(rows),
            "teacher_read": parts.teacher_cache.hit_rate if parts.teacher_cache else None,
        },
        "content": config.description.fingerprint,
        "samples": {
            "train": dataset.train.epoch_size,
            "val": len(dataset.val or ()),
            "test": len(dataset.test),
        },
        "environment": environment(device),
        "config": config.to_dict(),
    }
    if problem := find_error(RunResult, content):  # it could not be read again
        raise DivergedError(f"the result of the trained student is not usable: {problem}")
    return RunResult.model_validate(content).model_dump(), logits


def save_result(
    config: Config,
    run_directory: directory.RunDirectory,
    parts: RunComponents,
    result: dict[str, Any],
    logits: torch.Tensor,
) -> None:
    """Write the weights, the outputs for the test images and then the result of a run.

    Args:
        config: Configuration of the run.
        run_directory: Where to write.
        parts: The run's components.
        result: Content of `result.json`.
        logits: The student's logits of the test images, float32 [n, classes].

    Raises:
        UserError: Writing failed; the files were then saved to a temporary directory, if possible.
    """
    dataset = parts.dataset
    train = dataset.train
    metadata = weights.build_metadata(
        config.student.network.model_dump(), dataset.classes, dataset.size, train.mean, train.std
    )
    if parts.method.graft is not None:
        metadata["graft"] = {"teacher": config.teacher.network.model_dump(), **parts.method.graft}

    def write_tensors(folder: Path) -> None:
        weights.save(parts.method.deploy(parts.student), folder / "student.safetensors", metadata)
        if method_state := parts.method.state_dict():
            with io.atomic_write(folder / "method.safetensors") as partial:
                tensors.save(method_state, partial)
        max_bytes = 1e6 * config.test_outputs.max_mb
        save_test_outputs(folder, logits, dataset.test.targets, dataset.classes, max_bytes)

    try:
        write_tensors(run_directory.folder)
        run_directory.finish(result)
    except OSError as error:
        problem = f"paths.runs: cannot write to {run_directory.folder} ({error.strerror})"
        outcome = "the result is lost: no space elsewhere"
        with suppress(OSError):
            rescue_folder = Path(tempfile.mkdtemp(prefix=f"kd-{run_directory.folder.name}-"))
            rescued = directory.RunDirectory(rescue_folder, config.to_dict())
            rescued.write_history(run_directory.rows)
            write_tensors(rescued.folder)
            rescued.finish(result)
            outcome = (
                f"the finished run was saved to {rescued.folder}; "
                "free some space and move its files into the run's directory"
            )
        raise UserError(f"{problem}; {outcome}") from error


HEADER_BYTES = 512  # more than the header of the three tensors, without the metadata


def save_test_outputs(
    folder: Path,
    logits: torch.Tensor,
    labels: torch.Tensor,
    classes: Sequence[str],
    max_bytes: float,
) -> None:
    """Write `labels`, `predictions` and `logits` of the test images to test_outputs.safetensors.

    Args:
        folder: Directory of the run.
        logits: Float32 tensor [n, classes]; written as float16, clipped to its finite range.
        labels: Int64 tensor [n].
        classes: The names of the classes, written as metadata.
        max_bytes: Maximum size of the file. If the logits do not fit, only labels and predictions
            are written; with 0, nothing is written and the file of an earlier attempt is removed.

    Raises:
        OSError: The file cannot be written.
    """
    path = folder / directory.TEST_OUTPUTS
    if not max_bytes:
        path.unlink(missing_ok=True)
        return
    largest = torch.finfo(torch.float16).max
    contents = {
        "labels": labels.int(),
        "predictions": metrics.predictions(logits).int(),
        "logits": logits.clamp(-largest, largest).half(),
    }
    names = json.dumps(list(classes))
    size = sum(t.nbytes for t in contents.values()) + len(json.dumps(names)) + HEADER_BYTES
    if size > max_bytes:
        del contents["logits"]
    with io.atomic_write(path) as partial:
        tensors.save(contents, partial, {"classes": names})


def _describe_teacher(
    config: Config, teacher: Teacher | None, teacher_logits: Any, dataset: Data
) -> dict[str, Any] | None:
    """Return the entry `teacher` of `result.json`."""
    if teacher is None:
        return None
    test_metrics = metrics.metrics(teacher_logits, dataset.test.targets)
    measured = {f"test_{k}": v for k, v in test_metrics.items()}
    size = metrics.size(teacher.net, dataset.size)
    source = teacher.sources[0] if len(teacher.sources) == 1 else list(teacher.sources)
    origin = {"name": config.teacher_name, "source": source, "chosen": config.chooses_teacher}
    return {**origin, "metrics": teacher.metrics | measured, **size}


def summary_lines(config: Config, result: dict[str, Any], folder: Path) -> list[str]:
    """Return a run's last lines of output: teacher, student, difference to the baseline, files.

    Args:
        config: Configuration of the run.
        result: Content of `result.json`.
        folder: Directory of the run.
    """
    accuracy = result["metrics"]["test_accuracy"]
    lines = []
    if result["teacher"]:
        teacher = result["teacher"]
        teacher_accuracy = teacher["metrics"]["test_accuracy"]
        lines.append(
            f"teacher  {teacher['name']:<10} test {console.format_percent(teacher_accuracy)}"
            f"  {teacher['params']:,} parameters"
        )
    lines.append(
        f"student  {result['student']:<10} test {console.format_percent(accuracy)}"
        f"  {result['size']['params']:,} parameters"
        f"  (method={result['method']}, seed={result['seed']}, {result['epochs']} epochs)"
    )
    standard = directory.load_result(run_dir(config.as_standard()))
    if result["teacher"] and standard:
        baseline = standard["metrics"]["test_accuracy"]
        lines.append(
            f"baseline standard   test {console.format_percent(baseline)}"
            f"  {100 * (accuracy - baseline):+.2f} points"
        )
    elif result["teacher"]:
        lines.append(
            "baseline standard   not run yet; run the same command with method=standard to get it"
        )
    return [*lines, f"files    {console.display_path(folder)}"]
