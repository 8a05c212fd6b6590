"""The loop that everyone writes: what kd's speed is compared with.

It follows PyTorch's knowledge-distillation tutorial and its CIFAR examples, as a good engineer would write it in an
afternoon: torchvision's transforms on PIL images, a DataLoader with two workers, float32, the teacher's forward pass
in every step, `loss.item()` for the log. Nothing in it is slower than it has to be for that.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Images(Dataset):
    """uint8 [N, H, W, 3] as torchvision's CIFAR10 gives them: one PIL image at a time, transformed."""

    def __init__(self, images: Tensor, labels: Tensor, mean: list[float], std: list[float]):
        from torchvision import transforms as T

        self.images, self.labels = images.numpy(), labels.tolist()
        steps = [
            T.RandomCrop(images.shape[1], padding=4),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(mean, std),
        ]
        self.transform = T.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def epochs(
    student: nn.Module,
    teacher: nn.Module | None,
    regressor: nn.Module | None,
    data: Images,
    batch_size: int,
    device: torch.device,
    T: float = 4.0,
    alpha: float = 0.1,
    beta: float = 0.2,
) -> Iterator[float]:
    """Train on and on; each item is the mean loss of one more epoch. With a teacher: Hinton's loss; with a regressor
    too (from the student's `pool2` to the teacher's): FitNets' on top of it."""
    loader = DataLoader(data, batch_size, shuffle=True, num_workers=2, drop_last=True, persistent_workers=True,
                        pin_memory=device.type == "cuda")  # fmt: skip
    parameters = [*student.parameters(), *(regressor.parameters() if regressor else ())]
    optimizer = torch.optim.SGD(parameters, 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    student.train()
    if teacher is not None:
        teacher.eval()
    while True:
        running = 0.0
        for inputs, labels in loader:
            inputs, labels = inputs.to(device), labels.to(device)
            optimizer.zero_grad()
            logits, hidden = _forward(student, inputs, regressor is not None)
            loss = F.cross_entropy(logits, labels)
            if teacher is not None:
                with torch.no_grad():
                    taught, hint = _forward(teacher, inputs, regressor is not None)
                soft = F.kl_div(F.log_softmax(logits / T, 1), F.softmax(taught / T, 1), reduction="batchmean") * T * T
                if regressor is None:
                    loss = alpha * loss + (1 - alpha) * soft
                else:
                    loss = alpha * loss + beta * F.mse_loss(regressor(hidden), hint) + (1 - alpha - beta) * soft
            loss.backward()
            optimizer.step()
            running += loss.item()
        yield running / len(loader)


def _forward(net: nn.Module, x: Tensor, tapped: bool) -> tuple[Tensor, Tensor]:
    out = net.tapped(x, ["pool2"] if tapped else [])  # type: ignore[operator]
    return out.logits, out.taps.get("pool2", out.logits)
