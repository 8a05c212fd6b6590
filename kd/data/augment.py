"""Views: which crop and flip of an image a student sees is a pure function of (seed, epoch, sample index).

Nothing here keeps a state. A view is drawn by a counter hash, so any epoch's view of any image can be produced
again in any order, on any device, in another process; and because a crop after padding by 4 and a flip leave only
9 x 9 x 2 = 162 views of an image, a view is one integer, which with the sample index names the teacher's output.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kd.core.rng import named_seed
from kd.core.settings import Settings


class Augment(Settings):
    """Random crop after padding by `crop` pixels (0: none), and a horizontal flip."""

    crop: int = Field(ge=0, le=64)
    padding: Literal["zeros", "reflect", "edge"]
    flip: bool

    @property
    def views(self) -> int:
        """How many distinct views an image has."""
        return (2 * self.crop + 1) ** 2 * (2 if self.flip else 1)


def _signed(x: int) -> int:
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


def _shift(x: Tensor, n: int) -> Tensor:
    return (x >> n) & ((1 << (64 - n)) - 1)  # logical: int64 alone shifts its sign in


def hash_integers(x: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014) on int64, which wraps as uint64 would."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def random_floats(seed: int, name: str, epoch: int, index: Tensor) -> Tensor:
    """int64 hashes, one for each sample: all 64 bits depend on (seed, name, epoch, index) and on nothing else.

    **Arguments:** `index` int64 of any shape; the result has its shape and device.
    """
    key = named_seed(seed, name) + (epoch + 1) * 0x9E3779B97F4A7C15
    return hash_integers(
        hash_integers(index * _signed(0xD1342543DE82EF95) + _signed(key)) + _signed(key)
    )


def uniform_int(hashes: Tensor, n: int) -> Tensor:
    """Integers in [0, n) from hashes, uniform up to n / 2^31."""
    return (_shift(hashes, 33) * n) >> 31


def epoch_permutation(seed: int, epoch: int, index: Tensor) -> Tensor:
    """The epoch's order: positions into `index`, sorted by each sample's own hash. Shape [n], int64."""
    return torch.argsort(random_floats(seed, "order", epoch, index), stable=True)


def sample_views(seed: int, epoch: int, index: Tensor, augment: Augment, nth: int = 0) -> Tensor:
    """The `nth` view of each sample in this epoch: int64 in [0, augment.views), of `index`'s shape."""
    return uniform_int(
        random_floats(seed, f"views/{nth}" if nth else "views", epoch, index), augment.views
    )


def apply_view(images: Tensor, rows: Tensor, view: Tensor, augment: Augment) -> Tensor:
    """The chosen views of the chosen images, by one gather; no loop over images.

    **Arguments:** `images` uint8 [N, H, W, 3]; `rows` and `view` int64 [B]. **Returns:** uint8 [B, H, W, 3].
    View v is the crop at offset (dy, dx) of the padded image, mirrored when v is odd and `augment.flip` is on:
    v = (dy * (2 * crop + 1) + dx) * 2 + flip, or without the last factor where flip is off.
    """
    height, width = images.shape[1:3]
    if augment.flip:
        flip, view = (view & 1).bool(), view >> 1
    else:
        flip = torch.zeros_like(view, dtype=torch.bool)
    side = 2 * augment.crop + 1
    dy = torch.div(view, side, rounding_mode="floor") - augment.crop
    dx = view % side - augment.crop
    y = dy[:, None] + torch.arange(
        height, device=images.device
    )  # [B, H], the source row of each output row
    x = torch.arange(width, device=images.device).expand(len(rows), -1)
    x = dx[:, None] + torch.where(flip[:, None], width - 1 - x, x)  # [B, W]
    if augment.padding == "reflect":  # ... 2 1 | 0 1 2 ... without repeating the edge
        y, x = (n - 1 - (n - 1 - i.abs()).abs() for i, n in ((y, height), (x, width)))
    inside_y, inside_x = (y >= 0) & (y < height), (x >= 0) & (x < width)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    pixel = ((rows[:, None] * height + y)[:, :, None] * width + x[:, None, :]).flatten()
    out = (
        images.view(-1, 3).index_select(0, pixel).view(len(rows), height, 3 * width)
    )  # whole pixels: 5 x an index
    if augment.padding == "zeros" and augment.crop:
        out.mul_(inside_y[:, :, None]).mul_(inside_x.repeat_interleave(3, dim=1)[:, None, :])
    return out.view(-1, height, width, 3)


def misaligned_indices(seed: int, epoch: int, index: Tensor, among: int) -> Tensor:
    """For each sample a place in [0, among), unrelated to its own: int64, as `index`."""
    return uniform_int(random_floats(seed, "misaligned", epoch, index), among)


def mixup_params(
    seed: int, epoch: int, index: Tensor, among: Tensor, augment: Augment, nth: int = 0
) -> tuple[Tensor, ...]:
    """Mixup (Zhang et al. 2018, arXiv 1710.09412) as a pure function as well: for each sample another of `among`.

    **Returns:** its place int64, a view of it int64, and its share float32, uniform in [0, 1/2); each as `index`.
    """
    other, view, share = (
        random_floats(seed, f"mixup/{what}/{nth}", epoch, index)
        for what in ("other", "view", "share")
    )
    return (
        among[uniform_int(other, len(among))],
        uniform_int(view, augment.views),
        uniform_int(share, 1 << 24) / (1 << 25),
    )


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in channels_last order; `mean` and `std` [3] are in units of 0..1."""
    width = images.shape[2]  # a row of pixels at a time, not one: the inner loop is then long
    rows = (
        images.flatten(2)
        .float()
        .sub_((mean * 255).repeat(width))
        .mul_((1 / (std * 255)).repeat(width))
    )
    return rows.view(images.shape).permute(0, 3, 1, 2)
