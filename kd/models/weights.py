"""Weights on disk: safetensors files with metadata, never pickles.

The metadata holds the architecture, the classes and the normalisation.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kd import models
from kd.core import tensors as tensor_files
from kd.core.errors import UserError, first_line
from kd.core.io import atomic_write
from kd.core.settings import Settings
from kd.data import augment
from kd.models.base import Net
from kd.models.grafted import Graft, build_grafted
from kd.runs.schema import find_error

EXTERNAL = "teacher.checkpoint: "  # begins each message about a file that the user names
FLOATS = ("F64", "F32", "F16", "BF16")


class WeightsMetadata(Settings, extra="ignore"):
    """What is needed, besides the weights, to rebuild a network and to prepare its input."""

    model: dict[str, Any]
    classes: list[str] = Field(min_length=1)
    size: int = Field(ge=4, le=4096)
    mean: list[float] = Field(min_length=3, max_length=3)
    std: list[float] = Field(min_length=3, max_length=3)
    graft: Graft | None = None  # what follows the model's stages, see kd.models.grafted
    sha256: str | None = None  # of the weights; missing from old files


def save(net: Net, path: Path, metadata: dict[str, Any]) -> None:
    """Write the weights of `net` and their metadata.

    Args:
        net: The network.
        path: The safetensors file.
        metadata: The fields of `WeightsMetadata`, without the checksum.

    Raises:
        OSError: The file cannot be written.
    """
    tensors = net.state_dict()
    text = json.dumps({**metadata, "sha256": tensor_files.checksum(tensors)})
    with atomic_write(path) as partial_path:
        # a single entry: safetensors writes several in any order, and equal weights must give
        # equal files
        tensor_files.save(tensors, partial_path, {"kd": text})


def build_metadata(
    model: dict[str, Any], classes: tuple[str, ...], size: int, mean: Tensor, std: Tensor
) -> dict[str, Any]:
    """Return the fields of `WeightsMetadata` as plain values, without graft and checksum."""
    return {
        "model": model,
        "classes": list(classes),
        "size": size,
        "mean": mean.tolist(),
        "std": std.tolist(),
    }


def validate_weights(path: Path, net: Net, classes: tuple[str, ...], size: int) -> None:
    """Check that the weights at `path` are intact and fit the teacher.

    Args:
        path: The safetensors file.
        net: The teacher, possibly on the meta device.
        classes: The classes of the data set.
        size: The data set's images are size x size.

    Raises:
        UserError: The weights are damaged or do not fit.
    """
    with _open(path, EXTERNAL) as file:
        metadata = _read_metadata(file, path, EXTERNAL)
        if metadata is not None and len(metadata.classes) != len(classes):
            raise UserError(
                f"{EXTERNAL}{path} has {len(metadata.classes)} classes, the data has "
                f"{len(classes)}; teacher and student must have the same classes"
            )
        if metadata is not None and metadata.size != size:
            raise UserError(
                f"{EXTERNAL}{path} takes images of {metadata.size} pixels, the data has {size}; "
                "teacher and student must take the same images"
            )
        _read_tensors(file, metadata, path, net, EXTERNAL)


def load_weights(net: nn.Module, path: Path, prefix: str = EXTERNAL) -> None:
    """Load the weights at `path` into `net`.

    Args:
        net: The network.
        path: The safetensors file.
        prefix: Begins the error message.

    Raises:
        UserError: The weights are damaged or do not fit.
    """
    with _open(path, prefix) as file:
        metadata = _read_metadata(file, path, prefix)
        net.load_state_dict(_read_tensors(file, metadata, path, net, prefix))


@contextmanager
def _open(path: Path, prefix: str) -> Iterator[Any]:
    """Open a safetensors file. Errors while reading it in the block also become UserErrors."""
    try:
        if not path.is_file():  # this excludes pipes, on which reading would block
            problem = "is a folder" if path.is_dir() else "does not exist or is not a file"
            raise UserError(f"{prefix}{path} {problem}")
        with open(path, "rb") as file:
            start = file.read(2)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{prefix}cannot read {path} ({getattr(error, 'strerror', error)})"
        ) from error
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        if start == b"PK" or start[:1] == b"\x80":
            raise UserError(
                f"{prefix}{path} is a pickle, which could run code when read; "
                "save the state_dict with safetensors.torch.save_file"
            ) from error
        reason = first_line(error)
        raise UserError(f"{prefix}{path} is not an intact safetensors file ({reason})") from error


def _read_metadata(file: Any, path: Path, prefix: str) -> WeightsMetadata | None:
    """Return the metadata, or None for weights that kd did not write."""
    text = (file.metadata() or {}).get("kd")
    if text is None:
        return None
    try:
        fields = json.loads(text)
        problem = find_error(WeightsMetadata, fields)
    except (ValueError, RecursionError):
        problem = "it is not JSON"
    if problem:
        raise UserError(f"{prefix}the metadata in {path} cannot be used ({problem})")
    return WeightsMetadata.model_validate(fields)


def _read_tensors(
    file: Any, metadata: WeightsMetadata | None, path: Path, net: nn.Module, prefix: str
) -> dict[str, Tensor]:
    """Return the tensors of `net`, all finite. Those that kd wrote must match their checksum."""
    expected = {
        name: (list(tensor.shape), tensor.is_floating_point())
        for name, tensor in net.state_dict().items()
    }
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    actual = {
        name: (slice_.get_shape(), slice_.get_dtype() in FLOATS) for name, slice_ in slices.items()
    }
    for name in sorted(set(expected) | set(actual)):
        if expected.get(name) != actual.get(name):
            model = "the teacher model" if prefix else "its metadata"
            in_file = _format_shape(actual.get(name))
            in_model = _format_shape(expected.get(name))
            raise UserError(
                f"{prefix}{path} does not fit {model}: "
                f"{name} is {in_file} in the file and {in_model} in the model"
            )
    tensors = {name: file.get_tensor(name) for name in expected}
    if metadata is not None and metadata.sha256 not in (None, tensor_files.checksum(tensors)):
        raise UserError(f"{prefix}{path} is damaged: its weights do not match their checksum")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{prefix}{path} cannot be used: {name} is not finite")
    return tensors


def _format_shape(shape_and_type: tuple[list[int], bool] | None) -> str:
    if shape_and_type is None:
        return "absent"
    shape, is_float = shape_and_type
    return f"{shape}" if is_float else f"{shape} of integers"


class Loaded(nn.Module):
    """A trained network with its `classes`, its `metadata` and `preprocess` for uint8 images."""

    def __init__(self, net: Net, metadata: dict[str, Any]):
        super().__init__()
        self.net = net
        self.metadata = metadata
        self.classes: tuple[str, ...] = tuple(metadata["classes"])

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits [B, classes] from the output of `preprocess`."""
        logits: Tensor = self.net(x)
        return logits

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalise images for the network.

        Args:
            images: uint8 tensor [B, size, size, 3].

        Returns:
            float32 tensor [B, 3, size, size].
        """
        mean = torch.tensor(self.metadata["mean"], device=images.device)
        std = torch.tensor(self.metadata["std"], device=images.device)
        return augment.normalise(images, mean, std)


def load(path: str | os.PathLike[str]) -> Loaded:
    """Load the student of a finished run, in eval mode.

    Args:
        path: The directory of the run, or any .safetensors file that kd wrote.

    Raises:
        UserError: There is no such file, or it is damaged.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "student.safetensors"
    if not file.is_file():
        raise UserError(f"{path}: no finished run here (no student.safetensors)")
    with _open(file, "") as opened:
        metadata = _read_metadata(opened, file, "")
        if metadata is None:
            raise UserError(f"{file}: these weights were not written by kd (no metadata)")
        with torch.device("meta"):  # so that memory is allocated only for weights that fit
            empty = _build_network(metadata, file)
        tensors = _read_tensors(opened, metadata, file, empty, "")
        net = _build_network(metadata, file)
        net.load_state_dict(tensors)
    return Loaded(net, metadata.model_dump()).eval()


def _build_network(metadata: WeightsMetadata, file: Path) -> Net:
    """Build the network that the metadata describes. Its weights are to be replaced.

    Raises:
        UserError: The metadata does not describe a network.
    """
    models_to_build = {"model": metadata.model}
    if metadata.graft is not None:
        models_to_build["graft.teacher"] = metadata.graft.teacher
    nets = []
    for key, settings in models_to_build.items():
        net_class = models.find(settings.get("name"), f"the metadata in {file}: {key}")
        if problem := find_error(net_class.Config, settings):
            raise UserError(f"the metadata in {file}: {key}.{problem}")
        config = net_class.Config.model_validate(settings)
        nets.append(models.blank(config, len(metadata.classes), metadata.size))
    if metadata.graft is None:
        net: Net = nets[0]
        return net
    try:
        return build_grafted(nets[0], nets[1], metadata.graft, metadata.size)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"the metadata in {file}: graft: there is no tap {first_line(error)}"
        ) from error
