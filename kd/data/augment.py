"""Views: the crop and flip of an image are a pure function of (seed, epoch, sample index).

Nothing here keeps state. A counter-based hash draws the views, so any view of any image in any
epoch can be reproduced, in any order, on any device and in another process. Cropping after padding
by 4 pixels and flipping leave only 9 x 9 x 2 = 162 views of an image. A view is therefore one
integer, and the sample index and the view together identify a teacher output.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kd.core.rng import named_seed
from kd.core.settings import Settings


class Augment(Settings):
    """A random crop after padding, and a random horizontal flip.

    `crop_padding` is in pixels; 0 means no crop.
    """

    crop_padding: int = Field(ge=0, le=64)
    padding_mode: Literal["zeros", "reflect", "edge"]
    flip: bool

    @property
    def views(self) -> int:
        """Return the number of distinct views of an image."""
        return (2 * self.crop_padding + 1) ** 2 * (2 if self.flip else 1)


def _to_int64(x: int) -> int:
    """Return the signed integer with the same lowest 64 bits."""
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int64 to the right and fill with zeros; `>>` alone would copy the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hash_integers(x: Tensor) -> Tensor:
    """Apply the finalizer of SplitMix64 (Steele, Lea and Flood 2014); int64 wraps like uint64."""
    x = (x ^ _shift_right(x, 30)) * _to_int64(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _to_int64(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def sample_hashes(seed: int, name: str, epoch: int, index: Tensor) -> Tensor:
    """Return one int64 hash per sample.

    All 64 bits depend on (seed, name, epoch, index) and on nothing else.

    Args:
        seed: The seed of the run.
        name: The name of the random stream.
        epoch: The epoch, from 0.
        index: int64 tensor of any shape.

    Returns:
        int64 tensor with the shape and device of `index`.
    """
    key = named_seed(seed, name) + (epoch + 1) * 0x9E3779B97F4A7C15
    hashes = hash_integers(index * _to_int64(0xD1342543DE82EF95) + _to_int64(key))
    return hash_integers(hashes + _to_int64(key))


def uniform_int(hashes: Tensor, n: int) -> Tensor:
    """Map hashes to integers in [0, n), uniform up to n / 2^31."""
    return (_shift_right(hashes, 33) * n) >> 31


def epoch_permutation(seed: int, epoch: int, index: Tensor) -> Tensor:
    """Return the order of an epoch as positions in `index`, sorted by hash. int64 [n]."""
    return torch.argsort(sample_hashes(seed, "order", epoch, index), stable=True)


def sample_views(seed: int, epoch: int, index: Tensor, augment: Augment, nth: int = 0) -> Tensor:
    """Return the `nth` view of each sample in an epoch.

    Args:
        seed: The seed of the run.
        epoch: The epoch, from 0.
        index: int64 tensor of any shape, the sample indices.
        augment: The augmentation that defines the views.
        nth: Which view of the sample, from 0, if a batch has several.

    Returns:
        int64 tensor with the shape of `index` and values in [0, augment.views).
    """
    stream = f"views/{nth}" if nth else "views"
    return uniform_int(sample_hashes(seed, stream, epoch, index), augment.views)


def apply_view(images: Tensor, rows: Tensor, view: Tensor, augment: Augment) -> Tensor:
    """Crop and flip images by a single gather, without a loop over the images.

    View v is the crop at offset (dy, dx) of the padded image, mirrored if v is odd and
    `augment.flip` is on: v = (dy * (2 * crop_padding + 1) + dx) * 2 + flip. Without `augment.flip`
    the last factor is left out.

    Args:
        images: uint8 tensor [N, H, W, 3].
        rows: int64 tensor [B], which images.
        view: int64 tensor [B], which view of each.
        augment: The augmentation that defines the views.

    Returns:
        uint8 tensor [B, H, W, 3].
    """
    height, width = images.shape[1:3]
    if augment.flip:
        flip = (view & 1).bool()
        view = view >> 1
    else:
        flip = torch.zeros_like(view, dtype=torch.bool)
    offsets = 2 * augment.crop_padding + 1
    dy = torch.div(view, offsets, rounding_mode="floor") - augment.crop_padding
    dx = view % offsets - augment.crop_padding
    # the source row [B, H] and source column [B, W] of each pixel of the output
    y = dy[:, None] + torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device).expand(len(rows), -1)
    x = dx[:, None] + torch.where(flip[:, None], width - 1 - x, x)
    if augment.padding_mode == "reflect":
        y = _reflect(y, height)
        x = _reflect(x, width)
    inside_y = (y >= 0) & (y < height)
    inside_x = (x >= 0) & (x < width)
    y = y.clamp(0, height - 1)
    x = x.clamp(0, width - 1)
    pixel = ((rows[:, None] * height + y)[:, :, None] * width + x[:, None, :]).flatten()
    # gathering whole pixels is 5 times as fast as indexing
    out = images.view(-1, 3).index_select(0, pixel).view(len(rows), height, 3 * width)
    if augment.padding_mode == "zeros" and augment.crop_padding:
        out.mul_(inside_y[:, :, None]).mul_(inside_x.repeat_interleave(3, dim=1)[:, None, :])
    return out.view(-1, height, width, 3)


def _reflect(position: Tensor, length: int) -> Tensor:
    """Mirror positions outside [0, length) at the edges: ... 2 1 | 0 1 2 ..."""
    return length - 1 - (length - 1 - position.abs()).abs()


def misaligned_indices(seed: int, epoch: int, index: Tensor, count: int) -> Tensor:
    """Draw for each sample a position in [0, count), unrelated to its own. int64, like `index`."""
    return uniform_int(sample_hashes(seed, "misaligned", epoch, index), count)


def mixup_params(
    seed: int, epoch: int, index: Tensor, candidates: Tensor, augment: Augment, nth: int = 0
) -> tuple[Tensor, ...]:
    """Draw Mixup partners and weights (Zhang et al. 2018, arXiv 1710.09412) as a pure function.

    Args:
        seed: The seed of the run.
        epoch: The epoch, from 0.
        index: int64 tensor of any shape, the sample indices.
        candidates: int64 tensor [n], the sample indices to choose partners from.
        augment: The augmentation that defines the views.
        nth: Which view of the sample, from 0, if a batch has several.

    Returns:
        For each sample the index of its partner (int64), a view of the partner (int64) and the
        partner's weight (float32, uniform in [0, 1/2)), each with the shape of `index`.
    """

    def hashes(quantity: str) -> Tensor:
        return sample_hashes(seed, f"mixup/{quantity}/{nth}", epoch, index)

    partner = candidates[uniform_int(hashes("other"), len(candidates))]
    view = uniform_int(hashes("view"), augment.views)
    weight = uniform_int(hashes("share"), 1 << 24) / (1 << 25)
    return partner, view, weight


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise images per channel and move the channels to the front.

    Args:
        images: uint8 tensor [B, H, W, 3].
        mean: float32 tensor [3], for pixels in 0..1.
        std: float32 tensor [3], for pixels in 0..1.

    Returns:
        float32 tensor [B, 3, H, W] in channels_last memory order.
    """
    width = images.shape[2]
    # repeated along a row of pixels, so that the inner loop is long
    row_mean = (mean * 255).repeat(width)
    row_scale = (1 / (std * 255)).repeat(width)
    rows = images.flatten(2).float().sub_(row_mean).mul_(row_scale)
    return rows.view(images.shape).permute(0, 3, 1, 2)
