"""The hot loop. It knows no configuration file, no directory, no tracker: it yields a row an epoch."""

import math
from collections.abc import Callable, Iterator

import torch

from kd.data.loader import Split, batches
from kd.device import Device
from kd.methods.base import Batch, Method
from kd.models.base import Net, Out
from kd.optim import Optimizer, Schedule
from kd.pack import Shared
from kd.seeds import stream
from kd.views import Augment

Teach = Callable[[Batch], Out]  # what the frozen teacher says of a batch: float32, without gradients


class DivergedError(Exception):
    """A loss term became NaN or infinite; the text names the term and the epoch."""


def train(
    student: Net,
    teach: Teach | None,
    method: Method,
    data: Split,
    augment: Augment,
    optimizer: Optimizer,
    schedule: Schedule,
    epochs: int,
    batch_size: int,
    seed: int,
    device: Device,
    shared: Shared | None = None,
) -> Iterator[dict[str, float] | None]:
    """Train `student` (and the method's own parts) in place; yield None after each step, and after each epoch a row:
    {"epoch", "lr", "accuracy", "loss" and each term}.

    `accuracy` (0..1) is of the training views, in train mode. Terms are means over the epoch's batches, before
    weighting. After the last epoch the student is the result.
    """
    optimizers = optimizer.build([*student.parameters(), *method.parameters()])
    groups = [(group, group["lr"]) for o in optimizers for group in o.param_groups]
    per_epoch, forward = data.batches(batch_size), device.forward(student)
    for epoch in range(epochs):
        student.train(), method.train()
        torch.manual_seed(stream(seed, f"dropout/{epoch}"))
        totals: dict[str, torch.Tensor] = {}
        drawn = batches(data, batch_size, seed, epoch, augment, method.views, shared)
        for step, batch in enumerate(drawn, start=epoch * per_epoch):
            for group, lr in groups:
                group["lr"] = lr * schedule.factor(step, epochs * per_epoch)
            with device.autocast():
                s = forward(batch.x, method.student_taps).float()
            terms = method(batch, s, teach(batch) if teach else None)
            loss = sum((weight * value for weight, value in terms.values()), torch.zeros((), device=batch.y.device))
            loss.backward()
            for o in optimizers:
                o.step()
                o.zero_grad(set_to_none=True)
            right = (s.logits.argmax(dim=1) == batch.y).float().mean()
            for name, value in {"accuracy": right, "loss": loss, **{n: v for n, (_, v) in terms.items()}}.items():
                totals[name] = totals.get(name, 0) + value.detach()  # stays on the device: no wait inside the loop
            yield None
        means = {name: total.item() / per_epoch for name, total in totals.items()}
        for name in reversed(means):
            if not math.isfinite(means[name]):
                what = f"the loss term {name!r} is {means[name]}"
                raise DivergedError(f"epoch {epoch + 1}: {what}; try a smaller optimizer.lr")
        yield {"epoch": epoch + 1, "lr": groups[0][0]["lr"], **means}
