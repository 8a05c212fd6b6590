"""Cross-entropy with the labels, without a teacher: the baseline of every comparison."""

from typing import Literal

from kd.core.settings import Settings
from kd.data.batch import Batch
from kd.methods.base import Method, Terms, cross_entropy
from kd.models.base import ModelOutput


class StandardConfig(Settings):
    """Settings of the `standard` method."""

    name: Literal["standard"]


class Standard(Method):
    """loss = CE(student, labels)."""

    Config = StandardConfig
    needs_teacher = False

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        """Return the term `hard`."""
        return {"hard": (1.0, cross_entropy(batch, student))}
