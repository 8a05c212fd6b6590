"""Figures of a sweep, drawn from its tables.

The keys that a sweep varies determine which figures are drawn; the report lists the others.
"""

from kd.report.figures.calibration import reliability
from kd.report.figures.differences import differences
from kd.report.figures.drawing import Figure, SkippedFigure, draw, numeric
from kd.report.figures.epochs import curves
from kd.report.figures.grids import heat
from kd.report.figures.intervals import accuracy
from kd.report.figures.searches import search
from kd.report.figures.selection import FigureNotApplicable
from kd.report.figures.sizes import pareto, size
from kd.report.figures.style import canvas, looks, short, style
from kd.report.figures.sweeps import response, spread

__all__ = [
    "Figure",
    "FigureNotApplicable",
    "SkippedFigure",
    "accuracy",
    "canvas",
    "curves",
    "differences",
    "draw",
    "heat",
    "looks",
    "numeric",
    "pareto",
    "reliability",
    "response",
    "search",
    "short",
    "size",
    "spread",
    "style",
]
