"""Reliability diagram: accuracy against confidence."""

from collections.abc import Mapping
from typing import Any

from kd.report.figures.selection import (
    FigureNotApplicable,
    candidates,
    done_runs,
    select,
    setting_looks,
)
from kd.report.figures.style import canvas, handle, labels, legend, listed, sentences
from kd.report.tables import Tables

MAX_PANELS = 6  # settings whose curves a reader can distinguish
MIN_IMAGES = 10  # images that a bin needs to be drawn


def reliability(tables: Tables) -> tuple[Any, str]:
    """Draw accuracy against confidence in 15 bins, for each method's chosen setting.

    Returns:
        (figure, caption).

    Raises:
        FigureNotApplicable: No run has confidence counts, or no bin has enough images.
    """
    done_runs(tables)
    rows = candidates(tables.summary)
    points = {
        name: _bins(tables.reliability[name])
        for name in rows["setting"]
        if name in tables.reliability
    }
    if not points:
        raise FigureNotApplicable("no run has confidence counts")
    filled = [name for name, bins in points.items() if bins]
    if not filled:
        raise FigureNotApplicable(f"no confidence bin has {MIN_IMAGES} or more images")
    selection = select(rows[rows["setting"].isin(filled)], MAX_PANELS)
    settings = list(selection.rows["setting"])
    missing = [name for name in rows["setting"] if name not in filled]
    figure, axes = canvas(4.8, 4.6)
    axis = axes[0][0]
    looks = setting_looks(tables)
    axis.plot([0, 1], [0, 1], color="0.5", ls="--", lw=1)
    names, full_names = labels(settings)
    entries = {"perfect calibration": handle(color="0.5", ls="--", lw=1)}
    for name in settings:
        confidences, accuracies = zip(*points[name], strict=True)
        axis.plot(confidences, accuracies, **looks[name], ms=6, lw=1.5, clip_on=False)
        entries[names[name]] = handle(**looks[name])
    axis.set(xlabel="confidence", ylabel="fraction correct", xlim=(0, 1), ylim=(0, 1))
    axis.set_aspect("equal")
    legend(figure, entries)
    return figure, sentences(
        "Test images of all seeds are pooled; "
        f"bins with fewer than {MIN_IMAGES} images are left out.",
        selection.note,
        f"No confidence counts for: {listed(missing)}." if missing else "",
        full_names,
    )


def _bins(counts: Mapping[str, list[float]]) -> list[tuple[float, float]]:
    """Return (mean confidence, fraction correct) of each bin with enough images."""
    columns = (counts[name] for name in ("images", "confidence", "right"))
    return [
        (confidence / images, right / images)
        for images, confidence, right in zip(*columns, strict=True)
        if images >= MIN_IMAGES
    ]
