"""Born-again neural networks (Furlanello et al. 2018, arXiv 1805.04770).

This is self-distillation over generations.
"""

from typing import Any, Literal

from pydantic import Field

from kd.data.batch import Batch
from kd.methods.base import Method, Terms, Weights, cross_entropy, soft_kl
from kd.models.base import ModelOutput


class BornAgainConfig(Weights):
    """Settings of the `born_again` method."""

    name: Literal["born_again"]
    generation: int = Field(ge=1, le=100)


class BornAgain(Method):
    """loss = alpha * CE + (1 - alpha) * T^2 * KL(teacher_T || student_T).

    The teacher is the previous generation. Generation 0 is the student's own model, trained by its
    own recipe without a teacher (seed teacher.seed). Generation g is taught by g - 1 (seed
    teacher.seed + g - 1). All earlier generations are trained, or found, as teachers are;
    `model@teacher` is ignored. The paper's ensemble of the generations is left out.
    """

    Config = BornAgainConfig
    self_taught = True

    @classmethod
    def previous_generation_config(cls, config: Any) -> Any:
        """Return the settings of the previous generation; None for generation 0."""
        return (
            config.model_copy(update={"generation": config.generation - 1})
            if config.generation > 1
            else None
        )

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        """Return the terms `hard` and `soft`."""
        assert teacher is not None
        alpha = self.config.alpha
        soft = soft_kl(student.logits, teacher.logits, self.config.T)
        return {"hard": (alpha, cross_entropy(batch, student)), "soft": (1 - alpha, soft)}
