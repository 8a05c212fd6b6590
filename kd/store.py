"""Weights on disk: safetensors with a card (architecture, classes, normalisation), never a pickle."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from kd import files, models, views
from kd.models.base import Net
from kd.settings import UserError


def save(net: Net, path: Path, card: dict[str, Any]) -> None:
    """Write `net`'s weights and its card. **Raises:** OSError."""
    tensors = net.state_dict()
    with files.aside(path) as part:
        # one entry of metadata: safetensors writes several in any order, and equal weights shall be equal files
        files.save(tensors, part, {"kd": json.dumps({**card, "sha256": files.checksum(tensors)})})


def card(model: dict[str, Any], classes: tuple[str, ...], size: int, mean: Tensor, std: Tensor) -> dict[str, Any]:
    """What must be known, beside the weights, to build a network again and to feed it."""
    return {"model": model, "classes": list(classes), "size": size, "mean": mean.tolist(), "std": std.tolist()}


def read_card(path: Path) -> tuple[dict[str, Any] | None, dict[str, list[int]]]:
    """(the card, or None for weights that are not ours; {tensor: shape}); no tensor is read. **Raises:** UserError."""
    if not path.is_file():
        raise UserError(f"teacher.checkpoint: no file {path}")
    with open(path, "rb") as file:
        start = file.read(2)
    if start in (b"PK", b"\x80\x02", b"\x80\x04"):
        raise UserError(
            f"teacher.checkpoint: {path} is a pickle, which could run code when read; "
            "save the state_dict with safetensors.torch.save_file"
        )
    try:
        with safe_open(path, framework="pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
            text = (opened.metadata() or {}).get("kd")
        return (json.loads(text) if text else None), shapes
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(
            f"teacher.checkpoint: {path} is not a whole safetensors file ({str(error).splitlines()[0]})"
        ) from error


def check(path: Path, net: Net, classes: tuple[str, ...], size: int) -> None:
    """Raise UserError unless the weights at `path` fit `net`, these classes and this image size."""
    found, shapes = read_card(path)
    if found is not None and len(found["classes"]) != len(classes):
        raise UserError(
            f"teacher.checkpoint: {path} knows {len(found['classes'])} classes, the data has {len(classes)}; "
            "teacher and student must share them"
        )
    if found is not None and found["size"] != size:
        raise UserError(
            f"teacher.checkpoint: {path} takes images of {found['size']} pixels, the data has {size}; "
            "teacher and student must see the same"
        )
    wanted = {name: list(tensor.shape) for name, tensor in net.state_dict().items()}
    for name in sorted(set(wanted) | set(shapes)):
        if wanted.get(name) != shapes.get(name):
            raise UserError(
                f"teacher.checkpoint: {path} does not fit the teacher model: {name} is "
                f"{shapes.get(name, 'absent')} there and {wanted.get(name, 'absent')} in the model"
            )


def fill(net: nn.Module, path: Path) -> None:
    """Load the weights at `path` into `net`."""
    net.load_state_dict(load_file(path))


class Loaded(nn.Module):
    """A trained network with what it needs to be used: `classes`, and `preprocess` for uint8 images."""

    def __init__(self, net: Net, card: dict[str, Any]):
        super().__init__()
        self.net, self.card = net, card
        self.classes: tuple[str, ...] = tuple(card["classes"])

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of what `preprocess` gives."""
        return self.net(x)

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 [B, size, size, 3] -> the normalised float32 [B, 3, size, size] that the network takes."""
        mean, std = (torch.tensor(self.card[k], device=images.device) for k in ("mean", "std"))
        return views.normalise(images, mean, std)


def load(path: str | os.PathLike[str]) -> Loaded:
    """The eval-mode student of a finished run (or the network in a .safetensors file that kd wrote).

    **Raises:** UserError when there is none, or its file is damaged.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "student.safetensors"
    if not file.is_file():
        raise UserError(f"{path}: no finished run here (no student.safetensors)")
    found, _ = read_card(file)
    if found is None:
        raise UserError(f"{file}: these weights were not written by kd (no card)")
    settings = models.find(found["model"]["name"], "model").Config(**found["model"])
    net = models.build(settings, len(found["classes"]), found["size"])
    fill(net, file)
    return Loaded(net, found).eval()
