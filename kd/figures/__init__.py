"""Figures of a sweep, from its tables alone. The sweep's shape decides which are drawn; the report names the others."""

from kd.figures.calibration import reliability
from kd.figures.drawing import Figure, Left, draw, numeric
from kd.figures.epochs import curves
from kd.figures.grids import heat
from kd.figures.intervals import accuracy
from kd.figures.searches import search
from kd.figures.selection import Unfit
from kd.figures.sizes import pareto, size
from kd.figures.style import canvas, looks, short, style
from kd.figures.sweeps import response, spread

__all__ = [
    "Figure",
    "Left",
    "Unfit",
    "accuracy",
    "canvas",
    "curves",
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
