"""Measurements of a network: accuracy, calibration, agreement with the teacher, and size."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kd.data.loader import Split, eval_batches
from kd.training.device import Device


def predict(net: nn.Module, data: Split, device: Device) -> Tensor:
    """Return the logits of a split's images in eval mode, and restore the network's mode.

    Returns:
        Float32 tensor [n, classes] on the CPU.
    """
    training = net.training
    net.eval()
    with torch.inference_mode(), device.autocast():
        logits = torch.cat([net(x).float() for x in eval_batches(data)]).cpu()
    net.train(training)
    return logits


def predictions(logits: Tensor) -> Tensor:
    """Return the predicted class of each image: int64 tensor [n], given logits [n, classes]."""
    return logits.argmax(dim=1)


def metrics(logits: Tensor, labels: Tensor, teacher: Tensor | None = None) -> dict[str, float]:
    """Compute accuracy, calibration and, given the teacher's logits, agreement with the teacher.

    Args:
        logits: Tensor [n, classes].
        labels: Int64 tensor [n].
        teacher: The teacher's logits of the same images, [n, classes].

    Returns:
        `accuracy` (0..1), `nll` (nats), `brier` (the multi-class score of Brier 1950, 0..2) and
        `ece` (0..1, 15 equal bins; Guo et al. 2017, arXiv 1706.04599). With `teacher` also
        `agreement` (of the top-1 classes, 0..1) and `teacher_kl`, KL(teacher || student) (nats,
        T = 1).
    """
    predicted = predictions(logits)
    labels = labels.cpu()
    log_p = F.log_softmax(logits.double(), dim=1)
    p = log_p.exp()
    right = predicted == labels
    values = {
        "accuracy": right.double().mean().item(),
        "nll": F.nll_loss(log_p, labels).item(),
        "brier": (p - F.one_hot(labels, p.shape[1])).square().sum(dim=1).mean().item(),
        "ece": _ece(*_bins(p.amax(dim=1), right)),
    }
    if teacher is not None:
        log_t = F.log_softmax(teacher.double(), dim=1)
        values["agreement"] = (predicted == predictions(teacher)).double().mean().item()
        values["teacher_kl"] = F.kl_div(log_p, log_t, reduction="batchmean", log_target=True).item()
    return values


BINS = 15


def _bins(confidence: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum (images, confidences, right answers) per bin (a, b] of confidence: float64 [BINS]."""
    bin_index = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    zero = torch.zeros(BINS, dtype=torch.float64)
    return tuple(
        zero.index_add(0, bin_index, x.double())
        for x in (torch.ones_like(confidence), confidence, right)
    )  # type: ignore[return-value]


def _ece(images: Tensor, confidence: Tensor, right: Tensor) -> float:
    """Return the expected calibration error, given the sums of each bin."""
    return ((confidence - right).abs().sum() / images.sum()).item()


def reliability(logits: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """Return the data of a reliability diagram, for 15 equal bins of confidence.

    Args:
        logits: Tensor [n, classes].
        labels: Int64 tensor [n].

    Returns:
        Per bin the number of `images`, the sum of their `confidence`, and how many were `right`.
    """
    confidence = F.softmax(logits.double(), dim=1).amax(dim=1)
    images, confidences, right = _bins(confidence, predictions(logits) == labels.cpu())
    return {
        "images": images.tolist(),
        "confidence": confidences.tolist(),
        "right": right.tolist(),
    }


def confusion(logits: Tensor, labels: Tensor, classes: int) -> list[list[int]]:
    """Return the confusion matrix: counts[true class][predicted class]."""
    cells = labels.cpu() * classes + predictions(logits)
    return torch.bincount(cells, minlength=classes**2).reshape(classes, classes).tolist()


def size(net: nn.Module, image: int) -> dict[str, int]:
    """Count a network's parameters and its multiply-accumulate operations for one image.

    Only convolutions and matrix products count as operations.

    Args:
        net: The network.
        image: Height and width of the image in pixels.

    Returns:
        `params` and `macs`.
    """
    import copy

    # without gradients: the counter fails on modules that receive a parameter as their input
    meta = copy.deepcopy(net).to("meta").eval().requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        meta(torch.empty(1, 3, image, image, device="meta"))
    return {"params": count(net.parameters()), "macs": counter.get_total_flops() // 2}


def count(parameters: Iterable[Tensor]) -> int:
    """Return the total number of elements of the parameters."""
    return sum(p.numel() for p in parameters)
