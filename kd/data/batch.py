"""One batch of a training set."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """The input of a training step, and all that a method may depend on."""

    x: Tensor  # float32 [B, 3, H, W], normalised; teacher and student get these very pixels
    y: Tensor  # int64 [B], labels; -1 if unknown, see `Method.needs_labels`
    index: Tensor  # int64 [B], position in the full training set; identifies the sample
    view: Tensor  # int64 [B], its crop and flip, see kd.data.augment
    epoch: float  # epochs completed, including a fraction; for weights that change during training
