"""Save tensors to files, and compute their checksums."""

import errno
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def save(tensors: Mapping[str, Any], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a safetensors file.

    Raises:
        OSError: The file cannot be written. This replaces safetensors' own error, which is raised
            for a full disk, among others.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            path,
            metadata,
        )
    except SafetensorError as error:
        match = re.search(r"os error (\d+)", str(error))
        number = int(match[1]) if match else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def checksum(tensors: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of tensors.

    Returns:
        64 hexadecimal digits, independent of the order of the mapping.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
