"""A folder of images: train/<class>/*, test/<class>/* and, optionally, val/<class>/*."""

import hashlib
import os
import stat
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field
from torch import Tensor

from kd.core.errors import UserError
from kd.core.settings import Effect, PathText
from kd.data.base import Arrays, DataSettings, Description

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# detected from the content; for other formats Pillow would start Ghostscript
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
DECODER_VERSION = 2  # increase it when the same files would decode to other pixels
# images with more pixels are decoded one at a time, so that memory does not grow with the cores
LARGE_IMAGE_PIXELS = 1 << 22

ClassFiles = dict[str, list[tuple[str, int]]]  # {class: [(file name, size in bytes)]}

_large_image_lock = threading.Lock()


class Config(DataSettings):
    """The keys of an image folder.

    `val_size` null uses the val/ folder or, without one, a tenth of the training images.
    """

    name: Literal["imagefolder"]
    root: Annotated[PathText, Effect.NONE]  # the content identifies the data
    size: int = Field(ge=4, le=1024)


def describe(config: Config) -> Description:
    """List the files and check the folder; no image is opened.

    Raises:
        UserError: The folder cannot be used.
    """
    root = _find_root(config)
    splits = {split: _scan(root / split) for split in ("train", "test")}
    own_val = _is_folder(root / "val")
    if own_val:
        splits["val"] = _scan(root / "val")
        if config.val_size is not None:
            raise UserError(
                f"data.val_size: {root} has a val/ folder; "
                "use data.val_size=null, or remove the folder"
            )
    for split, classes in splits.items():
        if list(classes) != list(splits["train"]):
            unmatched = sorted(set(classes) ^ set(splits["train"]))
            raise UserError(
                f"data.root: the classes of {split}/ and train/ differ in {root}: "
                f"{', '.join(unmatched)}"
            )
    train = sum(map(len, splits["train"].values()))
    val = sum(map(len, splits.get("val", {}).values())) if own_val else config.val_size
    return Description(
        tuple(splits["train"]),
        config.size,
        train,
        train // 10 if val is None else val,
        _fingerprint(splits, config.size),
        own_val,
    )


def _fingerprint(splits: dict[str, ClassFiles], size: int) -> str:
    digest = hashlib.sha256(f"{DECODER_VERSION} {size}".encode())
    for split, classes in splits.items():
        for name, files in classes.items():
            lines = "".join(f"{split}/{name}/{file}\0{file_size}\0" for file, file_size in files)
            digest.update(lines.encode())
    return digest.hexdigest()[:16]


def read(config: Config) -> Arrays:
    """Decode all images.

    Raises:
        UserError: A file cannot be read, or the images do not fit into memory.
    """
    root = _find_root(config)
    arrays: list[Tensor] = []
    for split in ("train", "test", "val"):
        if split == "val" and not _is_folder(root / split):
            continue
        paths: list[Path] = []
        labels: list[int] = []
        for label, (name, files) in enumerate(_scan(root / split).items()):
            paths += [root / split / name / file for file, _ in files]
            labels += [label] * len(files)
        arrays += [torch.from_numpy(_decode_all(paths, config.size)), torch.tensor(labels)]
    return Arrays(*arrays)


def _find_root(config: Config) -> Path:
    root = Path(config.root).expanduser()
    if not _is_folder(root):
        raise UserError(
            f"data.root: no such folder: {root}; it must contain train/<class>/* and test/<class>/*"
        )
    return root


def _is_folder(path: Path) -> bool:
    # unlike Path.is_dir this does not raise, for example for a name that is too long
    return os.path.isdir(path)  # noqa: PTH112


def _scan(folder: Path) -> ClassFiles:
    """List the image files of each class. Classes and files are in the order of their names.

    File names stay plain strings, which is fast: the folder is scanned at every start.
    """
    if not _is_folder(folder):
        raise UserError(
            f"data.root: no such folder: {folder}; "
            "data.root must contain train/<class>/* and test/<class>/*"
        )
    classes = {}
    for entry in _visible_entries(folder):
        if not stat.S_ISDIR(_stat(entry).st_mode):
            continue
        files = [
            (file.name, _image_size(file))
            for file in _visible_entries(entry)
            if file.name.lower().endswith(EXTENSIONS)
        ]
        if not files:
            raise UserError(
                f"data.root: the class folder {entry.path} has no images; add some or remove it"
            )
        classes[entry.name] = files
    if len(classes) < 2:
        raise UserError(
            f"data.root: {folder} has {len(classes)} class folders; a classifier needs at least 2"
        )
    return classes


def _visible_entries(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    """List what is in a folder and not hidden, sorted by name. Names must be valid UTF-8."""
    try:
        visible = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(
            f"data.root: cannot read the folder {error.filename} ({error.strerror})"
        ) from error
    entries = sorted(visible, key=lambda entry: entry.name)
    for entry in entries:
        try:
            entry.name.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"data.root: the name of {entry.path} is not valid UTF-8; rename it"
            ) from error
    return entries


def _stat(entry: os.DirEntry[str]) -> os.stat_result:
    try:
        return entry.stat()
    except OSError as error:  # such as a symbolic link that is dangling or circular
        raise UserError(
            f"data.root: cannot read {entry.path} ({error.strerror}); fix or remove it"
        ) from error


def _image_size(entry: os.DirEntry[str]) -> int:
    """Return the size of an image file in bytes. The file is not opened: a pipe would block."""
    status = _stat(entry)
    if not stat.S_ISREG(status.st_mode) or not status.st_size:
        problem = "is empty" if stat.S_ISREG(status.st_mode) else "is not a file"
        raise UserError(
            f"data.root: {entry.path} has the extension of an image but {problem}; fix or remove it"
        )
    return status.st_size


def _decode_all(paths: list[Path], size: int) -> np.ndarray:
    """Decode the images at `paths` on all cores. uint8 [N, size, size, 3]."""
    try:
        pixels = np.empty((len(paths), size, size, 3), np.uint8)
    except MemoryError as error:
        gigabytes = len(paths) * size**2 * 3 / 1e9
        raise UserError(
            f"data.size: {len(paths)} images of {size} x {size} pixels need {gigabytes:.0f} GB "
            "of memory, more than is available; choose a smaller size"
        ) from error

    def decode(row: int) -> None:
        pixels[row] = _decode(paths[row], size)

    with warnings.catch_warnings():
        # Pillow warns, for example about odd EXIF data, without naming the file
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(decode, range(len(paths))))
    return pixels


def _decode(path: Path, size: int) -> np.ndarray:
    """Decode an image, scale its shorter side to `size` and crop the centre. [size, size, 3]."""
    try:
        with (
            Image.open(path, formats=FORMATS) as file,
            _large_image_lock if file.width * file.height > LARGE_IMAGE_PIXELS else nullcontext(),
        ):
            image = _to_rgb(ImageOps.exif_transpose(file), file.format)
            if image.size != (size, size):
                image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
            return np.asarray(image)
    except Exception as error:  # decoders raise many types; the file is always the cause
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"its content is none of {', '.join(FORMATS)}"
        raise UserError(
            f"data.root: cannot read the image {path} ({reason}); fix or remove it"
        ) from error


def _to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    """Convert to 8-bit RGB. 16-bit values are rounded to 8 bits, transparency becomes white."""
    # Pillow reads some 16-bit files into 32-bit pixels
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        scaled = (np.asarray(image).astype(np.uint32) + 128) // 257
        image = Image.fromarray(scaled.astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(
            "its pixels are 32-bit numbers of unknown scale; save it with 8 bits per channel"
        )
    if "transparency" not in image.info and image.mode not in ("LA", "PA", "RGBA", "RGBa"):
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white
