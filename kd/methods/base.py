"""What every distillation method is: the taps it reads, the parts it trains, and the loss terms it returns."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from kd.core.settings import Settings
from kd.data.batch import Batch
from kd.models.base import ModelOutput, Net


@dataclass(frozen=True, slots=True)
class MethodContext:
    """What a method is built for."""

    student: dict[
        str, tuple[int, ...]
    ]  # tap -> shape without the batch axis, in the order of the network
    teacher: dict[str, tuple[int, ...]]
    classes: int
    samples: int  # one more than the largest Batch.index
    student_net: Net | None = (
        None  # only to look at, here and below: in `check` they are without weights
    )
    teacher_net: Net | None = (
        None  # frozen; for methods that read its head. Copy what you keep, never own it
    )
    epochs: int = 1  # of the whole training: Batch.epoch goes from 0 to it
    labels: Tensor | None = (
        None  # int64 [samples], by Batch.index; -1 for samples that are not trained on
    )


Terms = dict[str, tuple[float | Tensor, Tensor]]


class Method(nn.Module):
    """A method declares taps, owns its trainable parts as submodules, and returns named, weighted loss terms.

    The teacher is not inside. Parameters and buffers of a method are optimised, moved and saved with the student
    but are never part of it. Randomness at construction comes from the method's own stream.
    """

    Config: ClassVar[type[Settings]]
    needs_teacher: ClassVar[bool] = True
    views: ClassVar[int] = (
        1  # of each sample in a batch, which then has views * B rows: `chunk(views)` parts them
    )
    mixed: ClassVar[bool] = (
        False  # every image is blended with another one; its label is that of the larger share
    )
    self_taught: ClassVar[bool] = (
        False  # the teacher is an earlier run of the student's own model and recipe
    )
    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()

    @classmethod
    def check(cls, config: Any, spec: MethodContext) -> None:
        """Raise ValueError("key: what is wrong and what is allowed") if this method cannot work on this pair."""

    def __init__(self, config: Any, spec: MethodContext):
        super().__init__()
        self.config = config

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        """{name: (weight, value)}; the loss is the sum of weight * value. Logits and taps arrive as float32."""
        raise NotImplementedError

    @classmethod
    def previous_generation_config(cls, config: Any) -> Any:
        """The settings with which the teacher of a self-taught student was trained; None: `standard`."""
        return None

    @classmethod
    def needs_labels(cls, config: Any) -> bool:
        """Does it read labels other than by `hard`? Then it cannot take images whose labels are unknown (-1)."""
        return False

    def deploy(self, student: Net) -> Net:
        """What is evaluated and shipped after training: the student, unless a method keeps an adapter."""
        return student

    @property
    def graft(self) -> dict[str, Any] | None:
        """What `deploy` puts between student and teacher (see `kd.models.grafted`); None: nothing."""
        return None


Temperature = Annotated[
    float, Field(ge=1e-3, le=1e4)
]  # below it, logits / T would be too large for float32


class Weights(Settings):
    """alpha weighs the hard loss, beta the method's feature loss; what remains of 1 weighs the soft loss."""

    alpha: float = Field(ge=0, le=1)
    T: Temperature


class FeatureWeights(Weights):
    beta: float = Field(ge=0, le=1)

    @model_validator(mode="after")
    def _at_most_one(self) -> "FeatureWeights":
        if self.alpha + self.beta > 1 + 1e-9:
            raise ValueError(f"alpha + beta must be <= 1, got {self.alpha} + {self.beta}")
        return self


class LogitMethodConfig(Settings):
    """What every method on logits has: alpha weighs the hard loss."""

    alpha: float = Field(ge=0)
    standardize: bool = False  # compare standardised logits, see `standardise`


class WeightedConfig(Settings):
    """alpha weighs the hard loss, beta the method's own."""

    alpha: float = Field(ge=0)
    beta: float = Field(ge=0)


def linear_warmup(batch: Batch, over: float) -> float:
    """From 0 to 1 in the first `over` epochs, then 1."""
    return min(1.0, batch.epoch / over) if over > 0 else 1.0


def standardise(logits: Tensor) -> Tensor:
    """Each row at mean 0 and standard deviation 1 (Sun et al. 2024, arXiv 2403.01427)."""
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + 1e-7)


def comparison_logits(
    config: Any, student: ModelOutput, teacher: ModelOutput | None
) -> tuple[Tensor, Tensor]:
    """The logits that a method on logits compares."""
    assert teacher is not None
    if config.standardize:
        return standardise(student.logits), standardise(teacher.logits)
    return student.logits, teacher.logits


def require_non_target_classes(spec: MethodContext) -> None:
    """**Raises:** ValueError for two classes, where softmax over the others says nothing."""
    if spec.classes < 3:
        raise ValueError(
            f"name: it compares the classes beside the label's, so it needs 3 or more, not {spec.classes}"
        )


def non_target_logits(logits: Tensor, y: Tensor) -> Tensor:
    """[B, classes - 1]: the logits of all classes but the labels'."""
    place = torch.arange(logits.shape[1] - 1, device=y.device)
    return logits.gather(1, place + (place >= y[:, None]))


def soft_kl(student: Tensor, teacher: Tensor, T: float | Tensor) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)): summed over classes, averaged over the batch.

    Hinton, Vinyals and Dean 2015 (arXiv 1503.02531), section 2; T^2 keeps the size of its gradient as T grows.
    **Arguments:** float32 logits [B, classes]. **Returns:** a scalar, 0 when both are equal.
    """
    log_s, log_t = F.log_softmax(student / T, dim=1), F.log_softmax(teacher / T, dim=1)
    return T**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def mean_square(x: Tensor) -> Tensor:
    """A scalar, with a gradient whose order in memory is that of x: that of `x.square().mean()` and of F.mse_loss is
    always [N, C, H, W], with which a batch norm in channels_last is many times slower on a CPU."""
    return x.square().sum() / x.numel()


def cross_entropy(batch: Batch, student: ModelOutput) -> Tensor:
    """Cross-entropy with the labels, averaged over the batch: a scalar, in nats. An image without a label counts 0, so
    that a label weighs the same in every batch: alone among 128 images it would else outweigh what the teacher says."""
    return F.cross_entropy(student.logits, batch.y, ignore_index=-1, reduction="sum") / len(batch.y)
