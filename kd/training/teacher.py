"""The teacher: the student of an ordinary `standard` run, or the user's own weights; in either case frozen."""

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
from kd.models.ensemble import Ensemble, Mean
from kd.training.device import Device
from kd.training.metrics import metrics, predict

log = logging.getLogger(__name__)


class Teacher(NamedTuple):
    """A frozen network in eval mode, and what it says of the validation images."""

    net: Net
    sources: tuple[str, ...]  # the files of its weights; of an ensemble, of each member
    metrics: dict[str, float]  # test_* as recorded when it was trained, val_* as measured now
    val_logits: Tensor | None  # [n, classes]
    guard: "FrozenCheck"


def load(
    config: Config, data: Data, device: Device, source: Path, trained: dict[str, Any] | None
) -> Teacher:
    """The teacher whose weights are at `source`; `trained` is the result of the run that made it, if there is one.

    **Raises:** UserError when its weights are damaged, or no longer score what they scored when they were trained.
    """
    net = models.build(config.teacher, len(data.classes), data.size)
    try:
        weights.load_weights(net, source, "teacher: " if trained else weights.EXTERNAL)
    except UserError as error:
        again = (
            f"; when {source.parent} is removed, the teacher is trained again" if trained else ""
        )
        raise UserError(f"{error}{again}") from error
    freeze(net, device)
    guard = FrozenCheck(net)
    found = dict(trained["metrics"]) if trained else {}
    val_logits = None
    if data.val is not None:
        val_logits = predict(net, data.val, device)
        now = metrics(val_logits, data.val.targets)
        if trained and abs(now["accuracy"] - found["val_accuracy"]) > 0.005:
            raise UserError(
                f"teacher: {source} scores {now['accuracy']:.4f} on the validation images, not the "
                f"{found['val_accuracy']:.4f} it had when it was trained; its weights or the data changed"
            )
        found |= {f"val_{name}": value for name, value in now.items()}
    return Teacher(net, (str(source),), found, val_logits, guard)


def build_ensemble(members: Sequence[Teacher], mean: Mean, data: Data, device: Device) -> Teacher:
    """The teacher that these are together."""
    net = Ensemble([member.net for member in members], mean)
    freeze(net, device)
    sources = tuple(source for member in members for source in member.sources)
    if data.val is None:
        return Teacher(net, sources, {}, None, FrozenCheck(net))
    val_logits = predict(net, data.val, device)
    found = {f"val_{name}": value for name, value in metrics(val_logits, data.val.targets).items()}
    return Teacher(net, sources, found, val_logits, FrozenCheck(net))


def freeze(net: Net, device: Device) -> None:
    """Eval mode, no gradients, on the device."""
    device.prepare_module(net).eval().requires_grad_(False)


class TeacherForward:
    """`live(batch)`: what the frozen `net` says of a batch, with these taps, by a forward pass."""

    def __init__(self, net: Net, taps: Sequence[str], device: Device):
        self.net, self.taps, self.device = net, tuple(taps), device

    def __call__(self, batch: Batch) -> ModelOutput:
        return self.of(batch.x)

    def of(self, x: Tensor) -> ModelOutput:
        """The same of normalised images [B, 3, H, W]: float32."""
        with torch.no_grad(), self.device.autocast():
            return self.net.forward_taps(x, self.taps).float()


class FrozenCheck:
    """Holds a teacher to its promise: eval mode, no gradient, not one buffer or weight moved."""

    def __init__(self, net: Net):
        self.net = net
        self.initial = self._checksums()

    def check(self) -> None:
        """**Raises:** RuntimeError when the teacher changed since the guard was set."""
        if any(m.training for m in self.net.modules()):
            raise RuntimeError("the teacher was left in train mode")
        if any(p.requires_grad or p.grad is not None for p in self.net.parameters()):
            raise RuntimeError("the teacher received gradients")
        if self._checksums() != self.initial:
            raise RuntimeError("the teacher's weights or buffers changed during distillation")

    def _checksums(self) -> list[tuple[float, float]]:
        parts = [t.detach().cpu().double() for t in self.net.state_dict().values()]
        return [(t.sum().item(), t.square().sum().item()) for t in parts]
