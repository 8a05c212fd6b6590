"""FitNets (Romero et al. 2015, arXiv 1412.6550), in the combined, one-stage form.

Paper: "FitNets: hints for thin deep nets".
"""

from typing import Literal

from torch import Tensor, nn

from kd.data.batch import Batch
from kd.methods.base import (
    FeatureWeights,
    MethodContext,
    Terms,
    cross_entropy,
    mean_square,
    soft_kl,
)
from kd.methods.paired import FeatureMethod, Pairs, match_spatial_size
from kd.models.base import ModelOutput


class FeatureConfig(FeatureWeights):
    """Settings of the `feature` method."""

    name: Literal["feature"]
    pairs: Pairs


class Feature(FeatureMethod):
    """loss = alpha * CE + beta * feature + (1 - alpha - beta) * T^2 * KL(teacher_T || student_T).

    `feature` is the mean over the `pairs` ([student tap, teacher tap]) of the mean squared error
    between the teacher's tap and the student's tap after a learned regressor. The regressor is a
    1 x 1 convolution for maps [C, H, W], of which the larger is average-pooled to the size of the
    smaller, and a linear layer for vectors [D].
    """

    Config = FeatureConfig

    def __init__(self, config: FeatureConfig, context: MethodContext):
        super().__init__(config, context)
        self.regressors = nn.ModuleList(
            _regressor(context.student[s], context.teacher[t]) for s, t in self.pairs
        )

    def compare(self, pair_index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the regressor's mean squared error, divided by the number of pairs."""
        # The 1 x 1 convolution and the pooling commute, so pool first.
        student, teacher = match_spatial_size(student, teacher)
        return mean_square(self.regressors[pair_index](student) - teacher) / len(self.pairs)

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        """Return the terms `hard`, `feature` and `soft`."""
        assert teacher is not None
        alpha = self.config.alpha
        beta = self.config.beta
        return {
            "hard": (alpha, cross_entropy(batch, student)),
            "feature": (beta, self.comparison_loss(student, teacher)),
            "soft": (
                max(0.0, 1 - alpha - beta),
                soft_kl(student.logits, teacher.logits, self.config.T),
            ),
        }


def _regressor(student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Module:
    return (
        nn.Conv2d(student[0], teacher[0], 1)
        if len(student) == 3
        else nn.Linear(student[0], teacher[0])
    )
