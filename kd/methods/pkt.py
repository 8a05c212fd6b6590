"""Learning deep representations with probabilistic knowledge transfer (Passalis and Tefas 2018, arXiv 1803.10837)."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from kd.methods.paired import FeatureMethod, FeatureMethodConfig


class PKTConfig(FeatureMethodConfig):
    name: Literal["pkt"]


class PKT(FeatureMethod):
    """loss = alpha * CE + beta * sum over the pairs of mean_ij P_t log((P_t + 1e-7) / (P_s + 1e-7)).

    P [b, b]: (cos + 1) / 2 of the batch's flattened taps, each row of sum 1.
    """

    Config = PKTConfig

    def compare(self, number: int, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = _affinity(student), _affinity(teacher)
        return (t * ((t + 1e-7) / (s + 1e-7)).log()).mean()


def _affinity(x: Tensor) -> Tensor:
    x = F.normalize(x.flatten(1), dim=1)
    near = (x @ x.T + 1) / 2
    return near / near.sum(dim=1, keepdim=True)
