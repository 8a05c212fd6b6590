"""Several networks as one, for a teacher that is an ensemble."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kd.models.base import ModelOutput, Net

Average = Literal["logits", "probabilities"]


class Ensemble(Net):
    """The mean of the members' logits, or the logarithm of the mean of their probabilities.

    An ensemble has no taps.
    """

    def __init__(self, members: Sequence[Net], average: Average):
        super().__init__(**{f"member{n}": member for n, member in enumerate(members)})
        self.average = average

    @property
    def head(self) -> nn.Module:
        """Raise RuntimeError: each member has its own head."""
        raise RuntimeError("an ensemble has no head")

    def forward_taps(self, x: Tensor, taps: Iterable[str] = ()) -> ModelOutput:
        """Compute logits [B, classes] in float32.

        Args:
            x: float32 tensor [B, 3, H, W], normalised images.
            taps: Must be empty.

        Raises:
            RuntimeError: Taps are requested.
        """
        if taps := list(taps):
            raise RuntimeError(f"an ensemble has no taps; requested: {', '.join(taps)}")
        logits = torch.stack([member(x).float() for member in self.stages.values()])
        if self.average == "probabilities":
            log_sum = logits.log_softmax(dim=2).logsumexp(dim=0)
            return ModelOutput(log_sum - math.log(len(logits)), {})
        return ModelOutput(logits.mean(dim=0), {})

    def shapes(self, size: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of the only output, the head."""
        first = next(iter(self.stages.values()))
        return self.shapes_of(first.shapes(size))  # type: ignore[operator]

    def shapes_of(self, member_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of an ensemble whose members have `member_shapes`."""
        return {"head": list(member_shapes.values())[-1]}
