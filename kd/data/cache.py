"""Decoded images, kept in one checksummed, memory-mapped file for each content of a data set."""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from kd.core import locks
from kd.core.io import atomic_write, remove_partial_files
from kd.core.tensors import checksum, save
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
        with locks.hold(
            path.with_suffix(".lock"), "waiting for the process that decodes the images"
        ):
            remove_partial_files(folder, path.name)
            found = _read(path)
            if found is None:
                found = decode()
                _write(path, found)
                found = _read(path) or found
            return found
    except OSError as error:
        log.warning(
            "the decoded images cannot be kept in %s (%s); they stay in memory",
            folder,
            error.strerror,
        )
        return decode()


def _read(path: Path) -> Arrays | None:
    if not path.exists():
        return None
    with contextlib.suppress(SafetensorError, OSError, TypeError, KeyError):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            expected = (file.metadata() or {}).get("sha256")
        if checksum(tensors) == expected:
            return Arrays(**tensors)
    log.warning("%s is damaged; decoding the images again", path)
    return None


def _write(path: Path, arrays: Arrays) -> None:
    tensors = {name: t.contiguous() for name, t in arrays._asdict().items() if t is not None}
    with atomic_write(path) as part:
        save(tensors, part, {"sha256": checksum(tensors)})
