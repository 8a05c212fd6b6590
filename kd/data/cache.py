"""A cache of decoded images: one checksummed, memory-mapped file per data set content."""

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
    """Read the arrays of `key` from `folder`, or decode them and write them there.

    One process decodes while the others wait. A damaged file is replaced. If the folder cannot be
    written, the arrays stay in memory only.
    """
    path = folder / f"{key}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock")
        with locks.hold(lock, "waiting for the process that decodes the images"):
            remove_partial_files(folder, path.name)
            arrays = _read(path)
            if arrays is None:
                arrays = decode()
                _write(path, arrays)
                arrays = _read(path) or arrays
            return arrays
    except OSError as error:
        log.warning(
            "cannot write the decoded images to %s (%s); keeping them in memory",
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
    with atomic_write(path) as partial_path:
        save(tensors, partial_path, {"sha256": checksum(tensors)})
