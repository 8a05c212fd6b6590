"""What a run shows on the W&B dashboard: axes, summary, pictures of the test images, tables and notes."""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from kd.data import Data
from kd.training.metrics import confusion

BEST = {
    "val_accuracy": max,
    "val_agreement": max,
    "val_nll": min,
    "val_ece": min,
    "val_teacher_kl": min,
}
COLUMNS = 8  # of the picture of test images
GAP, LINE = 4, 12  # pixels between its cells, and of a line of text
CORRECT, WRONG, INK, PAPER = (0, 110, 0), (200, 0, 0), (60, 60, 60), (255, 255, 255)


def settings() -> dict[str, Any]:
    """Settings with which W&B records the command, and the git commit of the directory in which it was typed.

    By itself W&B looks for the repository around the run's files, and finds no program in a sweep's worker process.
    Links to the latest run are of no use where each run has a directory of its own.
    """
    settings: dict[str, Any] = {"git_root": str(Path.cwd()), "symlink": False}
    if "WANDB_PROGRAM" not in os.environ:
        settings["program"] = "-m kd" if Path(sys.argv[0]).name == "__main__.py" else sys.argv[0]
    return settings


def define_axes(run: Any) -> None:
    """Draw everything that is logged once per epoch against the epoch."""
    run.define_metric("epoch")
    for name in ("train/*", "val/*"):
        run.define_metric(name, step_metric="epoch", step_sync=False)


def best(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summary keys of the best value over all epochs of each validation metric, and the epoch of the best accuracy.

    They are keys of their own: `define_metric(summary="max")` would make a mapping of `val/accuracy`, which neither
    charts nor W&B's sweeps read.
    """
    summary: dict[str, Any] = {}
    for name, choose in BEST.items():
        values = [row[name] for row in rows if name in row and math.isfinite(row[name])]
        if not values:
            continue
        value = summary[f"best/{name.replace('_', '/', 1)}"] = choose(values)
        if name == "val_accuracy":
            summary["best/epoch"] = next(row["epoch"] for row in rows if row.get(name) == value)
    return summary


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """Summary keys of a finished run."""
    named = {name.replace("_", "/", 1): value for name, value in result["metrics"].items()}
    named |= {f"size/{name}": value for name, value in result["size"].items()}
    if result["teacher"]:
        named |= {f"teacher/{name}": value for name, value in result["teacher"]["metrics"].items()}
    return {**named, "train_seconds": result["time"]["train_seconds"], "student": result["student"]}


def notes(own: str | None, folder: Path, sweep: Path | None, verdict: str | None = None) -> str:
    """The user's own notes, then where the files are."""
    files = None if folder == sweep else f"files: {folder}"
    report = f"report: {sweep / 'index.html'}" if sweep else None
    return "\n\n".join(part for part in (own, verdict, files, report) if part)


def confusion_matrix(data: Data, logits: Tensor) -> Any:
    """The confusion matrix of the test images."""
    import wandb

    counts = confusion(logits, data.test.targets, len(data.classes))
    rows: Any = [
        [t, p, counts[i][j]] for i, t in enumerate(data.classes) for j, p in enumerate(data.classes)
    ]
    table = wandb.Table(columns=["Actual", "Predicted", "nPredictions"], data=rows)
    fields = {str(name): str(name) for name in table.columns}
    return wandb.plot_table("wandb/confusion_matrix/v1", table, fields, {"title": "Test images"})


def samples(data: Data, logits: Tensor, count: int) -> Any:
    """At most `count` test images, spread evenly, with the student's predictions: one picture, and so one file."""
    import wandb

    total = len(data.test)
    cells = []
    count = min(count, total)
    for number in (index * total // count for index in range(count)):
        row = int(data.test.index[number])
        label, prediction = (
            data.classes[int(data.test.labels[row])],
            data.classes[int(logits[number].argmax())],
        )
        cells.append((data.test.images[row].cpu().numpy(), label, prediction))
    right = sum(label == prediction for _, label, prediction in cells)
    caption = f"{right} of {len(cells)} right; below each image its class, then the prediction"
    return wandb.Image(_grid(cells), caption=caption)


def _grid(cells: Sequence[tuple[Any, str, str]]) -> Image.Image:
    """A picture of uint8 images [H, W, 3], below each its class and its prediction."""
    size = len(cells[0][0])
    side = 128 if size > 128 else size * max(1, round(64 / size))
    width, height = side + GAP, side + 2 * LINE + GAP
    columns = min(COLUMNS, len(cells))
    grid = Image.new(
        "RGB", (columns * width + GAP, -(-len(cells) // columns) * height + GAP), PAPER
    )
    pen = ImageDraw.Draw(grid)
    resampling = Image.Resampling.LANCZOS if size > 128 else Image.Resampling.NEAREST
    for number, (pixels, label, prediction) in enumerate(cells):
        x, y = GAP + number % columns * width, GAP + number // columns * height
        grid.paste(Image.fromarray(pixels).resize((side, side), resampling), (x, y))
        _write(pen, (x, y + side), label, INK, side)
        _write(
            pen, (x, y + side + LINE), prediction, CORRECT if label == prediction else WRONG, side
        )
    return grid


def _write(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    colour: tuple[int, int, int],
    width: int,
) -> None:
    """A line of text, cut off at `width` pixels."""
    font = ImageFont.load_default()
    text = "".join(c if c.isprintable() else " " for c in text)[:100]
    if not isinstance(font, ImageFont.FreeTypeFont):  # Pillow without FreeType
        text = text.encode("latin-1", "replace").decode("latin-1")
    while text and pen.textlength(text, font) > width:
        text = text[:-1]
    pen.text(corner, text, colour, font)


def table(frame: Any) -> Any:
    """A data frame as a table of W&B."""
    import wandb

    return wandb.Table(dataframe=frame.astype(object).where(frame.notna(), None))


def picture(path: Path) -> Any:
    """An image file as W&B shows it."""
    import wandb

    return wandb.Image(str(path))
