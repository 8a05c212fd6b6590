"""A folder of images: train/<class>/* and test/<class>/*, and val/<class>/* if there is one."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import Field
from torch import Tensor

from kd.data.base import Arrays, DataSettings, Description
from kd.settings import UserError

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Config(DataSettings):
    """`val_size` null: the val/ folder or, where there is none, a tenth of the training images."""

    name: Literal["imagefolder"]
    root: str = Field(min_length=1)
    size: int = Field(ge=4, le=1024)


def describe(config: Config) -> Description:
    root = _root(config)
    found = {split: _scan(root / split) for split in ("train", "test")}
    own_val = (root / "val").is_dir()
    if own_val:
        found["val"] = _scan(root / "val")
        if config.val_size is not None:
            raise UserError(f"data.val_size: {root} has a val/ folder; use data.val_size=null, or remove the folder")
    for split, classes in found.items():
        if list(classes) != list(found["train"]):
            odd = sorted(set(classes) ^ set(found["train"]))
            raise UserError(f"data.root: the classes of {split}/ and train/ differ in {root}: {', '.join(odd)}")
    train = sum(map(len, found["train"].values()))
    val = sum(map(len, found.get("val", {}).values())) if own_val else config.val_size
    digest = hashlib.sha256(str(config.size).encode())
    for split, classes in found.items():
        for name, files in classes.items():
            said = "".join(f"{split}/{name}/{file}\0{bytes_}\0" for file, bytes_ in files)
            digest.update(said.encode(errors="surrogateescape"))
    return Description(
        tuple(found["train"]), config.size, train, train // 10 if val is None else val, digest.hexdigest()[:16], own_val
    )


def read(config: Config) -> Arrays:
    root = _root(config)
    parts: list[Tensor] = []
    for split in ("train", "test", "val"):
        if split == "val" and not (root / split).is_dir():
            continue
        classes = _scan(root / split).items()
        files = [(root / split / name / p, label) for label, (name, c) in enumerate(classes) for p, _ in c]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            pixels = list(pool.map(lambda item: _decode(item[0], config.size), files, chunksize=64))
        parts += [torch.from_numpy(np.stack(pixels)), torch.tensor([label for _, label in files])]
    return Arrays(*parts)


def _root(config: Config) -> Path:
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise UserError(f"data.root: no folder {root}; it must hold train/<class>/* and test/<class>/*")
    return root


def _scan(folder: Path) -> dict[str, list[tuple[str, int]]]:
    """{class: [(name of a file, bytes)]}, both in the order of their names. Plain text: it is done at each start."""
    if not folder.is_dir():
        raise UserError(f"data.root: no folder {folder}; data.root must hold train/<class>/* and test/<class>/*")
    classes = {}
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        files = [e for e in os.scandir(entry) if e.name.lower().endswith(ENDINGS) and not e.name.startswith(".")]
        if not files:
            raise UserError(f"data.root: the class folder {entry.path} holds no image; fill or remove it")
        classes[entry.name] = sorted((e.name, e.stat().st_size) for e in files)
    if len(classes) < 2:
        raise UserError(f"data.root: {folder} holds {len(classes)} class folders; a classifier needs at least 2")
    return classes


def _decode(path: Path, size: int) -> np.ndarray:
    """uint8 [size, size, 3]: the shorter side brought to `size`, the middle cut out."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
            if image.size != (size, size):
                image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
            return np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"data.root: cannot read the image {path} ({error}); mend or remove it") from error
