"""The usual distillation loop in plain PyTorch, with which kd's speed is compared.

    python -m benchmarks.plain IMAGES.pt TEACHER.safetensors --T 4 --alpha 0.1 --epochs 5

It follows PyTorch's knowledge-distillation tutorial and its CIFAR examples, as a good engineer
would write it in an afternoon: torchvision's transforms on PIL images, a DataLoader with two
workers, float32, the teacher's forward pass in every step, `loss.item()` for the log. Nothing in it
is slower than this design requires.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Images(Dataset):
    """A data set of uint8 images [N, H, W, 3] that works like torchvision's CIFAR10.

    An item is one PIL image, transformed, and its label.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: list[float],
        std: list[float],
        train: bool = True,
    ):
        from torchvision import transforms as T

        self.images, self.labels = images.numpy(), labels.tolist()
        augment = (
            [T.RandomCrop(images.shape[1], padding=4), T.RandomHorizontalFlip()] if train else []
        )
        self.transform = T.Compose([*augment, T.ToTensor(), T.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def steps(
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
    """Train without end and yield the loss of each step.

    With a teacher, the loss is Hinton's. With a regressor from the student's `pool2` to the
    teacher's, the loss of FitNets is added.
    """
    loader = DataLoader(
        data,
        batch_size,
        shuffle=True,
        num_workers=2,
        drop_last=True,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
    parameters = [*student.parameters(), *(regressor.parameters() if regressor else ())]
    optimizer = torch.optim.SGD(parameters, 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    student.train()
    if teacher is not None:
        teacher.eval()
    while True:
        for inputs, labels in loader:
            inputs, labels = (
                inputs.to(device, non_blocking=True),
                labels.to(device, non_blocking=True),
            )
            optimizer.zero_grad()
            logits, hidden = _forward(student, inputs, regressor is not None)
            loss = F.cross_entropy(logits, labels)
            if teacher is not None:
                with torch.no_grad():
                    taught, hint = _forward(teacher, inputs, regressor is not None)
                soft = (
                    F.kl_div(
                        F.log_softmax(logits / T, 1),
                        F.softmax(taught / T, 1),
                        reduction="batchmean",
                    )
                    * T
                    * T
                )
                if regressor is None:
                    loss = alpha * loss + (1 - alpha) * soft
                else:
                    loss = (
                        alpha * loss
                        + beta * F.mse_loss(regressor(hidden), hint)
                        + (1 - alpha - beta) * soft
                    )
            loss.backward()
            optimizer.step()
            yield loss.item()


def _forward(net: nn.Module, x: Tensor, tapped: bool) -> tuple[Tensor, Tensor]:
    out = net.forward_taps(x, ["pool2"] if tapped else [])  # type: ignore[operator]
    return out.logits, out.taps.get("pool2", out.logits)


def main() -> None:
    """Train with a teacher, measure the accuracy on the test images, and save the student."""
    import kd
    from benchmarks.networks import MEAN, STD, network

    parser = argparse.ArgumentParser("benchmarks.plain")
    parser.add_argument("images", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--T", type=float, default=4.0)
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("student.pt"))
    asked = parser.parse_args()
    device = torch.device(asked.device)
    found = torch.load(asked.images, weights_only=True)
    student, teacher = network(16).to(device), kd.load(asked.teacher).net.to(device)
    train = Images(found["train_images"], found["train_labels"], MEAN, STD)
    running, per_epoch = 0.0, len(train) // asked.batch_size
    taught = steps(student, teacher, None, train, asked.batch_size, device, asked.T, asked.alpha)
    for step in range(asked.epochs * per_epoch):
        running += next(taught)
        if (step + 1) % per_epoch == 0:
            print(f"epoch {(step + 1) // per_epoch}  loss {running / per_epoch:.4f}", flush=True)
            running = 0.0
    student.eval()
    right = total = 0
    test = Images(found["test_images"], found["test_labels"], MEAN, STD, train=False)
    with torch.no_grad():
        for inputs, labels in DataLoader(test, 500, num_workers=2):
            right += (student(inputs.to(device)).argmax(1).cpu() == labels).sum().item()
            total += len(labels)
    print(f"test accuracy {100 * right / total:.2f} %")
    torch.save(student.state_dict(), asked.out)


if __name__ == "__main__":
    main()
