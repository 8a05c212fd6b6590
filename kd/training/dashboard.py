"""Content of a run on the W&B dashboard: axes, summary, example images, tables and notes."""

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
    "val_brier": min,
    "val_ece": min,
    "val_teacher_kl": min,
}
COLUMNS = 8  # of the grid of test images
GAP, LINE = 4, 12  # pixels between the cells of the grid; height of a line of text in pixels
CORRECT, WRONG, INK, PAPER = (0, 110, 0), (200, 0, 0), (60, 60, 60), (255, 255, 255)


def settings() -> dict[str, Any]:
    """Return W&B settings that record the command and the commit of the working directory.

    By default W&B searches for the repository around the run's files, and finds no program in a
    sweep's worker process. Symbolic links to the latest run are turned off, because each run has a
    directory of its own.
    """
    options: dict[str, Any] = {"git_root": str(Path.cwd()), "symlink": False}
    if "WANDB_PROGRAM" not in os.environ:
        options["program"] = "-m kd" if Path(sys.argv[0]).name == "__main__.py" else sys.argv[0]
    return options


def define_axes(run: Any) -> None:
    """Plot everything that is logged once per epoch against the epoch."""
    run.define_metric("epoch")
    for name in ("train/*", "val/*"):
        run.define_metric(name, step_metric="epoch", step_sync=False)


def best(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return summary keys for the best value of each validation metric and the best epoch.

    The best epoch is the first with the best accuracy. These are separate keys, because
    `define_metric(summary="max")` would turn `val/accuracy` into a mapping, which neither charts
    nor W&B sweeps can read.
    """
    summary: dict[str, Any] = {}
    for name, choose in BEST.items():
        values = [row[name] for row in rows if name in row and math.isfinite(row[name])]
        if not values:
            continue
        value = choose(values)
        summary[f"best/{name.replace('_', '/', 1)}"] = value
        if name == "val_accuracy":
            summary["best/epoch"] = next(row["epoch"] for row in rows if row.get(name) == value)
    return summary


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summary keys of a finished run, given the content of its `result.json`."""
    named = {name.replace("_", "/", 1): value for name, value in result["metrics"].items()}
    named |= {f"size/{name}": value for name, value in result["size"].items()}
    if result["teacher"]:
        named |= {f"teacher/{name}": value for name, value in result["teacher"]["metrics"].items()}
    return {**named, "train_seconds": result["time"]["train_seconds"], "student": result["student"]}


def notes(own: str | None, folder: Path, sweep: Path | None, verdict: str | None = None) -> str:
    """Return a run's notes: the user's own, the verdict, and the paths of the files and the report.

    Args:
        own: The user's notes.
        folder: Directory of the run's files.
        sweep: Directory of the sweep; None for a single run.
        verdict: The sweep's conclusion in words.
    """
    files = None if folder == sweep else f"files: {folder}"
    report = f"report: {sweep / 'index.html'}" if sweep else None
    return "\n\n".join(part for part in (own, verdict, files, report) if part)


def confusion_matrix(data: Data, logits: Tensor) -> Any:
    """Return a chart of the confusion matrix of the test images from their logits [n, classes]."""
    import wandb

    counts = confusion(logits, data.test.targets, len(data.classes))
    rows: Any = []
    for i, actual in enumerate(data.classes):
        for j, predicted in enumerate(data.classes):
            rows.append([actual, predicted, counts[i][j]])
    table = wandb.Table(columns=["Actual", "Predicted", "nPredictions"], data=rows)
    fields = {str(name): str(name) for name in table.columns}
    return wandb.plot_table("wandb/confusion_matrix/v1", table, fields, {"title": "Test images"})


def samples(data: Data, logits: Tensor, count: int) -> Any:
    """Return a picture of evenly spaced test images with the student's predictions.

    All images form one picture, so that they are uploaded as one file.

    Args:
        data: The data set.
        logits: The student's logits of the test images, [n, classes].
        count: Maximum number of images.
    """
    import wandb

    total = len(data.test)
    cells = []
    count = min(count, total)
    for number in (index * total // count for index in range(count)):
        row = int(data.test.index[number])
        label = data.classes[int(data.test.labels[row])]
        prediction = data.classes[int(logits[number].argmax())]
        cells.append((data.test.images[row].cpu().numpy(), label, prediction))
    right = sum(label == prediction for _, label, prediction in cells)
    caption = f"{right} of {len(cells)} right; below each image: its class, then the prediction"
    return wandb.Image(_grid(cells), caption=caption)


def _grid(cells: Sequence[tuple[Any, str, str]]) -> Image.Image:
    """Draw a grid of uint8 images [H, W, 3], each with its class and its prediction below."""
    size = len(cells[0][0])
    side = 128 if size > 128 else size * max(1, round(64 / size))
    cell_width = side + GAP
    cell_height = side + 2 * LINE + GAP
    columns = min(COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    grid = Image.new("RGB", (columns * cell_width + GAP, rows * cell_height + GAP), PAPER)
    pen = ImageDraw.Draw(grid)
    resampling = Image.Resampling.LANCZOS if size > 128 else Image.Resampling.NEAREST
    for number, (pixels, label, prediction) in enumerate(cells):
        x = GAP + number % columns * cell_width
        y = GAP + number // columns * cell_height
        grid.paste(Image.fromarray(pixels).resize((side, side), resampling), (x, y))
        _write(pen, (x, y + side), label, INK, side)
        colour = CORRECT if label == prediction else WRONG
        _write(pen, (x, y + side + LINE), prediction, colour, side)
    return grid


def _write(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    colour: tuple[int, int, int],
    width: int,
) -> None:
    """Draw a line of text, truncated to `width` pixels."""
    font = ImageFont.load_default()
    text = "".join(c if c.isprintable() else " " for c in text)[:100]
    if not isinstance(font, ImageFont.FreeTypeFont):  # Pillow without FreeType
        text = text.encode("latin-1", "replace").decode("latin-1")
    while text and pen.textlength(text, font) > width:
        text = text[:-1]
    pen.text(corner, text, colour, font)


def table(frame: Any) -> Any:
    """Convert a data frame to a W&B table, with missing values as None."""
    import wandb

    return wandb.Table(dataframe=frame.astype(object).where(frame.notna(), None))


def picture(path: Path) -> Any:
    """Convert an image file to a W&B image."""
    import wandb

    return wandb.Image(str(path))
