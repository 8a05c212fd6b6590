"""Contrastive representation distillation (Tian, Krishnan and Isola 2020, arXiv 1910.10699)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd.data.batch import Batch
from kd.methods.base import MethodContext, Terms, cross_entropy
from kd.methods.paired import FeatureMethod, FeatureMethodConfig
from kd.models.base import ModelOutput

EPS = 1e-7


class CRDConfig(FeatureMethodConfig):
    name: Literal["crd"]
    width: int = Field(ge=1, le=65536)
    negatives: int = Field(ge=1, le=1_000_000)
    tau: float = Field(ge=0.01, le=100)
    momentum: float = Field(ge=0, lt=1)


class CRD(FeatureMethod):
    """loss = alpha * CE + beta * (the student's anchor + the teacher's anchor), summed over the pairs of vectors.

    v_s, v_t: the taps, each through a linear layer of its own, at norm 1; both layers are learned. With a bank of such
    vectors of the other network for all N training samples, D = exp(v . w / tau) / Z and c = K / N, an anchor is
    the mean over the batch of -log(P / (P + c)) - K mean over the negatives of log(c / (D + c)), P being D of the
    sample itself. Z is fixed by the first batch. After each step the batch's rows move towards v by 1 - momentum.
    Negatives: K random training samples, of which those of the sample's own class do not count. They are drawn for the
    whole batch (the authors draw K for each sample: 16384 vectors a sample to gather), so both banks are read once.
    """

    Config = CRDConfig
    dims = (1,)

    @classmethod
    def needs_labels(cls, config: Any) -> bool:
        return True

    def __init__(self, config: CRDConfig, spec: MethodContext):
        super().__init__(config, spec)
        self.memories = nn.ModuleList(
            _Memory(config, spec.student[s][0], spec.teacher[t][0], spec) for s, t in self.pairs
        )

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        assert teacher is not None
        both = zip(self.memories, self.pairs, strict=True)
        each = [memory(batch, student.taps[s], teacher.taps[t]) for memory, (s, t) in both]
        return {
            "hard": (self.config.alpha, cross_entropy(batch, student)),
            "crd": (self.config.beta, sum(each[1:], each[0])),
        }


class _Memory(nn.Module):
    """Two embeddings, two banks [samples, width], and the constants of both anchors (0: not yet known)."""

    student_bank: Tensor
    teacher_bank: Tensor
    constants: Tensor
    labels: Tensor
    rows: Tensor

    def __init__(self, config: CRDConfig, student: int, teacher: int, spec: MethodContext):
        super().__init__()
        self.config = config
        self.student, self.teacher = (
            nn.Linear(student, config.width),
            nn.Linear(teacher, config.width),
        )
        for name in ("student_bank", "teacher_bank"):
            self.register_buffer(name, F.normalize(torch.randn(spec.samples, config.width), dim=1))
        self.register_buffer("constants", torch.zeros(2))
        assert spec.labels is not None
        self.register_buffer("labels", spec.labels.cpu(), persistent=False)
        self.register_buffer("rows", torch.nonzero(self.labels >= 0)[:, 0], persistent=False)

    def forward(self, batch: Batch, student: Tensor, teacher: Tensor) -> Tensor:
        count = self.config.negatives
        drawn = self.rows[torch.randint(len(self.rows), (count,), device=self.rows.device)]
        other = self.labels[drawn] != batch.y[:, None]  # [B, K]
        v_s, v_t = (
            F.normalize(self.student(student), dim=1),
            F.normalize(self.teacher(teacher), dim=1),
        )
        sides = (v_s, self.teacher_bank), (v_t, self.student_bank)
        anchors = [
            self._anchor(n, v, bank, batch.index, drawn, other) for n, (v, bank) in enumerate(sides)
        ]
        for bank, v in ((self.student_bank, v_s), (self.teacher_bank, v_t)):
            moved = (
                self.config.momentum * bank[batch.index] + (1 - self.config.momentum) * v.detach()
            )
            bank[batch.index] = F.normalize(moved, dim=1).to(bank.dtype)
        return anchors[0] + anchors[1]

    def _anchor(
        self, number: int, v: Tensor, bank: Tensor, index: Tensor, drawn: Tensor, other: Tensor
    ) -> Tensor:
        positive = ((v * bank[index]).sum(dim=1) / self.config.tau).exp()
        negative = (v @ bank[drawn].T / self.config.tau).exp()
        with torch.no_grad():  # no question to the device: the loop does not wait
            first = len(self.rows) * torch.cat([positive[:, None], negative], dim=1).mean()
            known = self.constants[number]
            self.constants[number] = z = torch.where(known > 0, known, first.to(known.dtype))
        c = drawn.numel() / len(self.rows)
        positive, negative = positive / z, negative / z
        apart = (c / (negative + c + EPS)).log().mul(other).sum(dim=1) / other.sum(dim=1).clamp(
            min=1
        )
        return -((positive / (positive + c + EPS)).log() + drawn.numel() * apart).mean()
