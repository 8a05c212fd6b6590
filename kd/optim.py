"""Optimizers (torch's own) and learning-rate schedules, as typed settings that build themselves."""

import math
from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from kd.core.settings import Settings

Rate = Annotated[float, Field(gt=0, le=1e30)]  # the upper limit fits into float32
Decay = Annotated[float, Field(ge=0, le=1e3)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class SGD(Settings):
    """Settings of torch.optim.SGD."""

    name: Literal["sgd"]
    lr: Rate
    momentum: Momentum
    nesterov: bool
    weight_decay: Decay

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "SGD":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov=true needs momentum > 0")
        return self

    def build(self, parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
        """Return the optimizer of `parameters`, in a list."""
        settings = self.model_dump(exclude={"name"})
        return [torch.optim.SGD(parameters, fused=_fused(parameters), **settings)]


class Adam(Settings):
    """Settings of torch.optim.Adam and torch.optim.AdamW."""

    name: Literal["adam", "adamw"]
    lr: Rate
    beta1: Momentum
    beta2: Momentum
    eps: Rate
    weight_decay: Decay

    def build(self, parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
        """Return the optimizer of `parameters`, in a list."""
        optimizer_class = torch.optim.AdamW if self.name == "adamw" else torch.optim.Adam
        optimizer = optimizer_class(
            parameters,
            self.lr,
            (self.beta1, self.beta2),
            self.eps,
            weight_decay=self.weight_decay,
            fused=_fused(parameters),
        )
        return [optimizer]


class Muon(Settings):
    """Settings of torch.optim.Muon for matrices, and AdamW at `adamw_lr` for all other shapes.

    Muon takes only matrices.
    """

    name: Literal["muon"]
    lr: Rate
    momentum: Momentum
    weight_decay: Decay
    adamw_lr: Rate

    def build(self, parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
        """Return Muon for the matrices among `parameters` and AdamW for the others, where any."""
        matrices = [p for p in parameters if p.ndim == 2]
        others = [p for p in parameters if p.ndim != 2]
        decay = self.weight_decay
        optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            optimizers.append(
                torch.optim.Muon(matrices, self.lr, weight_decay=decay, momentum=self.momentum)
            )
        if others:
            optimizers.append(
                torch.optim.AdamW(others, self.adamw_lr, weight_decay=decay, fused=_fused(others))
            )
        return optimizers


Optimizer = Annotated[SGD | Adam | Muon, Field(discriminator="name")]
VARIANTS: dict[str, type[Settings]] = {"adam": Adam, "adamw": Adam, "muon": Muon, "sgd": SGD}


def _fused(parameters: Iterable[nn.Parameter]) -> bool:
    """Return whether torch has a fused optimizer step for all `parameters`."""
    return all(
        p.device.type in ("cpu", "cuda", "mps") and p.is_floating_point() for p in parameters
    )


class Schedule(Settings):
    """The learning rate over training, as a factor of the optimizer's `lr`.

    The factor is a pure function of progress. `warmup_fraction` is the fraction of training, from 0
    to 1, in which the rate rises linearly from 0 to `lr`. After it, `cosine` and `triangle` fall to
    `final_lr_factor` (along a half cosine, or a line), `step` multiplies by `gamma` at each of
    `milestones` (fractions of training), and `constant` stays.
    """

    name: Literal["cosine", "triangle", "step", "constant"]
    warmup_fraction: float = Field(ge=0, lt=1)
    final_lr_factor: float = Field(ge=0, le=1)
    milestones: list[Annotated[float, Field(gt=0, lt=1)]]
    gamma: float = Field(gt=0, le=1)

    def factor(self, step: int, steps: int) -> float:
        """Return the factor at optimizer step `step`, counted from 0, of `steps`."""
        progress = (step + 0.5) / steps
        if progress < self.warmup_fraction:
            return progress / self.warmup_fraction
        fall = (progress - self.warmup_fraction) / (1 - self.warmup_fraction)
        if self.name == "cosine":
            return self.final_lr_factor + (1 - self.final_lr_factor) * 0.5 * (
                1 + math.cos(math.pi * fall)
            )
        if self.name == "triangle":
            return self.final_lr_factor + (1 - self.final_lr_factor) * (1 - fall)
        if self.name == "step":
            return self.gamma ** sum(progress >= m for m in self.milestones)
        return 1.0

    def _fall(self, remaining: float) -> float:
        """Return the factor when a fraction of the way from 1 to `final_lr_factor` remains."""
        return self.final_lr_factor + (1 - self.final_lr_factor) * remaining
