"""Data sets: what is held out, what a batch carries, what the cache promises."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from kd import data
from kd.core import registry
from kd.core.errors import UserError
from kd.data import augment as views
from kd.data import base, cache, imagefolder
from kd.data.base import Arrays
from kd.data.loader import batches, eval_batches

CPU = torch.device("cpu")
KEYS = {
    "split_seed": 0,
    "augment": {"crop_padding": 4, "padding_mode": "zeros", "flip": True},
    "mean": None,
    "std": None,
}
TABLE = {  # data set: (classes, size, training images)
    "digits": (10, 32, 1437),
    "cifar10": (10, 32, 50_000),
    "cifar100": (100, 32, 50_000),
    "imagefolder": (2, 16, 24),
}


def folder_config(root: Path, **keys: object) -> imagefolder.Config:
    return imagefolder.Config(
        **{"name": "imagefolder", "root": str(root), "size": 16, "val_size": None, **KEYS, **keys}
    )


def test_every_data_set_has_a_row_here() -> None:
    missing = set(registry.choices("data")) - set(TABLE)
    assert not missing, f"add a row to TABLE in {__file__} for: {', '.join(sorted(missing))}"


@pytest.mark.parametrize("name", TABLE)
def test_a_description_is_what_its_row_says(name: str, composed: Callable, folder: Path) -> None:
    words = [f"data.root={folder}", "data.size=16"] if name == "imagefolder" else []
    described = composed(f"data={name}", *words).description
    assert (len(described.classes), described.size, described.train) == TABLE[name]


def load(config: imagefolder.Config, folder: Path) -> base.Data:
    return data.load(config, data.describe(config), folder, CPU)


def test_held_out_images_are_stratified_seeded_and_apart() -> None:
    labels = torch.tensor([0] * 500 + [1] * 300 + [2] * 200)
    train, held = base.split_validation(labels, 101, seed=0)
    assert len(held) == 101
    assert sorted(torch.cat([train, held]).tolist()) == list(range(1000))
    assert sorted(Counter(labels[held].tolist()).values()) == [20, 30, 51]
    assert torch.equal(held, base.split_validation(labels, 101, seed=0)[1])
    assert not torch.equal(held, base.split_validation(labels, 101, seed=1)[1])


def test_a_batch_names_its_samples_and_shows_their_views(tmp_path: Path, folder: Path) -> None:
    found = load(folder_config(folder, val_size=6), tmp_path / "cache")
    augment = views.Augment(**KEYS["augment"])
    seen = []
    for batch in batches(found.train, 4, seed=1, epoch=2, augment=augment):
        assert torch.equal(batch.y, found.train.labels[batch.index])
        assert torch.equal(batch.view, views.sample_views(1, 2, batch.index, augment))
        pixels = views.apply_view(found.train.images, batch.index, batch.view, augment)
        assert torch.equal(batch.x, views.normalise(pixels, found.train.mean, found.train.std))
        seen += batch.index.tolist()
    assert len(seen) == len(set(seen)) == 16  # 18 are left to train on: four full batches
    assert not set(seen) & set(found.val.index.tolist())


def test_evaluation_sees_plain_images_in_order(tmp_path: Path, folder: Path) -> None:
    found = load(folder_config(folder), tmp_path / "cache")
    x = torch.cat(list(eval_batches(found.test, batch_size=3)))
    assert torch.equal(x, views.normalise(found.test.images, found.test.mean, found.test.std))
    assert found.test.targets.tolist() == [0] * 4 + [1] * 4


def test_an_image_folder_is_read_as_it_is(tmp_path: Path, folder: Path) -> None:
    found = load(folder_config(folder), tmp_path / "cache")
    assert found.classes == ("dark", "light é")
    assert (len(found.train), len(found.val), len(found.test)) == (22, 2, 8)
    assert found.train.images[3, 0, 0].tolist() == [43, 43, 90]
    Image.new("L", (5, 5), 7).save(folder / "train" / "dark" / "grey.png")
    Image.new("RGBA", (40, 30), (1, 2, 3, 255)).save(folder / "train" / "dark" / "alpha.png")
    Image.new("RGB", (16, 16), (9, 8, 7)).convert("P").save(
        folder / "train" / "dark" / "palette.png"
    )
    again = load(folder_config(folder), tmp_path / "cache")  # other content: decoded anew
    assert len(again.train.images) == 27


def test_a_val_folder_is_the_validation_set(tmp_path: Path, folder: Path) -> None:
    for name in ("dark", "light é"):
        (folder / "val" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), (1, 1, 1)).save(folder / "val" / name / "a.png")
    found = load(folder_config(folder), tmp_path / "cache")
    assert (len(found.train), len(found.val)) == (24, 2)
    with pytest.raises(UserError, match=r"data\.val_size: .* has a val/ folder"):
        data.describe(folder_config(folder, val_size=2))


def arrays(shade: int) -> Arrays:
    images = torch.full((3, 4, 4, 3), shade, dtype=torch.uint8)
    return Arrays(images, torch.arange(3), images[:1].clone(), torch.arange(1))


def test_the_cache_decodes_once_and_mends_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def decode() -> Arrays:
        calls.append(1)
        return arrays(5)

    for _ in range(2):
        assert torch.equal(cache.cached(tmp_path, "k", decode).train_images, arrays(5).train_images)
    assert len(calls) == 1
    file = tmp_path / "k.safetensors"
    with safe_open(file, framework="pt") as opened:
        assert "sha256" in opened.metadata()
    whole = file.read_bytes()
    for damaged in (whole[:-7], whole[:-1] + b"\x99", b""):
        file.write_bytes(damaged)
        assert torch.equal(cache.cached(tmp_path, "k", decode).train_images, arrays(5).train_images)
    assert len(calls) == 4
    assert "is damaged" in caplog.text
    assert [p.name for p in tmp_path.glob("*.part")] == []


def test_a_cache_that_cannot_be_written_stays_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert torch.equal(
        cache.cached(tmp_path / "file", "k", lambda: arrays(5)).train_images, arrays(5).train_images
    )
    assert "keeping them in memory" in caplog.text


def test_moments_are_those_of_the_pixels() -> None:
    images = torch.randint(
        0, 256, (5000, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    mean, std = base.channel_statistics(images)
    np.testing.assert_allclose(mean, images.numpy().mean((0, 1, 2)) / 255, atol=1e-4)
    np.testing.assert_allclose(std, images.numpy().std((0, 1, 2)) / 255, atol=1e-4)
