"""Tensors in files, and their checksums."""

import errno
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def save(tensors: Mapping[str, Any], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file. **Raises:** OSError, also where safetensors has an error of its own, as for a full disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata
        )
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
