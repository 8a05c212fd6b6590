"""Cross-entropy with the labels, without a teacher: what every method is compared with."""

from typing import Literal

from kd.methods.base import Batch, Method, Terms, hard
from kd.models.base import Out
from kd.settings import Settings


class StandardConfig(Settings):
    name: Literal["standard"]


class Standard(Method):
    """loss = CE(student, labels)."""

    Config = StandardConfig
    needs_teacher = False

    def forward(self, batch: Batch, student: Out, teacher: Out | None) -> Terms:
        return {"hard": (1.0, hard(batch, student))}
