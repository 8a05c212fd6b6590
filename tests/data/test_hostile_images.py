"""Hostile or broken images each end in one line; odd ones are read as they look."""

import io
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import is_one_line
from PIL import Image, ImageFile
from torch import Tensor

from kd import cli, data
from kd.core.errors import UserError
from kd.data import imagefolder

SIZE = 8
KEYS = {
    "val_size": None,
    "split_seed": 0,
    "augment": {"crop_padding": 0, "padding_mode": "zeros", "flip": False},
    "mean": None,
    "std": None,
}


def settings(root: Path) -> imagefolder.Config:
    return imagefolder.Config(name="imagefolder", root=str(root), size=SIZE, **KEYS)


def read(root: Path) -> Tensor:
    """The training images, in the order of their names."""
    data.describe(settings(root))
    return imagefolder.read(settings(root)).train_images


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """An image folder of two classes, with one image each in train/ and in test/.

    `x.png` in train/a is free.
    """
    root = tmp_path / "images"
    for split in ("train", "test"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (SIZE, SIZE), (1, 2, 3)).save(root / split / name / "z.png")
    return root


def png(
    width: int, height: int, content: bytes, chunks: tuple[tuple[bytes, bytes], ...] = ()
) -> bytes:
    """A grey PNG of 1 bit, whatever its content is."""

    def chunk(name: bytes, held: bytes) -> bytes:
        return (
            struct.pack(">I", len(held)) + name + held + struct.pack(">I", zlib.crc32(name + held))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    between = b"".join(chunk(*one) for one in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + between + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def zeros(size: int) -> bytes:
    """Compressed zeros, without ever holding them all."""
    packer = zlib.compressobj(1)
    parts = [
        packer.compress(bytes(min(1 << 20, size - start))) for start in range(0, size, 1 << 20)
    ]
    return b"".join(parts) + packer.flush()


def bomb(side: int) -> bytes:
    return png(side, side, zeros(side * (side // 8 + 1)))


def whole() -> bytes:
    out = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(out, "PNG")
    return out.getvalue()


def tiff(path: Path, kind: type) -> None:
    Image.fromarray(np.arange(64, dtype=kind).reshape(8, 8)).save(path.with_suffix(".tif"))


def loop(path: Path) -> None:
    path.symlink_to(path.name)


# How it is made at train/a/x.png, and what the line says.
BAD_IMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda p: p.write_bytes(whole()[:900]), "x.png (image file is truncated"),
    "truncated header": (lambda p: p.write_bytes(whole()[:20]), "x.png ("),
    "empty": (lambda p: p.write_bytes(b""), "x.png has the extension of an image but is empty"),
    "text": (
        lambda p: p.write_text("<html>"),
        "x.png (its content is none of BMP, GIF, JPEG, PNG,",
    ),
    "postscript": (
        lambda p: p.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        "is none of BMP, GIF",
    ),
    "directory": (lambda p: p.mkdir(), "x.png has the extension of an image but is not a file"),
    "pipe": (os.mkfifo, "x.png has the extension of an image but is not a file"),
    "device": (
        lambda p: p.symlink_to("/dev/zero"),
        "x.png has the extension of an image but is not a file",
    ),
    "loop": (loop, "x.png (Too many levels of symbolic links)"),
    "dangling": (lambda p: p.symlink_to("nowhere.png"), "x.png (No such file or directory)"),
    "class that is a loop": (
        lambda p: loop(p.parents[1] / "c"),
        "train/c (Too many levels of symbolic links)",
    ),
    "class that dangles": (
        lambda p: (p.parents[1] / "c").symlink_to("no"),
        "train/c (No such file or directory)",
    ),
    "split that is a loop": (
        lambda p: (shutil.rmtree(p.parents[1]), loop(p.parents[1])),
        "no such folder: ",
    ),
    "integers of 32 bits": (
        lambda p: tiff(p, np.int32),
        "x.tif (its pixels are 32-bit numbers of unknown scale",
    ),
    "floats": (
        lambda p: tiff(p, np.float32),
        "x.tif (its pixels are 32-bit numbers of unknown scale; save",
    ),
    "bomb of 900 megapixels": (
        lambda p: p.write_bytes(bomb(30_000)),
        "(Image size (900000000 pixels) exceeds limit",
    ),
    "bomb of 100 megapixels": (
        lambda p: p.write_bytes(bomb(10_000)),
        "(Image size (100000000 pixels) exceeds limit",
    ),
    "bomb of text": (
        lambda p: p.write_bytes(png(8, 8, zeros(16), ((b"zTXt", b"a\0\0" + zeros(1 << 28)),))),
        "x.png (Decompressed data too large",
    ),
    "name of a file": (
        lambda p: p.with_name("\udcff.png").write_bytes(whole()),
        r"\udcff.png is not valid UTF-8",
    ),
    "name of a class": (
        lambda p: p.parents[1].joinpath("\udcff").mkdir(),
        r"\udcff is not valid UTF-8; rename it",
    ),
    "name with a line": (
        lambda p: p.with_name("a\nb\x1b[2J.png").write_text("x"),
        r"train/a/a\nb\x1b[2J.png (its",
    ),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_a_bad_image_is_one_line(case: str, few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, expected = BAD_IMAGES[case]
    make(few / "train" / "a" / "x.png")
    if "megapixels" in case:
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(UserError) as error:
        read(few)
    line = cli._printable(str(error.value))
    assert line.startswith("data.root: ")
    assert line.isprintable()
    assert expected in line


@pytest.mark.parametrize(
    "case", ["truncated", "pipe", "bomb of 100 megapixels", "name of a file", "name with a line"]
)
def test_a_bad_image_ends_the_command(case: str, few: Path, kd: Callable) -> None:
    make, expected = BAD_IMAGES[case]
    make(few / "train" / "a" / "x.png")
    said = kd(
        "data=imagefolder", f"data.root={few}", f"data.size={SIZE}", "method=standard", "device=cpu"
    )
    assert is_one_line(said, "data.root: ")
    assert expected in said.err


def test_what_may_not_be_read_is_said(
    few: Path, kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests may run as root, whom no permission stops."""
    scandir, image_open = os.scandir, Image.open
    words = (
        "data=imagefolder",
        f"data.root={few}",
        f"data.size={SIZE}",
        "method=standard",
        "device=cpu",
    )

    def closed(path: Any, where: str) -> None:
        if str(getattr(path, "path", path)).endswith(where):
            raise PermissionError(13, "Permission denied", str(getattr(path, "path", path)))

    monkeypatch.setattr(os, "scandir", lambda path: closed(path, "train/b") or scandir(path))
    assert (
        f"kd: data.root: cannot read the folder {few}/train/b (Permission denied)" in kd(*words).err
    )
    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(
        Image, "open", lambda path, **keys: closed(path, "b/z.png") or image_open(path, **keys)
    )
    said = kd(*words)
    assert is_one_line(said, "data.root: ")
    assert f"cannot read the image {few}/train/b/z.png (Permission denied); fix" in said.err


def grey16(path: Path, kind: str) -> None:
    image = Image.fromarray(np.linspace(0, 65535, SIZE * SIZE).astype(kind).reshape(SIZE, SIZE))
    image.save(path)


def pgm16(path: Path) -> None:
    path.write_bytes(b"P5 8 8 65535\n" + np.linspace(0, 65535, 64).astype(">u2").tobytes())


def palette(path: Path) -> None:
    image = Image.new("P", (SIZE, SIZE), 1)
    image.putpalette([0, 0, 0, 250, 10, 20])
    image.putpixel((0, 0), 0)
    image.save(path, transparency=bytes([0, 255]))


def rotated(path: Path) -> None:
    image = Image.new("RGB", (SIZE, SIZE), (0, 0, 255))
    image.putpixel((0, 0), (255, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 3  # by half a turn
    image.save(path, exif=exif)


def moving(path: Path) -> None:
    first, *others = (Image.new("RGB", (SIZE, SIZE), (shade, 0, 0)) for shade in (255, 0, 0))
    first.save(path, save_all=True, append_images=others)


def one(mode: str, colour: Any, size: tuple[int, int] = (SIZE, SIZE)) -> Callable[[Path], None]:
    return lambda path: Image.new(mode, size, colour).save(path)


RAMP = [
    [[round(x / 257)] for x in row]
    for row in np.linspace(0, 65535, 64).astype(int).reshape(8, 8).tolist()
]
# The file, how it is made, and its colour or pixels.
GOOD_IMAGES: dict[str, tuple[str, Callable[[Path], Any], Any]] = {
    "grey": ("x.png", one("L", 7), (7, 7, 7)),
    "grey with alpha": ("x.png", one("LA", (7, 255)), (7, 7, 7)),
    "transparent grey": ("x.png", one("LA", (7, 0)), (255, 255, 255)),
    "alpha": ("x.png", one("RGBA", (200, 100, 0, 255)), (200, 100, 0)),
    "half transparent": ("x.png", one("RGBA", (0, 100, 0, 51)), (204, 224, 204)),
    "palette with alpha": ("x.png", palette, {(0, 0): (255, 255, 255), (0, 1): (250, 10, 20)}),
    "four inks": ("x.jpg", one("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
    "one bit": ("x.png", one("1", 1), (255, 255, 255)),
    "16 bits": ("x.png", lambda p: grey16(p, "<u2"), RAMP),
    "16 bits, pgm": ("x.pgm", pgm16, RAMP),
    "16 bits, tiff": ("x.tif", lambda p: grey16(p, "<u2"), RAMP),
    "rotated": ("x.png", rotated, {(7, 7): (255, 0, 0), (0, 0): (0, 0, 255)}),
    "1 x 1": ("x.png", one("RGB", (9, 8, 7), (1, 1)), (9, 8, 7)),
    "1 x 1000": ("x.png", one("RGB", (9, 8, 7), (1, 1000)), (9, 8, 7)),
    "999 x 3": ("x.bmp", one("RGB", (9, 8, 7), (999, 3)), (9, 8, 7)),
    "moving": ("x.gif", moving, (255, 0, 0)),
    "moving webp": ("x.webp", moving, (255, 0, 0)),
    "spaces": (" x y .png", one("L", 7), (7, 7, 7)),
    "a new line": ("x\ny.png", one("L", 7), (7, 7, 7)),
    "no ASCII": ("é漢😀.PNG", one("L", 7), (7, 7, 7)),
    "html": ("<img src=x onerror=alert(1)>.png", one("L", 7), (7, 7, 7)),
}


@pytest.mark.parametrize("case", GOOD_IMAGES)
def test_an_odd_image_is_read_as_it_looks(case: str, few: Path) -> None:
    name, make, expected = GOOD_IMAGES[case]
    (few / "train" / "a" / "z.png").unlink()
    make(few / "train" / "a" / name)
    image = read(few)[0].int()
    parts = expected.items() if isinstance(expected, dict) else [(slice(None), expected)]
    for where, colour in parts:
        assert (image[where] - torch.tensor(colour)).abs().max() <= (
            3 if name in ("x.jpg", "x.webp") else 1
        )


def test_a_class_may_have_any_name_and_be_a_link(few: Path) -> None:
    names = [
        " a b",
        "<img src=x onerror=alert(1)>",
        "é漢😀",
        "new\nline",
        "-rf",
        "'\"\\",
        "${seed}",
    ]
    for split in ("train", "test"):
        for name in names:
            (few / split / name).symlink_to(few / split / "a", target_is_directory=True)
    found = data.describe(settings(few))
    assert found.classes == tuple(sorted([*names, "a", "b"]))
    assert read(few).shape == (len(names) + 2, SIZE, SIZE, 3)


def test_large_images_are_decoded_one_at_a_time(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(6):
        Image.new("1", (2100, 2100)).save(few / "train" / "a" / f"{i}.png")
    inside = most = 0
    transpose = imagefolder.ImageOps.exif_transpose

    def counted(image: Any) -> Any:
        nonlocal inside, most
        inside += image.width > 1000
        most = max(most, inside)
        found = transpose(image)
        inside -= image.width > 1000
        return found

    monkeypatch.setattr(imagefolder.ImageOps, "exif_transpose", counted)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    read(few)
    assert most == 1


def test_damaged_images_never_end_in_another_error(few: Path) -> None:
    """Bytes of small images of each kind are changed at random."""
    draw = random.Random(0)
    place, refused = few / "train" / "a", 0
    for name in ("x.png", "x.jpg", "x.gif", "x.bmp", "x.tif", "x.webp", "x.ppm"):
        rotated(place / name) if name in ("x.jpg", "x.png", "x.webp") else one("RGB", (1, 200, 3))(
            place / name
        )
        content = (place / name).read_bytes()
        for _ in range(40):
            harmed = bytearray(
                content[: draw.choice([len(content), draw.randrange(1, len(content))])]
            )
            for _ in range(draw.randrange(1, 6)):
                harmed[draw.randrange(len(harmed))] = draw.randrange(256)
            (place / name).write_bytes(harmed)
            try:
                assert imagefolder._decode_all([place / name], SIZE).shape == (1, SIZE, SIZE, 3)
            except UserError:
                refused += 1
    assert refused > 100
