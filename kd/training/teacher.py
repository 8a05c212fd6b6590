"""The frozen teacher: the student of an ordinary `standard` run, or the user's own weights."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kd import models
from kd.config.schema import Config
from kd.core.errors import UserError
from kd.data import Data
from kd.data.batch import Batch
from kd.models import weights
from kd.models.base import ModelOutput, Net
from kd.models.ensemble import Average, Ensemble
from kd.training.device import Device
from kd.training.metrics import metrics, predict

log = logging.getLogger(__name__)


class Teacher(NamedTuple):
    """A frozen network in eval mode, and its results on the validation images."""

    net: Net
    sources: tuple[str, ...]  # the weight files: one, or one per member of an ensemble
    metrics: dict[str, float]  # test_* as recorded after its training, val_* as measured now
    val_logits: Tensor | None  # [n, classes]
    guard: "FrozenCheck"


def load(
    config: Config, data: Data, device: Device, source: Path, trained: dict[str, Any] | None
) -> Teacher:
    """Load the teacher whose weights are in the file `source`.

    Args:
        config: Configuration of the student's run.
        data: The data set.
        device: Where the teacher runs.
        source: The file of weights.
        trained: The result of the run that trained the teacher, or None for the user's own weights.

    Raises:
        UserError: The weights are damaged or do not fit, or their validation accuracy differs from
            the one after their training.
    """
    net = models.build(config.teacher.network, len(data.classes), data.size)
    try:
        weights.load_weights(net, source, "teacher: " if trained else weights.EXTERNAL)
    except UserError as error:
        remedy = f"; remove {source.parent} to train the teacher again" if trained else ""
        raise UserError(f"{error}{remedy}") from error
    freeze(net, device)
    guard = FrozenCheck(net)
    teacher_metrics = dict(trained["metrics"]) if trained else {}
    val_logits = None
    if data.val is not None:
        val_logits = predict(net, data.val, device)
        measured = metrics(val_logits, data.val.targets)
        if trained and abs(measured["accuracy"] - teacher_metrics["val_accuracy"]) > 0.005:
            raise UserError(
                f"teacher: {source} has a validation accuracy of {measured['accuracy']:.4f}, not "
                f"the {teacher_metrics['val_accuracy']:.4f} it had when it was trained; "
                "its weights or the data have changed"
            )
        teacher_metrics |= {f"val_{name}": value for name, value in measured.items()}
    return Teacher(net, (str(source),), teacher_metrics, val_logits, guard)


def build_ensemble(
    members: Sequence[Teacher], average: Average, data: Data, device: Device
) -> Teacher:
    """Combine several teachers into one, whose outputs are averaged as `average` specifies."""
    net = Ensemble([member.net for member in members], average)
    freeze(net, device)
    sources = tuple(source for member in members for source in member.sources)
    if data.val is None:
        return Teacher(net, sources, {}, None, FrozenCheck(net))
    val_logits = predict(net, data.val, device)
    measured = metrics(val_logits, data.val.targets)
    val_metrics = {f"val_{name}": value for name, value in measured.items()}
    return Teacher(net, sources, val_metrics, val_logits, FrozenCheck(net))


def freeze(net: Net, device: Device) -> None:
    """Move a network to the device, and put it in eval mode without gradients."""
    device.prepare_module(net).eval().requires_grad_(False)


class TeacherForward:
    """The forward pass of a frozen teacher: its logits and the taps of the given names."""

    def __init__(self, net: Net, taps: Sequence[str], device: Device):
        self.net = net
        self.taps = tuple(taps)
        self.device = device

    def __call__(self, batch: Batch) -> ModelOutput:
        """Return the float32 outputs for a batch."""
        return self.of(batch.x)

    def of(self, x: Tensor) -> ModelOutput:
        """Return the float32 outputs for normalised images [B, 3, H, W]."""
        with torch.no_grad(), self.device.autocast():
            return self.net.forward_taps(x, self.taps).float()


class FrozenCheck:
    """Checks that a teacher stays in eval mode, without gradients, weights and buffers unchanged.

    The state at the time of construction is the reference.
    """

    def __init__(self, net: Net):
        self.net = net
        self.initial = self._checksums()

    def check(self) -> None:
        """Check the teacher now.

        Raises:
            RuntimeError: The teacher is no longer frozen.
        """
        if any(m.training for m in self.net.modules()):
            raise RuntimeError("the teacher was left in train mode")
        if any(p.requires_grad or p.grad is not None for p in self.net.parameters()):
            raise RuntimeError("the teacher received gradients")
        if self._checksums() != self.initial:
            raise RuntimeError("the teacher's weights or buffers changed during distillation")

    def _checksums(self) -> list[tuple[float, float]]:
        """Return the sum and the sum of squares of every weight and buffer."""
        tensors = [t.detach().cpu().double() for t in self.net.state_dict().values()]
        return [(t.sum().item(), t.square().sum().item()) for t in tensors]
