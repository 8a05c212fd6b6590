"""Format the numbers and comparisons of the study for its page."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from benchmarks.study_figures import gains
from kd.report.stats import LEVEL, PairedDifference, holm
from kd.report.tables import Tables, half_width

Lines = list[str]


def percent(values: pd.Series) -> str:
    """Return the mean and 95 % interval of accuracies, in %."""
    half = half_width(values)
    return f"{100 * values.mean():.2f}" + ("" if math.isnan(half) else f" ± {100 * half:.2f}")


def points(found: PairedDifference) -> str:
    return f"{100 * found.difference:+.2f}" + (
        "" if math.isnan(found.ci95) else f" ± {100 * found.ci95:.2f}"
    )


def chance(p: float) -> str:
    return "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def told(found: PairedDifference, p: float) -> str:
    """Return a comparison as the end of a sentence."""
    n = f"n = {found.pairs}"
    if math.isnan(p):
        return f"{points(found)} points in {n}: too few to tell"
    said = f"p {chance(p)}" if p < 0.001 else f"p = {chance(p)}"
    if p >= LEVEL:
        return f"{points(found)} points, not distinguishable ({said}, {n})"
    return f"{points(found)} points, {'better' if found.difference > 0 else 'worse'} ({said}, {n})"


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"


def place(environment: dict[str, Any]) -> str:
    threads = f"{environment['threads']} threads of {environment['processor']}"
    return f"{threads}, {environment['precision']}"


def grid(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Lines:
    """Return a Markdown table with all columns but the first aligned to the right."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def tested(
    tables: Tables, key: str
) -> list[tuple[float, pd.Series, pd.Series, PairedDifference, float]]:
    """Return the `gains`, each with its p-value after Holm's correction over all of them."""
    found = list(gains(tables.runs, key))
    corrected = holm(pd.Series([one.p for *_, one in found]))
    return [(*row, float(p)) for row, p in zip(found, corrected, strict=True)]


def compared(tables: Tables) -> dict[str, tuple[PairedDifference, float]]:
    """Return {method: (comparison with `standard`, p after Holm's correction)} of the summary."""
    rows = tables.summary[tables.summary["method"] != "standard"]
    return {
        row["method"]: (
            PairedDifference(row["pairs"], row["difference"], row["difference_ci95"], row["p"]),
            row["p_holm"],
        )
        for _, row in rows.iterrows()
    }
