"""One batch of a training set."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """What a training step sees, and all that a method may depend on."""

    x: Tensor  # [B, 3, H, W] float32, normalised: the very pixels that teacher and student see
    y: Tensor  # [B] int64 labels; -1: unknown, see `Method.needs_labels`
    index: Tensor  # [B] int64, the sample's place in the whole training set (for memories, and to name views)
    view: Tensor  # [B] int64, which crop and flip of it
    epoch: float  # epochs done, with a fraction: for weights that change over training
