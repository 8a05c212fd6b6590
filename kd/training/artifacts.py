"""Weights as W&B artifacts: a student's as what its run made, its teacher's as what the run used.

Equal weights of one name are one version of an artifact, whoever logs it. A teacher's own run and all its students
log the same, so W&B's lineage graph joins them, online and after `wandb sync`.
"""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kd.config.schema import Config, file_digest, run_dir
from kd.config.wandb_names import shorten_name
from kd.runs import directory

WEIGHTS = "student.safetensors"  # in a run's directory


def log(run: Any, config: Config, folder: Path, result: Mapping[str, Any]) -> None:
    """Log the weights in a finished run's `folder`, and record those of its teachers as what the run used."""
    for artifact, aliases in _of_teachers(run, config):
        _publish(run, artifact, aliases, used=True)
    _publish(run, *_of_run(run, folder, result), used=False)


def _publish(run: Any, artifact: Any, aliases: list[str], used: bool) -> None:
    """Log or use an artifact: the part of `run.use_artifact` that works offline too, and does not wait for the upload.

    "User created" is what the run did not make: W&B then records no run as its origin. **Raises:** what W&B raises
    where its server does not answer.
    """
    run._log_artifact(artifact, aliases=aliases, is_user_created=used, use_after_commit=used)


def _of_teachers(run: Any, config: Config) -> Iterator[tuple[Any, list[str]]]:
    if not config.needs_teacher:
        return
    if config.teacher_settings.checkpoint is None:
        for folder in map(run_dir, config.as_teachers()):
            yield _of_run(run, folder, directory.load_result(folder) or {})
        return
    path = Path(config.teacher_settings.checkpoint).expanduser().absolute()
    result = directory.load_result(path.parent) if path.name == WEIGHTS else None
    if result is not None:  # a run of kd's: the artifact that it logs itself
        yield _of_run(run, path.parent, result)
    else:
        name = f"{path.stem}-{file_digest(path)}"
        yield (
            _artifact(run, name, path, {"file": str(path)}, "Given as teacher.checkpoint"),
            ["latest"],
        )


def _of_run(run: Any, folder: Path, result: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """(artifact, aliases) of the weights in a run's `folder`."""
    keys = {name: result.get(name) for name in ("id", "method", "student", "seed", "epochs")}
    metadata = {**keys, **result.get("size", {}), **result.get("metrics", {})}
    aliases = ["latest", f"epoch-{result['epochs']}"] if "epochs" in result else ["latest"]
    description = f"Weights of the run in {folder}; kd.load(FILE) makes the network of them"
    return _artifact(run, folder.name, folder / WEIGHTS, metadata, description), aliases


def _artifact(
    run: Any, name: str, path: Path, metadata: Mapping[str, Any], description: str
) -> Any:
    import wandb

    name = shorten_name("artifact", re.sub(r"[^\w.-]", "_", name, flags=re.ASCII))
    artifact = wandb.Artifact(name, "model", description, dict(metadata))
    stable = _linked(path, Path(run.dir).parent / "artifacts" / f"{name}.safetensors")
    artifact.add_file(str(stable), name="model.safetensors", policy="immutable", skip_cache=True)
    return artifact


def _linked(path: Path, target: Path) -> Path:
    """The file at `path` under a name in the W&B run's own directory: a rerun replaces the one in the run's.

    A link takes no room, and unlike W&B's copy in the home directory is there wherever the run is.
    """
    target.parent.mkdir(exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(path.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(path, target)
    return target
