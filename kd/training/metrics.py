"""What is measured of a network: accuracy, calibration, agreement with the teacher, size."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kd.data.loader import Split, eval_batches
from kd.training.device import Device


def predict(net: nn.Module, data: Split, device: Device) -> Tensor:
    """float32 logits [n, classes] of a split's images, in eval mode, on the CPU; the net's mode is restored."""
    training = net.training
    net.eval()
    with torch.inference_mode(), device.autocast():
        logits = torch.cat([net(x).float() for x in eval_batches(data)]).cpu()
    net.train(training)
    return logits


def metrics(logits: Tensor, labels: Tensor, teacher: Tensor | None = None) -> dict[str, float]:
    """Accuracy (0..1), NLL (nats), ECE (0..1, 15 equal bins; Guo et al. 2017, arXiv 1706.04599); and, given the
    teacher's logits, top-1 agreement with it (0..1) and KL(teacher || student) (nats, T = 1).

    **Arguments:** logits [n, classes], labels int64 [n], teacher logits [n, classes] of the same images.
    """
    logits, labels = logits.double(), labels.cpu()
    log_p = F.log_softmax(logits, dim=1)
    confidence, predicted = log_p.exp().max(dim=1)
    right = predicted == labels
    found = {
        "accuracy": right.double().mean().item(),
        "nll": F.nll_loss(log_p, labels).item(),
        "ece": _ece(*_bins(confidence, right)),
    }
    if teacher is not None:
        log_t = F.log_softmax(teacher.double(), dim=1)
        found["agreement"] = (predicted == teacher.argmax(dim=1)).double().mean().item()
        found["teacher_kl"] = F.kl_div(log_p, log_t, reduction="batchmean", log_target=True).item()
    return found


BINS = 15


def _bins(confidence: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(images, sum of confidences, right answers) of each bin (a, b] of confidence: float64 [BINS]."""
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    zero = torch.zeros(BINS, dtype=torch.float64)
    return tuple(
        zero.index_add(0, place, x.double())
        for x in (torch.ones_like(confidence), confidence, right)
    )  # type: ignore[return-value]


def _ece(images: Tensor, confidence: Tensor, right: Tensor) -> float:
    return ((confidence - right).abs().sum() / images.sum()).item()


def reliability(logits: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """What a reliability diagram shows: for each of 15 equal bins of confidence the number of images, the sum of
    their confidences, and how many were right."""
    confidence, predicted = F.softmax(logits.double(), dim=1).max(dim=1)
    found = _bins(confidence, predicted == labels.cpu())
    return dict(
        zip(("images", "confidence", "right"), (part.tolist() for part in found), strict=True)
    )


def confusion(logits: Tensor, labels: Tensor, classes: int) -> list[list[int]]:
    """counts[true class][predicted class]."""
    cells = labels.cpu() * classes + logits.argmax(dim=1)
    return torch.bincount(cells, minlength=classes**2).reshape(classes, classes).tolist()


def size(net: nn.Module, image: int) -> dict[str, int]:
    """Parameters, and multiply-accumulates of the convolutions and matrix products for one image of that size."""
    import copy

    meta = (
        copy.deepcopy(net).to("meta").eval().requires_grad_(False)
    )  # the counter fails on modules fed a parameter
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        meta(torch.empty(1, 3, image, image, device="meta"))
    return {"params": count(net.parameters()), "macs": counter.get_total_flops() // 2}


def count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)
