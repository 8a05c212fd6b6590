"""Neuron selectivity transfer with a polynomial kernel (Huang and Wang 2017, arXiv 1707.01219).

Paper: "Like what you like: knowledge distill via neuron selectivity transfer".
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from kd.methods.paired import FeatureMethod, FeatureMethodConfig, match_spatial_size


class NSTConfig(FeatureMethodConfig):
    """Settings of the `nst` method."""

    name: Literal["nst"]


class NST(FeatureMethod):
    """loss = alpha * CE + beta * sum over the pairs of the MMD of the channels' maps.

    The MMD is mean k(t, t) + mean k(s, s) - 2 mean k(s, t) with k(a, b) = (a . b)^2. Its means are
    over pairs of channels and over the batch; each channel's map has norm 1. The larger map is
    average-pooled to the size of the smaller.
    """

    Config = NSTConfig
    dims = (3,)

    def compare(self, pair_index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the maximum mean discrepancy of the channels."""
        s, t = (F.normalize(x.flatten(2), dim=2) for x in match_spatial_size(student, teacher))
        return _mean_kernel(t, t) + _mean_kernel(s, s) - 2 * _mean_kernel(s, t)


def _mean_kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.transpose(1, 2)).square().mean()
