"""The hot loop. It knows no configuration file, no directory, no tracker: it yields a row an epoch."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kd.core.errors import DivergedError
from kd.core.interleave import RunCache, random_state, restore_random_state
from kd.core.rng import named_seed
from kd.data.augment import Augment
from kd.data.batch import Batch
from kd.data.loader import Split, batches
from kd.methods.base import Method
from kd.models.base import ModelOutput, Net
from kd.optim import Optimizer, Schedule
from kd.training.device import Device

TeacherOutputs = Callable[
    [Batch], ModelOutput
]  # what the frozen teacher says of a batch: float32, without gradients


class TrainingState:
    """All that training changes, as it is between two steps: what a checkpoint must hold."""

    def __init__(self, student: Net, method: Method, optimizer: Optimizer):
        self.student, self.method = student, method
        self.optimizers = optimizer.build([*student.parameters(), *method.parameters()])
        self.base_lrs = [
            (group, group["lr"]) for o in self.optimizers for group in o.param_groups
        ]  # at factor 1
        self.epoch = self.step = 0  # epochs done; steps done of the next
        self.step_metrics: dict[
            str, list[torch.Tensor]
        ] = {}  # of these steps: a scalar each, on the device

    def dump(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {
            "student": self.student.state_dict(),
            "method": self.method.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "epoch": self.epoch,
            "step": self.step,
            "values": {name: torch.stack(values) for name, values in self.step_metrics.items()},
            "random": random_state(),
        }

    def load(self, kept: dict[str, Any]) -> None:
        """Be as `dump` found it. **Raises:** RuntimeError, ValueError or KeyError when that was of something else."""
        self.student.load_state_dict(kept["student"])
        self.method.load_state_dict(kept["method"])
        for o, was in zip(self.optimizers, kept["optimizers"], strict=True):
            o.load_state_dict(was)  # makes new groups
        groups = [group for o in self.optimizers for group in o.param_groups]
        self.base_lrs = [(group, lr) for group, (_, lr) in zip(groups, self.base_lrs, strict=True)]
        device = next(self.student.parameters()).device
        self.epoch, self.step = kept["epoch"], kept["step"]
        self.step_metrics = {
            name: list(values.to(device)) for name, values in kept["values"].items()
        }
        restore_random_state(kept["random"])

    def means(self) -> dict[str, float]:
        """The means of the epoch's values. **Raises:** DivergedError."""
        table = (
            torch.stack([torch.stack(values) for values in self.step_metrics.values()])
            .cpu()
            .double()
        )
        where = f"epoch {self.epoch + 1}, step"
        for step in (~table.isfinite()).any(dim=0).nonzero()[:1, 0].tolist():
            said = dict(zip(self.step_metrics, table[:, step].tolist(), strict=True))
            name = next(
                name for name in reversed(said) if not math.isfinite(said[name])
            )  # the loss itself comes first
            what = f"the loss term {name!r} is {said[name]}"
            raise DivergedError(f"{where} {step + 1}: {what}; try a smaller optimizer.lr")
        held = [*self.student.state_dict().values(), *self.method.state_dict().values()]
        if not torch.stack([value.isfinite().all() for value in held]).all():
            raise DivergedError(
                f"{where} {self.step}: the student's weights are not finite; try a smaller optimizer.lr"
            )
        return dict(zip(self.step_metrics, table.mean(dim=1).tolist(), strict=True))


def train(
    state: TrainingState,
    teach: TeacherOutputs | None,
    data: Split,
    augment: Augment,
    schedule: Schedule,
    epochs: int,
    batch_size: int,
    seed: int,
    device: Device,
    shared: RunCache | None = None,
) -> Iterator[dict[str, float] | None]:
    """Train `state`'s student (and the method's own parts) in place, from where it is; yield None after each step, and
    after each epoch a row: {"epoch", "lr", "accuracy", "loss" and each term}.

    `accuracy` (0..1) is of the training views, in train mode. Terms are means over the epoch's batches, before
    weighting. After the last epoch the student is the result.
    """
    student, method = state.student, state.method
    labelled = (data.targets >= 0).float().mean()
    per_epoch, forward = data.batches(batch_size), device.forward(student)
    for epoch in range(state.epoch, epochs):
        student.train(), method.train()
        if state.step == 0:
            torch.manual_seed(named_seed(seed, f"dropout/{epoch}"))
            state.step_metrics = {}
        for batch in batches(
            data, batch_size, seed, epoch, augment, method.views, shared, state.step, method.mixed
        ):
            for group, lr in state.base_lrs:
                group["lr"] = lr * schedule.factor(
                    epoch * per_epoch + state.step, epochs * per_epoch
                )
            with device.autocast():
                s = forward(batch.x, method.student_taps).float()
            terms = method(batch, s, teach(batch) if teach else None)
            loss = sum(
                (weight * value for weight, value in terms.values()),
                torch.zeros((), device=batch.y.device),
            )
            loss.backward()
            for o in state.optimizers:
                o.step()
                o.zero_grad(set_to_none=True)
            right = (s.logits.argmax(dim=1) == batch.y).float().mean() / labelled
            for name, value in {
                "accuracy": right,
                "loss": loss,
                **{n: v for n, (_, v) in terms.items()},
            }.items():
                state.step_metrics.setdefault(name, []).append(
                    value.detach()
                )  # stays on the device: no wait in the loop
            state.step += 1
            yield None
        row = {"epoch": epoch + 1, "lr": state.base_lrs[0][0]["lr"], **state.means()}
        state.epoch, state.step = epoch + 1, 0
        yield row
