"""Label smoothing (Szegedy et al. 2016, arXiv 1512.00567, section 7).

Paper: "Rethinking the inception architecture for computer vision".
"""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field

from kd.core.settings import Settings
from kd.data.batch import Batch
from kd.methods.base import Method, Terms, cross_entropy
from kd.models.base import ModelOutput


class LabelSmoothingConfig(Settings):
    """Settings of the `label_smoothing` method."""

    name: Literal["label_smoothing"]
    smoothing: float = Field(ge=0, lt=1)


class LabelSmoothing(Method):
    """loss = (1 - smoothing) * CE + smoothing * mean over all classes of -log softmax(student).

    The target probability is 1 - smoothing + smoothing / classes for the label and
    smoothing / classes for each other class.
    """

    Config = LabelSmoothingConfig
    needs_teacher = False

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        """Return the terms `hard` and `uniform`."""
        uniform = -F.log_softmax(student.logits, dim=1).mean()
        weight = self.config.smoothing
        return {"hard": (1 - weight, cross_entropy(batch, student)), "uniform": (weight, uniform)}
