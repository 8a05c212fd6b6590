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
    """Settings of the `crd` method."""

    name: Literal["crd"]
    embed_dim: int = Field(ge=1, le=65536)
    n_negatives: int = Field(ge=1, le=1_000_000)
    tau: float = Field(ge=0.01, le=100)
    momentum: float = Field(ge=0, lt=1)


class CRD(FeatureMethod):
    """loss = alpha * CE + beta * sum over the pairs of (student's anchor + teacher's anchor).

    v_s and v_t are the taps, which are vectors, each mapped by its own learned linear layer and
    scaled to norm 1. For each network a bank holds such vectors of all N training samples. An
    anchor compares v of one network with the vectors w in the bank of the other. With
    D = exp(v . w / tau) / Z and c = K / N, it is the mean over the batch of
    -log(P / (P + c)) - K * mean over the negatives of log(c / (D + c)), where P is D of the sample
    itself. Z is fixed by the first batch. After each step the batch's rows of the banks move
    towards v by 1 - momentum.

    The negatives are K random training samples; those of the sample's own class are ignored. They
    are drawn once per batch, so that each bank is read only once. The authors draw K per sample,
    which gathers 16384 vectors per sample.
    """

    Config = CRDConfig
    dims = (1,)

    @classmethod
    def needs_labels(cls, config: Any) -> bool:
        """Return True: negatives of the sample's own class are ignored."""
        return True

    def __init__(self, config: CRDConfig, context: MethodContext):
        super().__init__(config, context)
        self.memories = nn.ModuleList(
            _Memory(config, context.student[s][0], context.teacher[t][0], context)
            for s, t in self.pairs
        )

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        """Return the terms `hard` and `crd`."""
        assert teacher is not None
        memory_and_taps = zip(self.memories, self.pairs, strict=True)
        losses = [
            memory(batch, student.taps[s], teacher.taps[t]) for memory, (s, t) in memory_and_taps
        ]
        return {
            "hard": (self.config.alpha, cross_entropy(batch, student)),
            "crd": (self.config.beta, sum(losses[1:], losses[0])),
        }


class _Memory(nn.Module):
    """The embeddings, the banks and the normalising constants of one pair of taps.

    Attributes:
        student_bank: Student vectors [samples, embed_dim].
        teacher_bank: Teacher vectors [samples, embed_dim].
        constants: Z [2] of the student's and the teacher's anchor; 0 until the first batch.
        labels: int64 labels [samples]; -1 for samples that are not trained on.
        rows: Indices of the samples that are trained on.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    constants: Tensor
    labels: Tensor
    rows: Tensor

    def __init__(
        self, config: CRDConfig, student_width: int, teacher_width: int, context: MethodContext
    ):
        super().__init__()
        self.config = config
        self.student = nn.Linear(student_width, config.embed_dim)
        self.teacher = nn.Linear(teacher_width, config.embed_dim)
        for name in ("student_bank", "teacher_bank"):
            vectors = F.normalize(torch.randn(context.samples, config.embed_dim), dim=1)
            self.register_buffer(name, vectors)
        self.register_buffer("constants", torch.zeros(2))
        assert context.labels is not None
        self.register_buffer("labels", context.labels.cpu(), persistent=False)
        self.register_buffer("rows", torch.nonzero(self.labels >= 0)[:, 0], persistent=False)

    def forward(self, batch: Batch, student: Tensor, teacher: Tensor) -> Tensor:
        count = self.config.n_negatives
        negatives = self.rows[torch.randint(len(self.rows), (count,), device=self.rows.device)]
        other_class = self.labels[negatives] != batch.y[:, None]  # [B, K]
        v_s = F.normalize(self.student(student), dim=1)
        v_t = F.normalize(self.teacher(teacher), dim=1)
        sides = (v_s, self.teacher_bank), (v_t, self.student_bank)
        anchors = [
            self._anchor(side, v, bank, batch.index, negatives, other_class)
            for side, (v, bank) in enumerate(sides)
        ]
        momentum = self.config.momentum
        for bank, v in ((self.student_bank, v_s), (self.teacher_bank, v_t)):
            moved = momentum * bank[batch.index] + (1 - momentum) * v.detach()
            bank[batch.index] = F.normalize(moved, dim=1).to(bank.dtype)
        return anchors[0] + anchors[1]

    def _anchor(
        self,
        side: int,
        v: Tensor,
        bank: Tensor,
        index: Tensor,
        negatives: Tensor,
        other_class: Tensor,
    ) -> Tensor:
        """Return the anchor of the student (side 0) or of the teacher (side 1): a scalar."""
        positive = ((v * bank[index]).sum(dim=1) / self.config.tau).exp()
        negative = (v @ bank[negatives].T / self.config.tau).exp()
        with torch.no_grad():
            # torch.where instead of a branch: reading the value would wait for the device.
            first_z = len(self.rows) * torch.cat([positive[:, None], negative], dim=1).mean()
            stored_z = self.constants[side]
            z = torch.where(stored_z > 0, stored_z, first_z.to(stored_z.dtype))
            self.constants[side] = z
        c = negatives.numel() / len(self.rows)
        positive = positive / z
        negative = negative / z
        log_sum = (c / (negative + c + EPS)).log().mul(other_class).sum(dim=1)
        log_mean = log_sum / other_class.sum(dim=1).clamp(min=1)
        return -((positive / (positive + c + EPS)).log() + negatives.numel() * log_mean).mean()
