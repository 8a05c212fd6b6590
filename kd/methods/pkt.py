"""Probabilistic knowledge transfer (Passalis and Tefas 2018, arXiv 1803.10837).

Paper: "Learning deep representations with probabilistic knowledge transfer".
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from kd.methods.paired import FeatureMethod, FeatureMethodConfig


class PKTConfig(FeatureMethodConfig):
    """Settings of the `pkt` method."""

    name: Literal["pkt"]


class PKT(FeatureMethod):
    """loss = alpha * CE + beta * sum over the pairs of mean_ij P_t log((P_t + eps) / (P_s + eps)).

    P [b, b] is (cos + 1) / 2 of the flattened taps of the batch, with each row scaled to sum 1.
    eps is 1e-7.
    """

    Config = PKTConfig

    def compare(self, pair_index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean divergence of the affinities of the batch."""
        p_s = _affinity(student)
        p_t = _affinity(teacher)
        return (p_t * ((p_t + 1e-7) / (p_s + 1e-7)).log()).mean()


def _affinity(x: Tensor) -> Tensor:
    x = F.normalize(x.flatten(1), dim=1)
    affinity = (x @ x.T + 1) / 2
    return affinity / affinity.sum(dim=1, keepdim=True)
