"""Classify one image with a student that kd has trained.

python examples/load_student.py RUN IMAGE      # RUN: such as runs/standard-cnn-4-s0-0123456789ab
"""

import sys

import numpy as np
import torch
from PIL import Image

import kd


def main(run: str, path: str) -> None:
    # In eval mode; it knows its classes, its image size and its normalization
    student = kd.load(run)
    image = Image.open(path).convert("RGB").resize((student.metadata["size"],) * 2)
    pixels = torch.from_numpy(np.array(image))[None]  # uint8 [1, height, width, 3]
    with torch.inference_mode():
        probabilities = student(student.preprocess(pixels)).softmax(dim=1)[0]
    best = int(probabilities.argmax())
    print(f"{student.classes[best]}  {100 * float(probabilities[best]):.1f} %")


if __name__ == "__main__":
    main(*sys.argv[1:])
