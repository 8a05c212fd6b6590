"""Similarity-preserving knowledge distillation (Tung and Mori 2019, arXiv 1907.09682)."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from kd.methods.paired import FeatureMethod, FeatureMethodConfig


class SimilarityConfig(FeatureMethodConfig):
    name: Literal["similarity"]


class Similarity(FeatureMethod):
    """loss = alpha * CE + beta * sum over the pairs of |G_s - G_t|^2 / b^2.

    G [b, b]: the products of the batch's flattened taps, each row of norm 1. Depends on the batch size b.
    """

    Config = SimilarityConfig

    def compare(self, number: int, student: Tensor, teacher: Tensor) -> Tensor:
        return (_similarity(student) - _similarity(teacher)).square().mean()


def _similarity(x: Tensor) -> Tensor:
    x = x.flatten(1)
    return F.normalize(x @ x.T, dim=1)
