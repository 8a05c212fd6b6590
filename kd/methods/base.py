"""The base class of all distillation methods, their shared settings and their shared loss terms."""

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
    """The networks and the training data that a method is built for.

    Attributes:
        student: Shape of each tap of the student without the batch axis, in network order.
        teacher: The same of the teacher.
        classes: Number of classes.
        samples: One more than the largest `Batch.index`.
        student_net: The student, to inspect only. In `Method.check` it has no weights.
        teacher_net: The frozen teacher, for methods that read its head; in `Method.check` it has no
            weights. Copy what you keep; never register it as a submodule.
        epochs: Length of the whole training; `Batch.epoch` runs from 0 to it.
        labels: int64 tensor [samples], indexed by `Batch.index`; -1 for samples that are not
            trained on.
    """

    student: dict[str, tuple[int, ...]]
    teacher: dict[str, tuple[int, ...]]
    classes: int
    samples: int
    student_net: Net | None = None
    teacher_net: Net | None = None
    epochs: int = 1
    labels: Tensor | None = None


Terms = dict[str, tuple[float | Tensor, Tensor]]  # name -> (weight, scalar value)


class Method(nn.Module):
    """Base class of the distillation methods.

    A method declares the taps that it reads, owns its trainable parts as submodules and returns
    named, weighted loss terms. The teacher is not a submodule. Parameters and buffers of a method
    are optimised, moved and saved with the student but are never part of it. Random initialisation
    draws from a random stream of the method's own.

    Attributes:
        Config: The settings class.
        needs_teacher: Whether the method needs a teacher.
        views: Number of views of each sample in a batch. The batch then has views * B rows, which
            `chunk(views)` separates by view.
        mixed: Whether every image is blended with another image. Its label is that of the image
            with the larger share.
        self_taught: Whether the teacher is an earlier run of the student's own model and recipe.
        student_taps: Names of the student's taps that `forward` reads.
        teacher_taps: Names of the teacher's taps that `forward` reads.
    """

    Config: ClassVar[type[Settings]]
    needs_teacher: ClassVar[bool] = True
    views: ClassVar[int] = 1
    mixed: ClassVar[bool] = False
    self_taught: ClassVar[bool] = False
    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()

    @classmethod
    def check(cls, config: Any, context: MethodContext) -> None:
        """Check that this method can train this pair of networks.

        Raises:
            ValueError: If it cannot; the message is "key: what is wrong and what is allowed".
        """

    def __init__(self, config: Any, context: MethodContext):
        super().__init__()
        self.config = config

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        """Return the loss terms.

        Args:
            batch: The batch that both networks were given.
            student: Logits and taps of the student, in float32.
            teacher: Logits and taps of the teacher, in float32; None without a teacher.

        Returns:
            {name: (weight, value)}; the loss is the sum of weight * value.
        """
        raise NotImplementedError

    @classmethod
    def previous_generation_config(cls, config: Any) -> Any:
        """Return the settings that train a self-taught student's teacher; None means `standard`."""
        return None

    @classmethod
    def needs_labels(cls, config: Any) -> bool:
        """Return whether labels are read other than by `cross_entropy`.

        If so, the method cannot train on images whose labels are unknown (-1).
        """
        return False

    def deploy(self, student: Net) -> Net:
        """Return the network to evaluate and ship: the student, unless an adapter is added."""
        return student

    @property
    def graft(self) -> dict[str, Any] | None:
        """What `deploy` inserts between student and teacher (see `kd.models.grafted`), or None."""
        return None


# At a lower temperature logits / T would be too large for float32.
Temperature = Annotated[float, Field(ge=1e-3, le=1e4)]


class Weights(Settings):
    """Settings of methods whose loss is alpha * hard + (1 - alpha) * soft."""

    alpha: float = Field(ge=0, le=1)
    T: Temperature


class FeatureWeights(Weights):
    """Settings of methods that also have a feature loss.

    The loss is alpha * hard + beta * feature + (1 - alpha - beta) * soft.
    """

    beta: float = Field(ge=0, le=1)

    @model_validator(mode="after")
    def _check_sum_of_weights(self) -> "FeatureWeights":
        if self.alpha + self.beta > 1 + 1e-9:
            raise ValueError(f"alpha + beta must be <= 1, got {self.alpha} + {self.beta}")
        return self


class LogitMethodConfig(Settings):
    """Settings of methods on logits; alpha is the weight of the hard loss."""

    alpha: float = Field(ge=0)
    standardize: bool = False  # compare standardised logits, see `standardise`


class WeightedConfig(Settings):
    """Settings of methods whose loss is alpha * hard + beta * the method's own loss."""

    alpha: float = Field(ge=0)
    beta: float = Field(ge=0)


def linear_warmup(batch: Batch, warmup_epochs: float) -> float:
    """Return a factor that rises linearly from 0 to 1 over `warmup_epochs` and then stays 1."""
    return min(1.0, batch.epoch / warmup_epochs) if warmup_epochs > 0 else 1.0


def standardise(logits: Tensor) -> Tensor:
    """Scale each row to mean 0 and standard deviation 1 (Sun et al. 2024, arXiv 2403.01427)."""
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + 1e-7)


def comparison_logits(
    config: Any, student: ModelOutput, teacher: ModelOutput | None
) -> tuple[Tensor, Tensor]:
    """Return the logits to compare, standardised if the configuration sets `standardize`."""
    assert teacher is not None
    if config.standardize:
        return standardise(student.logits), standardise(teacher.logits)
    return student.logits, teacher.logits


def require_non_target_classes(context: MethodContext) -> None:
    """Check that there are at least three classes.

    Raises:
        ValueError: With two classes, where the softmax over the non-target classes is always 1.
    """
    if context.classes < 3:
        raise ValueError(
            "name: this method compares the classes other than the label's and needs 3 or more, "
            f"not {context.classes}"
        )


def non_target_logits(logits: Tensor, y: Tensor) -> Tensor:
    """Return the logits [B, classes - 1] of all classes but the labels'."""
    index = torch.arange(logits.shape[1] - 1, device=y.device)
    return logits.gather(1, index + (index >= y[:, None]))


def soft_kl(student: Tensor, teacher: Tensor, T: float | Tensor) -> Tensor:
    """Return T^2 * KL(softmax(teacher / T) || softmax(student / T)), averaged over the batch.

    Hinton, Vinyals and Dean 2015 (arXiv 1503.02531), section 2. The divergence is summed over the
    classes. The factor T^2 keeps the size of its gradient as T grows.

    Args:
        student: float32 logits [B, classes].
        teacher: float32 logits [B, classes].
        T: Temperature.

    Returns:
        A scalar, 0 when both are equal.
    """
    log_s = F.log_softmax(student / T, dim=1)
    log_t = F.log_softmax(teacher / T, dim=1)
    return T**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def mean_square(x: Tensor) -> Tensor:
    """Return the mean of the squares, a scalar whose gradient has the memory format of x.

    The gradients of `x.square().mean()` and F.mse_loss are always laid out as [N, C, H, W]. With
    them a batch norm in channels_last is many times slower on a CPU.
    """
    return x.square().sum() / x.numel()


def cross_entropy(batch: Batch, student: ModelOutput) -> Tensor:
    """Return the cross-entropy with the labels, averaged over the batch: a scalar, in nats.

    An image without a label adds 0 to the average, so a label has the same weight in every batch.
    Otherwise the only label among 128 images would outweigh the teacher.
    """
    return F.cross_entropy(student.logits, batch.y, ignore_index=-1, reduction="sum") / len(batch.y)
