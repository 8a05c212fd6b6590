"""Intervals of settings over seeds, and what figures show of unstable settings instead.

A setting is unstable if a seed diverged or collapsed. It has no interval, it is drawn at its median
over seeds, and it does not set the range of an axis.
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from kd.report.figures.limits import NO_INTERVAL, Ends
from kd.report.figures.style import listed
from kd.report.summary import bounded, half_width


def unstable_seeds(row: "Mapping[str, Any] | pd.Series[Any]") -> int:
    """Return how many seeds of a setting diverged or collapsed."""
    count = row.get("unstable")
    return 0 if count is None or pd.isna(count) else int(count)


def unstable(table: pd.DataFrame) -> "pd.Series[bool]":
    """Return for each row of a summary whether its setting is unstable."""
    if "unstable" not in table:
        return pd.Series(False, index=table.index)
    return pd.to_numeric(table["unstable"]).fillna(0) > 0


def for_range(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that set the range of an axis: the stable ones, or all if there are none."""
    bad = unstable(table)
    return table if bad.all() else table[~bad]


def count_label(row: "pd.Series[Any]", count: str = "n") -> str:
    """Return the number of seeds of a setting for its label, or how many of them are unstable."""
    if bad := unstable_seeds(row):
        return f"unstable: {bad} of {row['planned']}"
    return f"n = {row[count]}"


def with_medians(table: pd.DataFrame, done: pd.DataFrame) -> pd.DataFrame:
    """Return rows of a summary with medians over seeds as the accuracies of unstable settings."""
    bad = unstable(table)
    if not bad.any():
        return table
    table = table.copy()
    for column in ("val_accuracy", "test_accuracy"):
        if column in table and column in done:
            medians = done.groupby("setting")[column].median()
            table.loc[bad, column] = table.loc[bad, "setting"].map(medians)
    return table


def intervals(table: pd.DataFrame, done: pd.DataFrame, column: str) -> dict[str, Ends]:
    """Return {setting: the ends of the 95 % interval of its mean, in percent}.

    Args:
        table: Rows of the summary.
        done: The finished runs.
        column: `test_accuracy` or `val_accuracy`.
    """
    ends = dict.fromkeys(table["setting"], NO_INTERVAL)
    stable = table[~unstable(table)]
    if column == "test_accuracy":
        for _, row in stable.iterrows():
            low, high = row["test_accuracy_low"], row["test_accuracy_high"]
            ends[row["setting"]] = (100 * float(low), 100 * float(high))
    elif column in done:
        for setting, runs in done[done["setting"].isin(stable["setting"])].groupby("setting"):
            low, high = bounded(float(runs[column].mean()), half_width(runs[column]))
            ends[str(setting)] = (100 * low, 100 * high)
    return ends


def unstable_note(table: pd.DataFrame, mark: str, scale: str = "axis") -> str:
    """Return the caption's sentence about unstable settings, or "" without any.

    Args:
        table: The rows that are drawn.
        mark: How the figure marks them.
        scale: What they do not set the range of.
    """
    names = table["setting"][unstable(table)]
    if names.empty:
        return ""
    return (
        f"Unstable settings ({mark}): {listed(names)}; "
        f"median over seeds, no interval; they do not set the range of the {scale}."
    )
