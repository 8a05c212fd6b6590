"""Several networks as one, for a teacher that is an ensemble."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kd.models.base import ModelOutput, Net

Mean = Literal["logits", "probabilities"]


class Ensemble(Net):
    """The mean of the members' logits, or the logarithm of the mean of their probabilities. It has no taps."""

    def __init__(self, members: Sequence[Net], mean: Mean):
        super().__init__(**{f"member{n}": member for n, member in enumerate(members)})
        self.mean = mean

    @property
    def head(self) -> nn.Module:
        raise RuntimeError("an ensemble has no head")

    def forward_taps(self, x: Tensor, taps: Iterable[str] = ()) -> ModelOutput:
        if taps := list(taps):
            raise RuntimeError(f"an ensemble has no taps; asked for {', '.join(taps)}")
        said = torch.stack([member(x).float() for member in self.stages.values()])
        if self.mean == "probabilities":
            return ModelOutput(said.log_softmax(dim=2).logsumexp(dim=0) - math.log(len(said)), {})
        return ModelOutput(said.mean(dim=0), {})

    def shapes(self, size: int) -> dict[str, tuple[int, ...]]:
        return self.shapes_of(next(iter(self.stages.values())).shapes(size))  # type: ignore[operator]

    def shapes_of(self, member: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The shapes of an ensemble whose members have these."""
        return {"head": list(member.values())[-1]}
