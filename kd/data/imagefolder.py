"""A folder of images: train/<class>/* and test/<class>/*, and val/<class>/* if there is one."""

import hashlib
import os
import stat
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field
from torch import Tensor

from kd.core.errors import UserError
from kd.core.settings import PathText
from kd.data.base import Arrays, DataSettings, Description

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = (
    "BMP",
    "GIF",
    "JPEG",
    "PNG",
    "PPM",
    "TIFF",
    "WEBP",
)  # by content; Pillow would start Ghostscript for others
DECODING = 2  # raise it when the same files would give other pixels
LARGE = (
    1 << 22
)  # pixels; images with more are decoded one at a time, so that memory does not grow with the cores

_large_image_lock = threading.Lock()


class Config(DataSettings):
    """`val_size` null: the val/ folder or, where there is none, a tenth of the training images."""

    name: Literal["imagefolder"]
    root: PathText
    size: int = Field(ge=4, le=1024)


def describe(config: Config) -> Description:
    root = _root(config)
    found = {split: _scan(root / split) for split in ("train", "test")}
    own_val = _is_folder(root / "val")
    if own_val:
        found["val"] = _scan(root / "val")
        if config.val_size is not None:
            raise UserError(
                f"data.val_size: {root} has a val/ folder; use data.val_size=null, or remove the folder"
            )
    for split, classes in found.items():
        if list(classes) != list(found["train"]):
            odd = sorted(set(classes) ^ set(found["train"]))
            raise UserError(
                f"data.root: the classes of {split}/ and train/ differ in {root}: {', '.join(odd)}"
            )
    train = sum(map(len, found["train"].values()))
    val = sum(map(len, found.get("val", {}).values())) if own_val else config.val_size
    digest = hashlib.sha256(f"{DECODING} {config.size}".encode())
    for split, classes in found.items():
        for name, files in classes.items():
            said = "".join(f"{split}/{name}/{file}\0{bytes_}\0" for file, bytes_ in files)
            digest.update(said.encode())
    return Description(
        tuple(found["train"]),
        config.size,
        train,
        train // 10 if val is None else val,
        digest.hexdigest()[:16],
        own_val,
    )


def read(config: Config) -> Arrays:
    root = _root(config)
    parts: list[Tensor] = []
    for split in ("train", "test", "val"):
        if split == "val" and not _is_folder(root / split):
            continue
        classes = _scan(root / split).items()
        files = [
            (root / split / name / p, label)
            for label, (name, c) in enumerate(classes)
            for p, _ in c
        ]
        pixels = _pixels([path for path, _ in files], config.size)
        parts += [torch.from_numpy(pixels), torch.tensor([label for _, label in files])]
    return Arrays(*parts)


def _root(config: Config) -> Path:
    root = Path(config.root).expanduser()
    if not _is_folder(root):
        raise UserError(
            f"data.root: no folder {root}; it must hold train/<class>/* and test/<class>/*"
        )
    return root


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises, as for a name that is too long


def _scan(folder: Path) -> dict[str, list[tuple[str, int]]]:
    """{class: [(name of a file, bytes)]}, both in the order of their names. Plain text: it is done at each start."""
    if not _is_folder(folder):
        raise UserError(
            f"data.root: no folder {folder}; data.root must hold train/<class>/* and test/<class>/*"
        )
    classes = {}
    for entry in _entries(folder):
        if not stat.S_ISDIR(_stat(entry).st_mode):
            continue
        files = [(e.name, _bytes(e)) for e in _entries(entry) if e.name.lower().endswith(ENDINGS)]
        if not files:
            raise UserError(
                f"data.root: the class folder {entry.path} holds no image; fill or remove it"
            )
        classes[entry.name] = files
    if len(classes) < 2:
        raise UserError(
            f"data.root: {folder} holds {len(classes)} class folders; a classifier needs at least 2"
        )
    return classes


def _entries(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    """What lies in a folder and is not hidden, in the order of its names, which are text."""
    try:
        found = sorted(
            (e for e in os.scandir(folder) if not e.name.startswith(".")), key=lambda e: e.name
        )
    except OSError as error:
        raise UserError(
            f"data.root: cannot read the folder {error.filename} ({error.strerror})"
        ) from error
    for entry in found:
        try:
            entry.name.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"data.root: the name of {entry.path} is not valid UTF-8; rename it"
            ) from error
    return found


def _stat(entry: os.DirEntry[str]) -> os.stat_result:
    try:
        return entry.stat()
    except OSError as error:  # of a link that leads nowhere, or round in a circle
        raise UserError(
            f"data.root: cannot read {entry.path} ({error.strerror}); mend or remove it"
        ) from error


def _bytes(entry: os.DirEntry[str]) -> int:
    """The size of an image file. Nothing is opened: opening a pipe would wait for ever."""
    known = _stat(entry)
    if not stat.S_ISREG(known.st_mode) or not known.st_size:
        what = "is empty" if stat.S_ISREG(known.st_mode) else "is not a file"
        raise UserError(
            f"data.root: {entry.path} is named as an image but {what}; mend or remove it"
        )
    return known.st_size


def _pixels(paths: list[Path], size: int) -> np.ndarray:
    """uint8 [N, size, size, 3]: the images at `paths`, decoded by all cores."""
    try:
        pixels = np.empty((len(paths), size, size, 3), np.uint8)
    except MemoryError as error:
        need = f"{len(paths)} images of {size} x {size} pixels need {len(paths) * size**2 * 3 / 1e9:.0f} GB of memory"
        raise UserError(f"data.size: {need}, which is not there; choose a smaller size") from error

    def decode(row: int) -> None:
        pixels[row] = _decode(paths[row], size)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # e.g. of odd EXIF data, with neither file nor line
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(decode, range(len(paths))))
    return pixels


def _decode(path: Path, size: int) -> np.ndarray:
    """uint8 [size, size, 3]: the shorter side brought to `size`, the middle cut out."""
    try:
        with (
            Image.open(path, formats=FORMATS) as file,
            _large_image_lock if file.width * file.height > LARGE else nullcontext(),
        ):
            image = _rgb(ImageOps.exif_transpose(file), file.format)
            if image.size != (size, size):
                image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
            return np.asarray(image)
    except Exception as error:  # decoders raise all kinds; each is the file's fault
        what = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            what = f"its content is none of {', '.join(FORMATS)}"
        raise UserError(
            f"data.root: cannot read the image {path} ({what}); mend or remove it"
        ) from error


def _rgb(image: Image.Image, kind: str | None) -> Image.Image:
    """8 bits a channel: of 16 the upper, what is transparent on white."""
    if image.mode.startswith("I;16") or (
        image.mode == "I" and kind in ("PNG", "PPM")
    ):  # the latter: 16 bits as 32
        image = Image.fromarray(
            ((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8)
        )
    elif image.mode in ("I", "F"):
        raise ValueError(
            "its pixels are 32-bit numbers, whose scale is not known; save it with 8 bits a channel"
        )
    if "transparency" not in image.info and image.mode not in ("LA", "PA", "RGBA", "RGBa"):
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white
