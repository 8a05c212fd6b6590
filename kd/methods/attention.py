"""Attention transfer (Zagoruyko and Komodakis 2017, arXiv 1612.03928).

Paper: "Paying more attention to attention".
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from kd.methods.paired import FeatureMethod, FeatureMethodConfig, match_spatial_size


class AttentionConfig(FeatureMethodConfig):
    """Settings of the `attention` method."""

    name: Literal["attention"]


class Attention(FeatureMethod):
    """loss = alpha * CE + beta * sum over the pairs of mean (q_s - q_t)^2.

    q is the mean over the channels of the squared map, flattened to a vector of norm 1. The larger
    map is average-pooled to the size of the smaller. The mean is over samples and pixels, as in the
    authors' code.
    """

    Config = AttentionConfig
    dims = (3,)

    def compare(self, pair_index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean squared difference of the attention maps."""
        student, teacher = match_spatial_size(student, teacher)
        return (_attention(student) - _attention(teacher)).square().mean()


def _attention(x: Tensor) -> Tensor:
    """Return the attention vectors [B, H * W], each of norm 1, of maps [B, C, H, W].

    The mean over the channels is written as a sum and a division, because the gradient of `mean`
    has another memory format than x (see `base.mean_square`).
    """
    return F.normalize(x.square().sum(dim=1).flatten(1) / x.shape[1], dim=1)
