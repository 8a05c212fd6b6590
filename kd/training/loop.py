"""The training loop. It knows no configuration file, no directory and no tracker."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from kd.core.errors import DivergedError
from kd.core.interleave import RunCache
from kd.core.rng import named_seed, random_state, restore_random_state
from kd.data.augment import Augment
from kd.data.batch import Batch
from kd.data.loader import Split, batches
from kd.methods.base import Method
from kd.models.base import ModelOutput, Net
from kd.optim import Optimizer, Schedule
from kd.training.device import Device

# Outputs of the frozen teacher for a batch: float32, without gradients
TeacherOutputs = Callable[[Batch], ModelOutput]

EpochMetrics = dict[str, Any]  # "epoch", "lr", "accuracy", "loss", each loss term, ...


class Recipe(NamedTuple):
    """How long and on which batches a student is trained."""

    epochs: int
    batch_size: int
    seed: int  # of order, views and dropout
    augment: Augment
    schedule: Schedule


class TrainingState:
    """Everything that training changes, as it is between two steps: the content of a checkpoint."""

    def __init__(self, student: Net, method: Method, optimizer: Optimizer):
        self.student = student
        self.method = method
        self.optimizers = optimizer.build([*student.parameters(), *method.parameters()])
        groups = [group for o in self.optimizers for group in o.param_groups]
        self.base_lrs = [(group, group["lr"]) for group in groups]  # where the schedule is 1
        self.epoch = 0  # epochs done
        self.step = 0  # steps done of the next epoch
        self.step_metrics: dict[str, list[torch.Tensor]] = {}  # scalars on the device, per step

    def dump(self) -> dict[str, Any]:
        """Return the state as plain values and tensors."""
        return {
            "student": self.student.state_dict(),
            "method": self.method.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "epoch": self.epoch,
            "step": self.step,
            "values": {name: torch.stack(values) for name, values in self.step_metrics.items()},
            "random": random_state(),
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Restore the state returned by `dump`.

        Raises:
            RuntimeError, ValueError, KeyError: The state belongs to another model or method.
        """
        self.student.load_state_dict(saved["student"])
        self.method.load_state_dict(saved["method"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)  # replaces the parameter groups
        groups = [group for o in self.optimizers for group in o.param_groups]
        self.base_lrs = [(group, lr) for group, (_, lr) in zip(groups, self.base_lrs, strict=True)]
        device = next(self.student.parameters()).device
        self.epoch = saved["epoch"]
        self.step = saved["step"]
        self.step_metrics = {
            name: list(values.to(device)) for name, values in saved["values"].items()
        }
        restore_random_state(saved["random"])

    def means(self) -> dict[str, float]:
        """Return the mean of each metric over the epoch's steps.

        Raises:
            DivergedError: A loss term or a weight is not finite.
        """
        columns = [torch.stack(values) for values in self.step_metrics.values()]
        table = torch.stack(columns).cpu().double()
        for step in (~table.isfinite()).any(dim=0).nonzero()[:1, 0].tolist():
            values = dict(zip(self.step_metrics, table[:, step].tolist(), strict=True))
            broken = [name for name, value in values.items() if not math.isfinite(value)]
            term = broken[-1]  # the loss itself comes before its terms
            raise DivergedError(
                f"epoch {self.epoch + 1}, step {step + 1}: the loss term {term!r} is "
                f"{values[term]}; try a smaller optimizer.lr"
            )
        weights = [*self.student.state_dict().values(), *self.method.state_dict().values()]
        if not torch.stack([value.isfinite().all() for value in weights]).all():
            raise DivergedError(
                f"epoch {self.epoch + 1}, step {self.step}: the student's weights are not finite; "
                "try a smaller optimizer.lr"
            )
        return dict(zip(self.step_metrics, table.mean(dim=1).tolist(), strict=True))


def train(
    state: TrainingState,
    teacher: TeacherOutputs | None,
    data: Split,
    recipe: Recipe,
    device: Device,
    cache: RunCache | None = None,
) -> Iterator[EpochMetrics | None]:
    """Train the student of `state`, and the method's own modules, in place and from where they are.

    Args:
        state: Student, method and optimizers; the trained student is in it afterwards.
        teacher: Called with each batch; None for methods without a teacher.
        data: The training images.
        recipe: Epochs, batch size, seed, augmentation and schedule.
        device: Runs the forward passes in its precision.
        cache: Shares batches with interleaved runs.

    Yields:
        None after each step. After each epoch its metrics: "epoch", "lr", "accuracy" (0 to 1, on
        augmented images in train mode), "loss" and each loss term, as means over the steps.

    Raises:
        DivergedError: A loss term or a weight is not finite.
    """
    student, method = state.student, state.method
    labelled = (data.targets >= 0).float().mean()
    steps = data.batches(recipe.batch_size)
    forward = device.forward(student)
    epoch_batches = partial(
        batches,
        data,
        recipe.batch_size,
        recipe.seed,
        augment=recipe.augment,
        views_each=method.views,
        mixed=method.mixed,
        shared=cache,
    )
    for epoch in range(state.epoch, recipe.epochs):
        student.train()
        method.train()
        if state.step == 0:
            torch.manual_seed(named_seed(recipe.seed, f"dropout/{epoch}"))
            state.step_metrics = {}
        for batch in epoch_batches(epoch, start=state.step):
            factor = recipe.schedule.factor(epoch * steps + state.step, recipe.epochs * steps)
            for group, lr in state.base_lrs:
                group["lr"] = lr * factor
            with device.autocast():
                output = forward(batch.x, method.student_taps).float()
            terms = method(batch, output, teacher(batch) if teacher else None)
            zero = torch.zeros((), device=batch.y.device)
            loss = sum((weight * value for weight, value in terms.values()), zero)
            loss.backward()
            for optimizer in state.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            correct = (output.logits.argmax(dim=1) == batch.y).float().mean() / labelled
            values = {name: value for name, (_, value) in terms.items()}
            for name, value in {"accuracy": correct, "loss": loss, **values}.items():
                # Stays on the device, so the loop does not wait for it
                state.step_metrics.setdefault(name, []).append(value.detach())
            state.step += 1
            yield None
        metrics = {"epoch": epoch + 1, "lr": state.base_lrs[0][0]["lr"], **state.means()}
        state.epoch = epoch + 1
        state.step = 0
        yield metrics
