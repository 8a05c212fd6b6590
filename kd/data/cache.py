"""Decoded images, kept in one checksummed, memory-mapped file for each content of a data set."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kd.data.base import Arrays

log = logging.getLogger(__name__)


def cached(folder: Path, key: str, decode: Callable[[], Arrays]) -> Arrays:
    """The arrays of `key`, from `folder` when they are there whole, else decoded and put there for the next time.

    One process decodes while others wait. A damaged file is made anew. Where the folder cannot be written the
    arrays are only kept in memory.
    """
    path = folder / f"{key}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            found = _read(path)
            if found is None:
                found = decode()
                _write(path, found)
                found = _read(path) or found
            return found
    except OSError as error:
        log.warning("the decoded images cannot be kept in %s (%s); they stay in memory", folder, error.strerror)
        return decode()


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().reshape(-1).view("u1").data)
    return digest.hexdigest()


def _read(path: Path) -> Arrays | None:
    if not path.exists():
        return None
    with contextlib.suppress(SafetensorError, OSError, TypeError, KeyError):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            expected = (file.metadata() or {}).get("sha256")
        if _checksum(tensors) == expected:
            return Arrays(**tensors)
    log.warning("%s is damaged; decoding the images again", path)
    return None


def _write(path: Path, arrays: Arrays) -> None:
    tensors = {name: t.contiguous() for name, t in arrays._asdict().items() if t is not None}
    aside = path.with_suffix(f".{os.getpid()}.part")
    try:
        save_file(tensors, aside, metadata={"sha256": _checksum(tensors)})
        os.replace(aside, path)
    except SafetensorError as error:
        raise OSError(28, str(error)) from error
    finally:
        aside.unlink(missing_ok=True)
