"""Files and words that mean harm, or are merely broken: each ends in one line, and none is obeyed."""

import io
import json
import os
import pickle
import random
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from safetensors.torch import load_file, save_file
from torch import Tensor

import kd as package
from kd import cli, config, data, models, store, teacher
from kd.data import imagefolder
from kd.device import resolve
from kd.settings import UserError

SIZE = 8
KEYS = {"val_size": None, "split_seed": 0, "augment": {"crop": 0, "padding": "zeros", "flip": False},
        "mean": None, "std": None}  # fmt: skip


def is_one_line(said: Any, start: str) -> bool:
    text = said.err.removesuffix("\n")
    return said.code == 2 and text.startswith(f"kd: {start}") and text.isprintable()


def settings(root: Path) -> imagefolder.Config:
    return imagefolder.Config(name="imagefolder", root=str(root), size=SIZE, **KEYS)


def read(root: Path) -> Tensor:
    """The training images, in the order of their names."""
    data.describe(settings(root))
    return imagefolder.read(settings(root)).train_images


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """An image folder of two classes, one image each in train/ and in test/; `x.png` in train/a is free."""
    root = tmp_path / "images"
    for split in ("train", "test"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (SIZE, SIZE), (1, 2, 3)).save(root / split / name / "z.png")
    return root


def png(width: int, height: int, content: bytes, chunks: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    """A grey PNG of 1 bit, whatever its content is."""

    def chunk(name: bytes, held: bytes) -> bytes:
        return struct.pack(">I", len(held)) + name + held + struct.pack(">I", zlib.crc32(name + held))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    between = b"".join(chunk(*one) for one in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + between + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def zeros(size: int) -> bytes:
    """Compressed zeros, without ever holding them all."""
    packer = zlib.compressobj(1)
    parts = [packer.compress(bytes(min(1 << 20, size - start))) for start in range(0, size, 1 << 20)]
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


BAD_IMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {  # made at train/a/x.png: what the line says
    "truncated": (lambda p: p.write_bytes(whole()[:900]), "x.png (image file is truncated"),
    "truncated header": (lambda p: p.write_bytes(whole()[:20]), "x.png ("),
    "empty": (lambda p: p.write_bytes(b""), "x.png is named as an image but is empty"),
    "text": (lambda p: p.write_text("<html>"), "x.png (its content is none of BMP, GIF, JPEG, PNG,"),
    "postscript": (lambda p: p.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "is none of BMP, GIF"),
    "directory": (lambda p: p.mkdir(), "x.png is named as an image but is not a file"),
    "pipe": (os.mkfifo, "x.png is named as an image but is not a file"),
    "device": (lambda p: p.symlink_to("/dev/zero"), "x.png is named as an image but is not a file"),
    "loop": (loop, "x.png (Too many levels of symbolic links)"),
    "dangling": (lambda p: p.symlink_to("nowhere.png"), "x.png (No such file or directory)"),
    "class that is a loop": (lambda p: loop(p.parents[1] / "c"), "train/c (Too many levels of symbolic links)"),
    "class that dangles": (lambda p: (p.parents[1] / "c").symlink_to("no"), "train/c (No such file or directory)"),
    "split that is a loop": (lambda p: (shutil.rmtree(p.parents[1]), loop(p.parents[1])), "no folder "),
    "integers of 32 bits": (lambda p: tiff(p, np.int32), "x.tif (its pixels are 32-bit numbers, whose scale"),
    "floats": (lambda p: tiff(p, np.float32), "x.tif (its pixels are 32-bit numbers, whose scale is not known; save"),
    "bomb of 900 megapixels": (lambda p: p.write_bytes(bomb(30_000)), "(Image size (900000000 pixels) exceeds limit"),
    "bomb of 100 megapixels": (lambda p: p.write_bytes(bomb(10_000)), "(Image size (100000000 pixels) exceeds limit"),
    "bomb of text": (
        lambda p: p.write_bytes(png(8, 8, zeros(16), ((b"zTXt", b"a\0\0" + zeros(1 << 28)),))),
        "x.png (Decompressed data too large",
    ),
    "name of a file": (lambda p: p.with_name("\udcff.png").write_bytes(whole()), r"\udcff.png is not valid UTF-8"),
    "name of a class": (lambda p: p.parents[1].joinpath("\udcff").mkdir(), r"\udcff is not valid UTF-8; rename it"),
    "name with a line": (lambda p: p.with_name("a\nb\x1b[2J.png").write_text("x"), r"train/a/a\nb\x1b[2J.png (its"),
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


@pytest.mark.parametrize("case", ["truncated", "pipe", "bomb of 100 megapixels", "name of a file", "name with a line"])
def test_a_bad_image_ends_the_command(case: str, few: Path, kd: Callable) -> None:
    make, expected = BAD_IMAGES[case]
    make(few / "train" / "a" / "x.png")
    said = kd("data=imagefolder", f"data.root={few}", f"data.size={SIZE}", "method=standard", "device=cpu")
    assert is_one_line(said, "data.root: ")
    assert expected in said.err


def test_what_may_not_be_read_is_said(few: Path, kd: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, whom no permission stops."""
    scandir, image_open = os.scandir, Image.open
    words = ("data=imagefolder", f"data.root={few}", f"data.size={SIZE}", "method=standard", "device=cpu")

    def closed(path: Any, where: str) -> None:
        if str(getattr(path, "path", path)).endswith(where):
            raise PermissionError(13, "Permission denied", str(getattr(path, "path", path)))

    monkeypatch.setattr(os, "scandir", lambda path: closed(path, "train/b") or scandir(path))
    assert f"kd: data.root: cannot read the folder {few}/train/b (Permission denied)" in kd(*words).err
    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(Image, "open", lambda path, **keys: closed(path, "b/z.png") or image_open(path, **keys))
    said = kd(*words)
    assert is_one_line(said, "data.root: ")
    assert f"cannot read the image {few}/train/b/z.png (Permission denied); mend" in said.err


def grey16(path: Path, kind: str) -> None:
    image = Image.fromarray(np.linspace(0, 65535, SIZE * SIZE).astype(kind).reshape(SIZE, SIZE))
    image.save(path)


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


RAMP = [[[round(x / 257)] for x in row] for row in np.linspace(0, 65535, 64).astype(int).reshape(8, 8).tolist()]
GOOD_IMAGES: dict[str, tuple[str, Callable[[Path], Any], Any]] = {  # name: file, how it is made, its colour or pixels
    "grey": ("x.png", one("L", 7), (7, 7, 7)),
    "grey with alpha": ("x.png", one("LA", (7, 255)), (7, 7, 7)),
    "transparent grey": ("x.png", one("LA", (7, 0)), (255, 255, 255)),
    "alpha": ("x.png", one("RGBA", (200, 100, 0, 255)), (200, 100, 0)),
    "half transparent": ("x.png", one("RGBA", (0, 100, 0, 51)), (204, 224, 204)),
    "palette with alpha": ("x.png", palette, {(0, 0): (255, 255, 255), (0, 1): (250, 10, 20)}),
    "four inks": ("x.jpg", one("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
    "one bit": ("x.png", one("1", 1), (255, 255, 255)),
    "16 bits": ("x.png", lambda p: grey16(p, "<u2"), RAMP),
    "16 bits, pgm": ("x.pgm", lambda p: p.write_bytes(
        b"P5 8 8 65535\n" + np.linspace(0, 65535, 64).astype(">u2").tobytes()), RAMP),
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
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD_IMAGES)
def test_an_odd_image_is_read_as_it_looks(case: str, few: Path) -> None:
    name, make, expected = GOOD_IMAGES[case]
    (few / "train" / "a" / "z.png").unlink()
    make(few / "train" / "a" / name)
    image = read(few)[0].int()
    parts = expected.items() if isinstance(expected, dict) else [(slice(None), expected)]
    for where, colour in parts:
        assert (image[where] - torch.tensor(colour)).abs().max() <= (3 if name in ("x.jpg", "x.webp") else 1)


def test_a_class_may_have_any_name_and_be_a_link(few: Path) -> None:
    names = [" a b", "<img src=x onerror=alert(1)>", "é漢😀", "new\nline", "-rf", "'\"\\", "${seed}"]
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
        rotated(place / name) if name in ("x.jpg", "x.png", "x.webp") else one("RGB", (1, 200, 3))(place / name)
        content = (place / name).read_bytes()
        for _ in range(40):
            harmed = bytearray(content[: draw.choice([len(content), draw.randrange(1, len(content))])])
            for _ in range(draw.randrange(1, 6)):
                harmed[draw.randrange(len(harmed))] = draw.randrange(256)
            (place / name).write_bytes(harmed)
            try:
                assert imagefolder._pixels([place / name], SIZE).shape == (1, SIZE, SIZE, 3)
            except UserError:
                refused += 1
    assert refused > 100


# ---- weights


def net(scale: int = 1, classes: int = 2, size: int = SIZE) -> models.Net:
    torch.manual_seed(0)
    said = {"name": "cnn", "scale": scale, "activation": "relu", "dropout": 0.5}
    return models.build(models.find("cnn", "model").Config(**said), classes, size)


CARD = store.card(
    {"name": "cnn", "scale": 1, "activation": "relu", "dropout": 0.5}, ("a", "b"), SIZE, torch.zeros(3), torch.ones(3)
)


def saved(path: Path, **changes: Any) -> Path:
    """The weights of a small network, with a card in which something may be wrong."""
    store.save(net(), path, {**CARD, **changes})
    return path


def carded(path: Path, text: str) -> None:
    save_file(net().state_dict(), path, {"kd": text})


def changed(path: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    save_file({name: change(name, t).contiguous() for name, t in net().state_dict().items()}, path)


def headed(path: Path, size: int) -> None:
    content = bytearray(saved(path).read_bytes())
    content[:8] = struct.pack("<Q", size)
    path.write_bytes(content)


class Trap:
    """Unpickled, it makes a folder."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("sprung",)


def poisoned(name: str, t: Tensor, value: float) -> Tensor:
    t = t.clone()
    if name == "stages.head.1.bias":
        t[1] = value
    return t


def flipped(path: Path, place: int = -1, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


BROKEN, PICKLE = "is not a whole safetensors file (", "is a pickle, which could run code when read"
BAD_WEIGHTS: dict[str, tuple[Callable[[Path], Any], str]] = {  # how they are made: what the line says
    "a bit flipped": (lambda p: flipped(saved(p)), "is damaged: its weights are not those that were written"),
    "truncated": (lambda p: p.write_bytes(saved(p).read_bytes()[:-1]), BROKEN),
    "longer": (lambda p: p.write_bytes(saved(p).read_bytes() + b"1"), BROKEN),
    "huge header": (lambda p: headed(p, 2**63), BROKEN),
    "header longer than the file": (lambda p: headed(p, 1 << 20), BROKEN),
    "no header": (lambda p: headed(p, 0), BROKEN),
    "no content": (lambda p: p.write_bytes(b""), BROKEN),
    "text": (lambda p: p.write_text("weights: 1"), BROKEN),
    "folder": (lambda p: p.mkdir(), "no file {path}, but a folder"),
    "absent": (lambda p: None, "no file {path}"),
    "pipe": (os.mkfifo, "no file {path}"),
    "loop": (loop, "no file {path}"),
    "pickle 0": (lambda p: p.write_bytes(pickle.dumps(Trap(), 0)), BROKEN),
    "pickle 2": (lambda p: p.write_bytes(pickle.dumps(Trap(), 2)), PICKLE),
    "pickle 5": (lambda p: p.write_bytes(pickle.dumps(Trap(), 5)), PICKLE),
    "torch.save": (lambda p: torch.save(Trap(), p), PICKLE),
    "integers": (lambda p: changed(p, lambda _, t: t.int()), "of integers there and ["),
    "not a number": (lambda p: changed(p, lambda n, t: poisoned(n, t, float("nan"))), "head.1.bias is not finite"),
    "infinite": (lambda p: changed(p, lambda n, t: poisoned(n, t, float("inf"))), "head.1.bias is not finite"),
    "too large": (lambda p: save_file(net(2).state_dict(), p), "is [2, 3, 3, 3] there and [1, 3, 3, 3] in the model"),
    "one tensor more": (lambda p: save_file({**net().state_dict(), "x": torch.ones(1)}, p), "x is [1] there and abs"),
    "no tensor": (lambda p: save_file({}, p), "is absent there and"),
    "other classes": (lambda p: store.save(net(1, 3), p, {**CARD, "classes": ["a", "b", "c"]}), "knows 3 classes"),
    "other size": (lambda p: store.save(net(1, 2, 16), p, {**CARD, "size": 16}), "takes images of 16 pixels"),
}
BAD_CARDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not JSON": (lambda p: carded(p, "{"), "cannot be used (it is not JSON)"),
    "deep": (lambda p: carded(p, "[" * 100_000), "cannot be used (it is not JSON)"),
    "a list": (lambda p: carded(p, "[]"), "cannot be used (all: should be a valid dictionary"),
    "null": (lambda p: carded(p, "null"), "cannot be used (all: should be a valid dictionary"),
    "empty": (lambda p: carded(p, "{}"), "cannot be used (model: Field required)"),
    "model of a wrong type": (lambda p: saved(p, model="cnn"), "cannot be used (model: should be a valid dictionary"),
    "classes of a wrong type": (lambda p: saved(p, classes=[1, 2]), "(classes.0: should be a valid string)"),
    "no class": (lambda p: saved(p, classes=[]), "(classes: List should have at least 1 item"),
    "size of a wrong type": (lambda p: saved(p, size="8"), "(size: should be a valid integer)"),
    "huge size": (lambda p: saved(p, size=10**9), "(size: should be less than or equal to 4096)"),
    "mean of two": (lambda p: saved(p, mean=[0.0, 0.0]), "(mean: List should have at least 3 items"),
    "mean that is no number": (lambda p: saved(p, mean=[float("nan"), 0.0, 0.0]), "(mean.0: should be a finite numb"),
    "std of 1e400": (lambda p: carded(p, json.dumps(CARD).replace("1.0", "1e400", 1)), "(std.0: should be a finite"),
    "sum of a wrong type": (
        lambda p: carded(p, json.dumps({**CARD, "sha256": 1})),
        "(sha256: should be a valid string",
    ),
}
BAD_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "nameless": ({}, "None is not known; allowed: cnn"),
    "unknown": ({"name": "nope"}, "'nope' is not known; allowed: cnn"),
    "a path": ({"name": "../x"}, "'../x' is not known; allowed: cnn"),
    "a list": ({"name": ["cnn"]}, "['cnn'] is not known; allowed: cnn"),
    "no model": ({"name": "base"}, "'base' is not known; allowed: cnn"),
    "no scale": ({"name": "cnn"}, "model.scale: Field required"),
    "huge": ({**CARD["model"], "scale": 10**6}, "model.scale: Input should be less than or equal to 1024"),
    "large": ({**CARD["model"], "scale": 1024}, "does not fit its card: stages.conv1.0.weight is [1, 3, 3, 3] there"),
}


@pytest.mark.parametrize("case", [*BAD_WEIGHTS, *BAD_CARDS])
def test_bad_weights_of_a_teacher_are_one_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, expected = {**BAD_WEIGHTS, **BAD_CARDS}[case]
    path = tmp_path / "weights.safetensors"
    monkeypatch.chdir(tmp_path)
    make(path)
    with pytest.raises(UserError) as error:
        store.check(path, net(), ("a", "b"), SIZE)
    line = str(error.value)
    assert line.startswith("teacher.checkpoint: ")
    assert expected.format(path=path) in line
    assert line.isprintable()
    assert not Path("sprung").exists()


@pytest.mark.parametrize("case", ["a bit flipped", "pickle 2", "not JSON"])
def test_bad_weights_end_the_command(case: str, tmp_path: Path, kd: Callable) -> None:
    make, expected = {**BAD_WEIGHTS, **BAD_CARDS}[case]
    make(tmp_path / "w")
    if case == "a bit flipped":
        store.save(net(1, 10, 32), tmp_path / "w", {**CARD, "classes": list("0123456789"), "size": 32})
        flipped(tmp_path / "w")
    said = kd("data=digits", "method=logits", "teacher.scale=1", f"teacher.checkpoint={tmp_path / 'w'}")
    assert is_one_line(said, "teacher.checkpoint: ")
    assert expected in said.err
    assert not list(Path().iterdir())


@pytest.mark.parametrize("case", ["a bit flipped", "truncated", "torch.save", "integers", "not a number", *BAD_CARDS])
def test_bad_weights_are_not_loaded(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, expected = {**BAD_WEIGHTS, **BAD_CARDS}[case]
    monkeypatch.chdir(tmp_path)
    make(Path("w"))
    if case in ("integers", "not a number"):
        save_file({name: t.clone() for name, t in load_file("w").items()}, "w", {"kd": json.dumps(CARD)})
    with pytest.raises(UserError) as error:
        package.load("w")
    assert expected in str(error.value)
    assert str(error.value).startswith(("w ", "the card in w "))
    assert not Path("sprung").exists()


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_bad_model_in_a_card_is_not_built(case: str, tmp_path: Path) -> None:
    model, expected = BAD_MODELS[case]
    with pytest.raises(UserError) as error:
        package.load(saved(tmp_path / "w", model=model))
    assert expected in str(error.value)
    assert str(error.value).isprintable()


def test_other_sound_weights_are_taken(tmp_path: Path) -> None:
    """Those of an earlier kd, of other programs, in half precision, and with any length of header."""
    wanted, path = net().state_dict(), tmp_path / "w"
    ways: list[Callable[[], Any]] = [
        lambda: saved(path),
        lambda: carded(path, json.dumps(CARD)),
        lambda: carded(path, json.dumps({**CARD, "more": 1})),
        lambda: save_file(wanted, path),
        lambda: changed(path, lambda _, t: t.half() if t.is_floating_point() else t),
    ]
    for way in ways:
        way()
        other = net()
        torch.nn.init.zeros_(other.head[1].weight)
        store.check(path, other, ("a", "b"), SIZE)
        store.fill(other, path)
        assert all(torch.allclose(t, wanted[name], atol=1e-3) for name, t in other.state_dict().items())
    for length in (0x4B50, 0x2480):  # such a file begins as a zip archive, or as a pickle does
        save_file(wanted, path, {"x": ""})
        missing = length - struct.unpack("<Q", path.read_bytes()[:8])[0]
        save_file(wanted, path, {"x": "x" * missing})
        assert struct.unpack("<Q", path.read_bytes()[:8])[0] == length
        store.check(path, net(), ("a", "b"), SIZE)


def test_weights_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "w")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as closed:
        closed.setattr("builtins.open", refuse)
        with pytest.raises(UserError, match=r"^teacher\.checkpoint: cannot read .*/w \(Permission denied\)$"):
            store.check(path, net(), ("a", "b"), SIZE)
        with pytest.raises(UserError, match=r"^teacher: cannot read its weights in .*/w \(Permission denied\)$"):
            config.file_digest(path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    denied = PermissionError(13, "Permission denied", str(path))
    assert cli._explain(denied) == (2, f"cannot read {path} (Permission denied)")
    assert "cannot write to" in str(cli._explain(PermissionError(13, "Permission denied", str(path) + "x"))[1])


def test_a_teachers_own_run_that_was_damaged(composed: Callable, tmp_path: Path) -> None:
    made = composed("method=logits", "teacher.scale=1", "data.val_size=0")
    images = data.load(made.data, made.described, tmp_path / "cache", torch.device("cpu"))
    store.save(net(1, 10, 32), tmp_path / "w", {**CARD, "classes": list("0123456789"), "size": 32})
    device, trained = resolve("cpu", "fp32", tmp_path), {"metrics": {}}
    assert teacher.load(made, images, device, tmp_path / "w", trained).net
    flipped(tmp_path / "w")
    with pytest.raises(UserError, match=r"^teacher: .*/w is damaged: .*; when .* is removed, the teacher is trained "):
        teacher.load(made, images, device, tmp_path / "w", trained)


def test_no_damage_is_silent(tmp_path: Path) -> None:
    """A file cut, or with a bit flipped, at 200 places gives the same weights or a UserError."""
    draw, path, wanted = random.Random(0), tmp_path / "w", net().state_dict()
    content, kept, refused = saved(path).read_bytes(), 0, 0
    header = struct.unpack("<Q", content[:8])[0] + 8

    def filled() -> models.Net:
        other = net()
        store.fill(other, path)
        return other

    for number in range(200):
        path.write_bytes(content if number % 4 else content[: draw.randrange(len(content))])
        if number % 4 and number > 1:
            flipped(path, draw.randrange(header if number % 2 else len(content)), draw.randrange(8))
        for use in (lambda: package.load(path).net, filled):
            try:
                found = use().state_dict()
            except UserError:
                refused += 1
                continue
            kept += 1
            assert all(torch.equal(found[name], t) for name, t in wanted.items())
    assert refused > 200
    assert kept >= 2


# ---- words

CANARY = "import pathlib\npathlib.Path('ran').touch()\nclass Run:\n    def __init__(self, *a, **k): pass\n"
CODE = [
    "hydra.sweeper._target_=canary.Run",
    "hydra.launcher._target_=canary.Run",
    "hydra.sweeper._target_=os.system,canary.Run",
    "hydra.launcher._target_=hydra.utils.instantiate",
    "+hydra.callbacks.x._target_=canary.Run",
    "++hydra.callbacks.x._target_='canary.Run'",
    "+hydra.callbacks={x: {_target_: os.system, command: touch ran}}",
    '+hydra.callbacks={x: {_target_: "canary.Run"}}',
    "+hydra.callbacks.x={_target_: hydra.utils.get_object, path: canary.Run}",
    "+hydra.callbacks.x={_target_: kd.record.subprocess.Popen, args: [touch, ran]}",
    "+hydra.callbacks.x={_target_: hydra.experimental.callbacks.LogJobReturnCallback, y: [{_target_: canary.Run}]}",
    "+hydra={callbacks: {x: {_target_: canary.Run}}}",
    "hydra.sweeper._target_=${oc.env:EVIL}",
    "+hydra.callbacks.x='${oc.decode:${oc.env:EVILS}}'",
    "+hydra.callbacks='${oc.decode:${oc.env:EVILS}}'",
    "hydra.launcher='${oc.create:{_target_: canary.Run}}'",
    "+hydra.sweeper.params={hydra.callbacks.x._target_: canary.Run}",
    "+hydra.sweeper.params={+hydra.callbacks: '{x: {_target_: canary.Run}}'}",
    "hydra.job_logging.handlers.terminal.class=canary.Run",
    "hydra.job_logging.handlers.terminal.class=logging.os.system",
    "+hydra.job_logging.handlers.x={\\(\\): canary.Run}",
    "+hydra.hydra_logging.formatters.x={class: canary.Run}",
    "+hydra.job_logging.handlers.x={class: logging.StreamHandler, stream: ext://canary.Run}",
    "hydra.searchpath=[pkg://canary]",
    "--experimental-rerun=canary.pickle",
    "--exp=canary.pickle",
]


@pytest.mark.parametrize("sweep", [False, True], ids=["run", "sweep"])
@pytest.mark.parametrize("word", CODE)
def test_words_are_never_run(word: str, sweep: bool, kd: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("canary.py").write_text(CANARY)
    Path("canary.pickle").write_bytes(pickle.dumps(Trap()))
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.setenv("EVIL", "canary.Run")
    monkeypatch.setenv("EVILS", "{_target_: canary.Run}")
    before = sorted(Path().iterdir())
    try:
        said = kd("data=digits", "method=standard", word, *(["-m"] if sweep else []))
    finally:
        sys.modules.pop("canary", None)
    assert is_one_line(said, "--experimental-rerun: " if word.startswith("--") else "hydra."), said.err
    assert "code" in said.err
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    "word",
    [
        "student._target_=os.system",
        "+student._target_=os.system",
        "+student={_target_: os.system}",
        "method._target_=os.system",
        "++method._target_=os.system",
        "data._target_=os.system",
        "+optimizer._target_=os.system",
        "+teacher.schedule={_target_: os.system}",
    ],
)
def test_a_target_elsewhere_is_no_key(word: str, kd: Callable) -> None:
    node = word.strip("+").split("=")[0].removesuffix("._target_")
    assert is_one_line(kd("data=digits", word), f"{node}._target_: there is no such key")
    assert is_one_line(
        kd("data=digits", "+method={_target_: os.system}"), "method: {'_target_': 'os.system'} is not a "
    )


@pytest.mark.parametrize(
    "word",
    [
        "hydra.job_logging.root.level=DEBUG",
        "hydra/job_logging=disabled",
        "hydra/launcher=submitit_local",
        "hydra/sweeper=optuna",
        "hydra.launcher.slots=2",
        "hydra.sweeper._target_=hydra_plugins.kd_sweeper.GridSweeper",
        "+hydra.callbacks.x._target_=hydra.experimental.callbacks.LogJobReturnCallback",
        "hydra.job_logging.handlers.terminal.class=logging.StreamHandler",
        "hydra.job_logging.handlers.file.filename=${hydra.runtime.output_dir}/other.log",
        "hydra.sweep.dir=${paths.runs}",
        "+hydra.sweeper.params={method: 'standard,logits', seed: '1,2'}",
        "+hydra.job.env_set={A: '${seed}'}",
    ],
)
def test_other_words_for_hydra_go_through(word: str, kd: Callable) -> None:
    said = kd("data=digits", word, "--cfg", "job")
    assert (said.code, said.err) == (0, "")
