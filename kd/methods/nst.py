"""Like what you like: neuron selectivity transfer (Huang and Wang 2017, arXiv 1707.01219), polynomial kernel."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from kd.methods.paired import FeatureMethod, FeatureMethodConfig, match_spatial_size


class NSTConfig(FeatureMethodConfig):
    name: Literal["nst"]


class NST(FeatureMethod):
    """loss = alpha * CE + beta * sum over the pairs of the MMD of the channels' maps, under k(a, b) = (a . b)^2.

    mean k(t, t) + mean k(s, s) - 2 mean k(s, t) over pairs of channels and the batch; each channel's map of norm 1.
    The larger map is average-pooled to the smaller's size.
    """

    Config = NSTConfig
    dims = (3,)

    def compare(self, number: int, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = (F.normalize(x.flatten(2), dim=2) for x in match_spatial_size(student, teacher))
        return _kernel(t, t) + _kernel(s, s) - 2 * _kernel(s, t)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.transpose(1, 2)).square().mean()
