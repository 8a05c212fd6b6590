"""Weights on disk: safetensors with a card (architecture, classes, normalisation), never a pickle."""

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
from kd.core import tensors as files
from kd.core.errors import UserError, first_line
from kd.core.io import atomic_write
from kd.core.settings import Settings
from kd.data import augment
from kd.models.base import Net
from kd.models.grafted import Graft, build_grafted
from kd.runs.schema import find_error

EXTERNAL = "teacher.checkpoint: "  # how a line on a file of the user's begins
FLOATS = ("F64", "F32", "F16", "BF16")


class WeightsMetadata(Settings, extra="ignore"):
    """What must be known, beside the weights, to build a network again and to feed it."""

    model: dict[str, Any]
    classes: list[str] = Field(min_length=1)
    size: int = Field(ge=4, le=4096)
    mean: list[float] = Field(min_length=3, max_length=3)
    std: list[float] = Field(min_length=3, max_length=3)
    graft: Graft | None = None  # what was put behind the model's stages, see kd.models.grafted
    sha256: str | None = None  # of the weights; kd has not always said it


def save(net: Net, path: Path, card: dict[str, Any]) -> None:
    """Write `net`'s weights and its card. **Raises:** OSError."""
    tensors = net.state_dict()
    with atomic_write(path) as part:
        # one entry of metadata: safetensors writes several in any order, and equal weights shall be equal files
        files.save(tensors, part, {"kd": json.dumps({**card, "sha256": files.checksum(tensors)})})


def build_metadata(
    model: dict[str, Any], classes: tuple[str, ...], size: int, mean: Tensor, std: Tensor
) -> dict[str, Any]:
    """The plain form of a `Card`."""
    return {
        "model": model,
        "classes": list(classes),
        "size": size,
        "mean": mean.tolist(),
        "std": std.tolist(),
    }


def validate_weights(path: Path, net: Net, classes: tuple[str, ...], size: int) -> None:
    """Raise UserError unless the weights at `path` are whole and fit `net`, these classes and this image size."""
    with _open(path, EXTERNAL) as file:
        found = _read_metadata(file, path, EXTERNAL)
        if found is not None and len(found.classes) != len(classes):
            raise UserError(
                f"{EXTERNAL}{path} knows {len(found.classes)} classes, the data has {len(classes)}; "
                "teacher and student must share them"
            )
        if found is not None and found.size != size:
            raise UserError(
                f"{EXTERNAL}{path} takes images of {found.size} pixels, the data has {size}; "
                "teacher and student must see the same"
            )
        _read_tensors(file, found, path, net, EXTERNAL)


def load_weights(net: nn.Module, path: Path, start: str = EXTERNAL) -> None:
    """Load the weights at `path` into `net`. **Raises:** UserError, its line begun by `start`, when they do not fit or
    are damaged."""
    with _open(path, start) as file:
        net.load_state_dict(
            _read_tensors(file, _read_metadata(file, path, start), path, net, start)
        )


@contextmanager
def _open(path: Path, start: str) -> Iterator[Any]:
    """The opened safetensors file. Whatever it says of itself that is not so ends in a UserError."""
    try:
        if not path.is_file():  # nor is a pipe opened, which would wait for ever
            raise UserError(f"{start}no file {path}{', but a folder' if path.is_dir() else ''}")
        with open(path, "rb") as file:
            first = file.read(2)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{start}cannot read {path} ({getattr(error, 'strerror', error)})"
        ) from error
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        if first == b"PK" or first[:1] == b"\x80":
            raise UserError(
                f"{start}{path} is a pickle, which could run code when read; "
                "save the state_dict with safetensors.torch.save_file"
            ) from error
        what = first_line(error)
        raise UserError(f"{start}{path} is not a whole safetensors file ({what})") from error


def _read_metadata(file: Any, path: Path, start: str) -> WeightsMetadata | None:
    """The card, or None for weights that are not ours."""
    text = (file.metadata() or {}).get("kd")
    if text is None:
        return None
    try:
        said = json.loads(text)
        what = find_error(WeightsMetadata, said)
    except (ValueError, RecursionError):
        what = "it is not JSON"
    if what:
        raise UserError(f"{start}the card in {path} cannot be used ({what})")
    return WeightsMetadata.model_validate(said)


def _read_tensors(
    file: Any, card: WeightsMetadata | None, path: Path, net: nn.Module, start: str
) -> dict[str, Tensor]:
    """The tensors: those of `net`, finite and, where kd wrote them, as they were written."""
    wanted = {name: (list(t.shape), t.is_floating_point()) for name, t in net.state_dict().items()}
    parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    shapes = {name: (part.get_shape(), part.get_dtype() in FLOATS) for name, part in parts.items()}
    for name in sorted(set(wanted) | set(shapes)):
        if wanted.get(name) != shapes.get(name):
            model = "the teacher model" if start else "its card"
            there, here = (_format_shape(of.get(name)) for of in (shapes, wanted))
            raise UserError(
                f"{start}{path} does not fit {model}: {name} is {there} there and {here} in the model"
            )
    tensors = {name: file.get_tensor(name) for name in wanted}
    if card is not None and card.sha256 not in (None, files.checksum(tensors)):
        raise UserError(f"{start}{path} is damaged: its weights are not those that were written")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{start}{path} is of no use: {name} is not finite")
    return tensors


def _format_shape(known: tuple[list[int], bool] | None) -> str:
    return "absent" if known is None else f"{known[0]}" if known[1] else f"{known[0]} of integers"


class Loaded(nn.Module):
    """A trained network with what it needs to be used: `classes`, and `preprocess` for uint8 images."""

    def __init__(self, net: Net, card: dict[str, Any]):
        super().__init__()
        self.net, self.metadata = net, card
        self.classes: tuple[str, ...] = tuple(card["classes"])

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of what `preprocess` gives."""
        return self.net(x)

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 [B, size, size, 3] -> the normalised float32 [B, 3, size, size] that the network takes."""
        mean, std = (torch.tensor(self.metadata[k], device=images.device) for k in ("mean", "std"))
        return augment.normalise(images, mean, std)


def load(path: str | os.PathLike[str]) -> Loaded:
    """The eval-mode student of a finished run (or the network in a .safetensors file that kd wrote).

    **Raises:** UserError when there is none, or its file is damaged.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "student.safetensors"
    if not file.is_file():
        raise UserError(f"{path}: no finished run here (no student.safetensors)")
    with _open(file, "") as opened:
        found = _read_metadata(opened, file, "")
        if found is None:
            raise UserError(f"{file}: these weights were not written by kd (no card)")
        with torch.device("meta"):  # only weights that fit are given room
            empty = _describe(found, file)
        tensors = _read_tensors(opened, found, file, empty, "")
        net = _describe(found, file)
        net.load_state_dict(tensors)
    return Loaded(net, found.model_dump()).eval()


def _describe(card: WeightsMetadata, file: Path) -> Net:
    """The network that the card describes, its weights to be filled in. **Raises:** UserError."""
    nets = []
    for key, said in (
        ("model", card.model),
        ("graft.teacher", card.graft.teacher if card.graft else None),
    ):
        if said is None:
            continue
        kind = models.find(said.get("name"), f"the card in {file}: {key}")
        if what := find_error(kind.Config, said):
            raise UserError(f"the card in {file}: {key}.{what}")
        nets.append(models.blank(kind.Config.model_validate(said), len(card.classes), card.size))
    if card.graft is None:
        return nets[0]
    try:
        return build_grafted(nets[0], nets[1], card.graft, card.size)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"the card in {file}: graft: there is no tap {first_line(error)}"
        ) from error
