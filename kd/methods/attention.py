"""Paying more attention to attention: attention transfer (Zagoruyko and Komodakis 2017, arXiv 1612.03928)."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from kd.methods.paired import FeatureMethod, FeatureMethodConfig, match_spatial_size


class AttentionConfig(FeatureMethodConfig):
    name: Literal["attention"]


class Attention(FeatureMethod):
    """loss = alpha * CE + beta * sum over the pairs of mean (q_s - q_t)^2.

    q: the mean over the channels of the squared map, as a vector of norm 1. The larger map is average-pooled to the
    smaller's size; the mean is over samples and pixels, as in the authors' code.
    """

    Config = AttentionConfig
    dims = (3,)

    def compare(self, number: int, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = match_spatial_size(student, teacher)
        return (_attention(student) - _attention(teacher)).square().mean()


def _attention(x: Tensor) -> Tensor:
    """A sum, then divided: the gradient of a mean is in another order in memory than x, see base.mean_square."""
    return F.normalize(x.square().sum(dim=1).flatten(1) / x.shape[1], dim=1)
