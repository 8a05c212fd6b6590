"""Model weights as W&B artifacts: an output of the run that trained them, an input of its students.

An artifact's name and content determine its version, so a teacher's own run and the runs of all
its students log the same version. W&B's lineage graph therefore connects them, both online and
after `wandb sync`.
"""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kd.config.schema import Config, file_digest, run_dir
from kd.core.wandb_names import shorten_name
from kd.runs import directory

WEIGHTS = "student.safetensors"  # in a run's directory


def log(run: Any, config: Config, folder: Path, result: Mapping[str, Any]) -> None:
    """Log the weights of a finished run as its output and those of its teachers as its input.

    Args:
        run: The W&B run.
        config: Configuration of the run.
        folder: Directory of the run.
        result: Content of the run's `result.json`.
    """
    for artifact, aliases in _teacher_artifacts(run, config):
        _publish(run, artifact, aliases, used=True)
    _publish(run, *_run_artifact(run, folder, result), used=False)


def _publish(run: Any, artifact: Any, aliases: list[str], used: bool) -> None:
    """Log an artifact as an output of the run, or as an input (`used`).

    This is the part of `run.use_artifact` that also works offline, without waiting for the upload.
    An input is marked as "user created", so that W&B does not record this run as its origin.

    Raises:
        Exception: Any error of W&B's if its server does not respond.
    """
    run._log_artifact(artifact, aliases=aliases, is_user_created=used, use_after_commit=used)


def _teacher_artifacts(run: Any, config: Config) -> Iterator[tuple[Any, list[str]]]:
    """Yield (artifact, aliases) of each teacher that the run learned from."""
    if not config.needs_teacher:
        return
    if config.teacher.checkpoint is None:
        for folder in map(run_dir, config.as_teachers()):
            yield _run_artifact(run, folder, directory.load_result(folder) or {})
        return
    path = Path(config.teacher.checkpoint).expanduser().absolute()
    result = directory.load_result(path.parent) if path.name == WEIGHTS else None
    if result is not None:  # the weights of a kd run: use the artifact that it logs itself
        yield _run_artifact(run, path.parent, result)
    else:
        name = f"{path.stem}-{file_digest(path)}"
        metadata = {"file": str(path)}
        yield _artifact(run, name, path, metadata, "Given as teacher.checkpoint"), ["latest"]


def _run_artifact(run: Any, folder: Path, result: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """Return (artifact, aliases) of the weights in a run's `folder`."""
    keys = {name: result.get(name) for name in ("id", "method", "student", "seed", "epochs")}
    metadata = {**keys, **result.get("size", {}), **result.get("metrics", {})}
    aliases = ["latest", f"epoch-{result['epochs']}"] if "epochs" in result else ["latest"]
    description = f"Weights of the run in {folder}; load the network with kd.load(FILE)"
    return _artifact(run, folder.name, folder / WEIGHTS, metadata, description), aliases


def _artifact(
    run: Any, name: str, path: Path, metadata: Mapping[str, Any], description: str
) -> Any:
    """Return a W&B artifact that contains the file at `path`."""
    import wandb

    name = shorten_name("artifact", re.sub(r"[^\w.-]", "_", name, flags=re.ASCII))
    artifact = wandb.Artifact(name, "model", description, dict(metadata))
    stable = _linked(path, Path(run.dir).parent / "artifacts" / f"{name}.safetensors")
    artifact.add_file(str(stable), name="model.safetensors", policy="immutable", skip_cache=True)
    return artifact


def _linked(path: Path, target: Path) -> Path:
    """Link the file at `path` to `target` in the W&B run's own directory, and return `target`.

    A rerun replaces the file in the run's directory but not the link. The link takes no space and,
    unlike W&B's copy in the home directory, stays available wherever the run's directory is.
    """
    target.parent.mkdir(exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(path.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(path, target)
    return target
