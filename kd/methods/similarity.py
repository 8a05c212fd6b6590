"""Similarity-preserving knowledge distillation (Tung and Mori 2019, arXiv 1907.09682)."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from kd.methods.paired import FeatureMethod, FeatureMethodConfig


class SimilarityConfig(FeatureMethodConfig):
    """Settings of the `similarity` method."""

    name: Literal["similarity"]


class Similarity(FeatureMethod):
    """loss = alpha * CE + beta * sum over the pairs of |G_s - G_t|^2 / b^2.

    G [b, b] holds the inner products of the flattened taps of the batch, with each row scaled to
    norm 1. The loss depends on the batch size b.
    """

    Config = SimilarityConfig

    def compare(self, pair_index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean squared difference of the similarity matrices."""
        return (_similarity(student) - _similarity(teacher)).square().mean()


def _similarity(x: Tensor) -> Tensor:
    x = x.flatten(1)
    return F.normalize(x @ x.T, dim=1)
