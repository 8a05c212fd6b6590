"""Files that are whole or absent: each is written aside, under a name that ends in .part, and then renamed."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A path to write to. What lies there when the block ends becomes `path`; after an error `path` is as it was."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "r+b") as file:
            os.fsync(file.fileno())  # a rename may reach the disk before what it names
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def tidy(folder: Path, name: str = "*") -> None:
    """Remove what a process that was killed had half written of `name`. Only for who alone writes it."""
    for part in folder.glob(f".{name}.*.part"):
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none. **Raises:** OSError."""
    with aside(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file, or None when the file is absent or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def save(tensors: Mapping[str, Any], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file. **Raises:** OSError, also where safetensors has an error of its own, as for a full disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata)
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def checksum(tensors: Mapping[str, Any]) -> str:
    """64 hex digits of the names, types, shapes and bits of tensors."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
