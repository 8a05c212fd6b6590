"""Format the numbers and comparisons of the study for its page."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from benchmarks.study_claims import GRAIN
from kd.report.comparison import format_p
from kd.report.inference import MARGIN, MAX_SEEDS, Estimate, seeds_needed
from kd.report.summary import half_width

Lines = list[str]


def percent(values: pd.Series) -> str:
    """Return the mean and 95 % interval of accuracies, in %."""
    half = half_width(values, GRAIN)
    return f"{100 * values.mean():.2f}" + ("" if math.isnan(half) else f" ± {100 * half:.2f}")


def points(found: Estimate) -> str:
    return f"{100 * found.difference:+.2f}" + (
        "" if math.isnan(found.half_width) else f" ± {100 * found.half_width:.2f}"
    )


def told(found: Estimate, settings: int = 1) -> str:
    """Return a comparison of one of `settings` settings as the end of a sentence."""
    decision, n = found.decide(), f"n = {found.seeds}"
    if decision == "too few":
        return f"{points(found)} points in {n}: too few to tell"
    p = f"p {format_p(found.p)}" if found.p < 0.001 else f"p = {format_p(found.p)}"
    if decision == "equal":
        return f"{points(found)} points, equal within ± {100 * MARGIN:g} ({n})"
    if decision == "undecided":
        return f"{points(found)} points, undecided ({p}, {n}{missing(found, settings)})"
    return f"{points(found)} points, {decision} ({p}, {n})"


def missing(found: Estimate, settings: int) -> str:
    """Return how many more seeds would decide."""
    if math.isnan(found.error):
        return ""
    needed = seeds_needed(found, settings)
    more = needed - found.seeds
    about = "more than" if needed >= MAX_SEEDS else "about"
    return f"; {about} {more} more seed{'s' if more > 1 else ''} would decide"


def decision(found: Estimate, settings: int = 1) -> str:
    """Return the decision as a cell of a table."""
    name = found.decide()
    if name == "equal":
        return f"equal within ± {100 * MARGIN:g}"
    return f"undecided{missing(found, settings)}" if name == "undecided" else name


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"


def place(environment: dict[str, Any]) -> str:
    threads = f"{environment['threads']} threads of {environment['processor']}"
    return f"{threads}, {environment['precision']}"


def grid(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Lines:
    """Return a Markdown table with all columns but the first aligned to the right."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]
