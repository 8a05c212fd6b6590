"""Hostile or broken files of weights each end in one line, and no code in them runs."""

import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Trap, is_one_line
from safetensors.torch import load_file, save_file
from torch import Tensor

import kd as package
from kd import cli, data, models
from kd.config import schema
from kd.core.errors import UserError
from kd.models import weights
from kd.training import teacher
from kd.training.device import resolve

SIZE = 8


def net(scale: int = 1, classes: int = 2, size: int = SIZE) -> models.Net:
    torch.manual_seed(0)
    said = {"name": "cnn", "scale": scale, "activation": "relu", "dropout": 0.5}
    return models.build(models.find("cnn", "model").Config(**said), classes, size)


CARD = weights.build_metadata(
    {"name": "cnn", "scale": 1, "activation": "relu", "dropout": 0.5},
    ("a", "b"),
    SIZE,
    torch.zeros(3),
    torch.ones(3),
)


def saved(path: Path, **changes: Any) -> Path:
    """The weights of a small network, with a card in which something may be wrong."""
    weights.save(net(), path, {**CARD, **changes})
    return path


def carded(path: Path, text: str) -> None:
    save_file(net().state_dict(), path, {"kd": text})


def changed(path: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    save_file({name: change(name, t).contiguous() for name, t in net().state_dict().items()}, path)


def headed(path: Path, size: int) -> None:
    content = bytearray(saved(path).read_bytes())
    content[:8] = struct.pack("<Q", size)
    path.write_bytes(content)


def poisoned(name: str, t: Tensor, value: float) -> Tensor:
    t = t.clone()
    if name == "stages.head.1.bias":
        t[1] = value
    return t


def flipped(path: Path, place: int = -1, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


BROKEN, PICKLE = (
    "is not an intact safetensors file (",
    "is a pickle, which could run code when read",
)
# How they are made, and what the line says.
BAD_WEIGHTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit flipped": (
        lambda p: flipped(saved(p)),
        "is damaged: its weights do not match their checksum",
    ),
    "truncated": (lambda p: p.write_bytes(saved(p).read_bytes()[:-1]), BROKEN),
    "longer": (lambda p: p.write_bytes(saved(p).read_bytes() + b"1"), BROKEN),
    "huge header": (lambda p: headed(p, 2**63), BROKEN),
    "header longer than the file": (lambda p: headed(p, 1 << 20), BROKEN),
    "no header": (lambda p: headed(p, 0), BROKEN),
    "no content": (lambda p: p.write_bytes(b""), BROKEN),
    "text": (lambda p: p.write_text("weights: 1"), BROKEN),
    "folder": (lambda p: p.mkdir(), "{path} is a folder"),
    "absent": (lambda p: None, "{path} does not exist or is not a file"),
    "pipe": (os.mkfifo, "{path} does not exist or is not a file"),
    "loop": (lambda p: p.symlink_to(p.name), "{path} does not exist or is not a file"),
    "pickle 0": (lambda p: p.write_bytes(pickle.dumps(Trap(), 0)), BROKEN),
    "pickle 2": (lambda p: p.write_bytes(pickle.dumps(Trap(), 2)), PICKLE),
    "pickle 5": (lambda p: p.write_bytes(pickle.dumps(Trap(), 5)), PICKLE),
    "torch.save": (lambda p: torch.save(Trap(), p), PICKLE),
    "integers": (lambda p: changed(p, lambda _, t: t.int()), "of integers in the file and ["),
    "not a number": (
        lambda p: changed(p, lambda n, t: poisoned(n, t, float("nan"))),
        "head.1.bias is not finite",
    ),
    "infinite": (
        lambda p: changed(p, lambda n, t: poisoned(n, t, float("inf"))),
        "head.1.bias is not finite",
    ),
    "too large": (
        lambda p: save_file(net(2).state_dict(), p),
        "is [2, 3, 3, 3] in the file and [1, 3, 3, 3] in the model",
    ),
    "one tensor more": (
        lambda p: save_file({**net().state_dict(), "x": torch.ones(1)}, p),
        "x is [1] in the file and abs",
    ),
    "no tensor": (lambda p: save_file({}, p), "is absent in the file and"),
    "other classes": (
        lambda p: weights.save(net(1, 3), p, {**CARD, "classes": ["a", "b", "c"]}),
        "has 3 classes",
    ),
    "other size": (
        lambda p: weights.save(net(1, 2, 16), p, {**CARD, "size": 16}),
        "takes images of 16 pixels",
    ),
}
BAD_CARDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not JSON": (lambda p: carded(p, "{"), "cannot be used (it is not JSON)"),
    "deep": (lambda p: carded(p, "[" * 100_000), "cannot be used (it is not JSON)"),
    "a list": (lambda p: carded(p, "[]"), "cannot be used (should be a valid dictionary"),
    "null": (lambda p: carded(p, "null"), "cannot be used (should be a valid dictionary"),
    "empty": (lambda p: carded(p, "{}"), "cannot be used (model is missing)"),
    "model of a wrong type": (
        lambda p: saved(p, model="cnn"),
        "cannot be used (model: should be a valid dictionary",
    ),
    "classes of a wrong type": (
        lambda p: saved(p, classes=[1, 2]),
        "(classes.0: should be a valid string)",
    ),
    "no class": (lambda p: saved(p, classes=[]), "(classes: List should have at least 1 item"),
    "size of a wrong type": (lambda p: saved(p, size="8"), "(size: should be a valid integer)"),
    "huge size": (lambda p: saved(p, size=10**9), "(size: should be less than or equal to 4096)"),
    "mean of two": (
        lambda p: saved(p, mean=[0.0, 0.0]),
        "(mean: List should have at least 3 items",
    ),
    "mean that is no number": (
        lambda p: saved(p, mean=[float("nan"), 0.0, 0.0]),
        "(mean.0: should be a finite numb",
    ),
    "std of 1e400": (
        lambda p: carded(p, json.dumps(CARD).replace("1.0", "1e400", 1)),
        "(std.0: should be a finite",
    ),
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
    "no scale": ({"name": "cnn"}, "model.scale is missing"),
    "huge": (
        {**CARD["model"], "scale": 10**6},
        "model.scale: should be less than or equal to 1024",
    ),
    "large": (
        {**CARD["model"], "scale": 1024},
        "does not fit its metadata: stages.conv1.0.weight is [1, 3, 3, 3] in the file",
    ),
}


@pytest.mark.parametrize("case", [*BAD_WEIGHTS, *BAD_CARDS])
def test_bad_weights_of_a_teacher_are_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, expected = {**BAD_WEIGHTS, **BAD_CARDS}[case]
    path = tmp_path / "weights.safetensors"
    monkeypatch.chdir(tmp_path)
    make(path)
    with pytest.raises(UserError) as error:
        weights.validate_weights(path, net(), ("a", "b"), SIZE)
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
        weights.save(
            net(1, 10, 32), tmp_path / "w", {**CARD, "classes": list("0123456789"), "size": 32}
        )
        flipped(tmp_path / "w")
    said = kd(
        "data=digits", "method=logits", "teacher.scale=1", f"teacher.checkpoint={tmp_path / 'w'}"
    )
    assert is_one_line(said, "teacher.checkpoint: ")
    assert expected in said.err
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "case", ["a bit flipped", "truncated", "torch.save", "integers", "not a number", *BAD_CARDS]
)
def test_bad_weights_are_not_loaded(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, expected = {**BAD_WEIGHTS, **BAD_CARDS}[case]
    monkeypatch.chdir(tmp_path)
    make(Path("w"))
    if case in ("integers", "not a number"):
        save_file(
            {name: t.clone() for name, t in load_file("w").items()}, "w", {"kd": json.dumps(CARD)}
        )
    with pytest.raises(UserError) as error:
        package.load("w")
    assert expected in str(error.value)
    assert str(error.value).startswith(("w ", "the metadata in w "))
    assert not Path("sprung").exists()


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_bad_model_in_a_card_is_not_built(case: str, tmp_path: Path) -> None:
    model, expected = BAD_MODELS[case]
    with pytest.raises(UserError) as error:
        package.load(saved(tmp_path / "w", model=model))
    assert expected in str(error.value)
    assert str(error.value).isprintable()


def test_other_sound_weights_are_taken(tmp_path: Path) -> None:
    """Those of an earlier kd, of other programs, in half precision, with any length of header."""
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
        weights.validate_weights(path, other, ("a", "b"), SIZE)
        weights.load_weights(other, path)
        assert all(
            torch.allclose(t, wanted[name], atol=1e-3) for name, t in other.state_dict().items()
        )
    for length in (0x4B50, 0x2480):  # such a file begins as a zip archive, or as a pickle does
        save_file(wanted, path, {"x": ""})
        missing = length - struct.unpack("<Q", path.read_bytes()[:8])[0]
        save_file(wanted, path, {"x": "x" * missing})
        assert struct.unpack("<Q", path.read_bytes()[:8])[0] == length
        weights.validate_weights(path, net(), ("a", "b"), SIZE)


def test_weights_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "w")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as closed:
        closed.setattr("builtins.open", refuse)
        with pytest.raises(
            UserError, match=r"^teacher\.checkpoint: cannot read .*/w \(Permission denied\)$"
        ):
            weights.validate_weights(path, net(), ("a", "b"), SIZE)
        with pytest.raises(
            UserError, match=r"^teacher: cannot read weights from .*/w \(Permission denied\)$"
        ):
            schema.file_digest(path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    denied = PermissionError(13, "Permission denied", str(path))
    assert cli._explain(denied) == (2, f"cannot read {path} (Permission denied)")
    assert "cannot write to" in str(
        cli._explain(PermissionError(13, "Permission denied", str(path) + "x"))[1]
    )


def test_a_teachers_own_run_that_was_damaged(composed: Callable, tmp_path: Path) -> None:
    made = composed("method=logits", "teacher.scale=1", "data.val_size=0")
    images = data.load(made.data, made.description, tmp_path / "cache", torch.device("cpu"))
    weights.save(
        net(1, 10, 32), tmp_path / "w", {**CARD, "classes": list("0123456789"), "size": 32}
    )
    device, trained = resolve("cpu", "fp32", tmp_path), {"metrics": {}}
    assert teacher.load(made, images, device, tmp_path / "w", trained).net
    flipped(tmp_path / "w")
    with pytest.raises(
        UserError,
        match=r"^teacher: .*/w is damaged: .*; remove .* to train the teacher again",
    ):
        teacher.load(made, images, device, tmp_path / "w", trained)


def test_no_damage_is_silent(tmp_path: Path) -> None:
    """A file cut, or with a bit flipped, at 200 places gives the same weights or a UserError."""
    draw, path, wanted = random.Random(0), tmp_path / "w", net().state_dict()
    content, kept, refused = saved(path).read_bytes(), 0, 0
    header = struct.unpack("<Q", content[:8])[0] + 8

    def filled() -> models.Net:
        other = net()
        weights.load_weights(other, path)
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
