"""Function matching (Beyer et al. 2022, arXiv 2106.05237).

Paper: "Knowledge distillation: a good teacher is patient and consistent".
"""

from typing import Literal

from kd.core.settings import Settings
from kd.data.batch import Batch
from kd.methods.base import Method, Temperature, Terms, soft_kl
from kd.models.base import ModelOutput


class FunctionMatchingConfig(Settings):
    """Settings of the `function_matching` method."""

    name: Literal["function_matching"]
    T: Temperature


class FunctionMatching(Method):
    """loss = T^2 * KL(teacher_T || student_T) on blends of two images; no labels.

    Both networks see the same blend. Each image is blended with a random other image, whose share
    is uniform in 0..1/2 (mixup at strength 1, where the image with the larger share is named
    first), so that the student matches the teacher between the images as well. The teacher has to
    run once per seed and epoch, which makes this more expensive than methods whose views recur. It
    is meant for long training.
    """

    Config = FunctionMatchingConfig
    mixed = True

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        """Return the term `soft`."""
        assert teacher is not None
        return {"soft": (1.0, soft_kl(student.logits, teacher.logits, self.config.T))}
