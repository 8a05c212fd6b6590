"""Reliability: confidence against accuracy."""

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

MAX_PANELS = 6  # settings whose curves can be told apart
MIN_IMAGES = 10  # images that a bin needs


def reliability(tables: Tables) -> tuple[Any, str]:
    """Draw confidence against accuracy in 15 bins, for each method's chosen setting."""
    done_runs(tables)
    rows = candidates(tables.summary)
    points = {
        name: _bins(tables.reliability[name])
        for name in rows["setting"]
        if name in tables.reliability
    }
    if not points:
        raise FigureNotApplicable("the runs hold no counts of confidence")
    filled = [name for name, bins in points.items() if bins]
    if not filled:
        raise FigureNotApplicable(f"no bin holds {MIN_IMAGES} images")
    selection = select(rows[rows["setting"].isin(filled)], MAX_PANELS)
    settings = list(selection.rows["setting"])
    missing = [name for name in rows["setting"] if name not in filled]
    figure, axes = canvas(4.8, 4.6)
    axis, looks = axes[0][0], setting_looks(tables)
    axis.plot([0, 1], [0, 1], color="0.5", ls="--", lw=1)
    names, in_full = labels(settings)
    entries = {"calibrated": handle(color="0.5", ls="--", lw=1)}
    for name in settings:
        x, y = zip(*points[name], strict=True)
        axis.plot(x, y, **looks[name], ms=6, lw=1.5, clip_on=False)
        entries[names[name]] = handle(**looks[name])
    axis.set(xlabel="confidence", ylabel="fraction that is right", xlim=(0, 1), ylim=(0, 1))
    axis.set_aspect("equal")
    legend(figure, entries)
    return figure, sentences(
        f"Test images of all seeds together; bins with fewer than {MIN_IMAGES} images are left out.",
        selection.note,
        f"Without counts of confidence: {listed(missing)}." if missing else "",
        in_full,
    )


def _bins(counts: Mapping[str, list[float]]) -> list[tuple[float, float]]:
    """(Mean confidence, fraction that is right) of each bin with enough images."""
    columns = (counts[name] for name in ("images", "confidence", "right"))
    return [
        (sure / images, right / images)
        for images, sure, right in zip(*columns, strict=True)
        if images >= MIN_IMAGES
    ]
