"""Atomic files: each is written under a temporary name that ends in .part, and then renamed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file completely or not at all.

    Yields:
        A temporary path to write to. At the end of the context it is renamed to `path`; after an
        error `path` is unchanged.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "r+b") as file:
            os.fsync(file.fileno())  # a rename may reach the disk before the file's contents
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def remove_partial_files(folder: Path, name: str = "*") -> None:
    """Remove the partial versions of the file `name` that killed processes left behind.

    Call this only where no other process writes that file.
    """
    for part in folder.glob(f".{name}.*.part"):
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8.

    Raises:
        OSError: The file cannot be written.
    """
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value to a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the value in a JSON file, or None if the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
