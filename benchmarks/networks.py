"""Networks and settings of both training loops: CNNs of scale 16 (student) and 32 (teacher).

Images have the size of CIFAR's.
"""

import os
from pathlib import Path
from typing import Any

from kd import models
from kd.data.augment import Augment

MEAN, STD, BATCH = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616], 128
STUDENT_FLOPS, TEACHER_FLOPS = 43.5e6, 53.2e6  # per image: of a training step; of a forward pass
AUGMENT = Augment(crop_padding=4, padding_mode="zeros", flip=True)
CACHE = Path(os.environ.get("KD_CACHE", "~/.cache/kd")).expanduser()


def network(scale: int) -> Any:
    config = models.find("cnn", "model").Config(
        name="cnn", scale=scale, activation="relu", dropout=0.2
    )
    return models.build(config, 10, 32)
