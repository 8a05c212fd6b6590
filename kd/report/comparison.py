"""The comparison of settings as a table of text."""

import math
from collections.abc import Callable
from typing import Any

import pandas as pd

from kd.report.tables import Tables
from kd.report.text_table import Column, Row, TextTable


def _formatter(scale: float, spec: str) -> Callable[[pd.Series, str], str]:
    def text(row: pd.Series, name: str) -> str:
        half = row.get(f"{name}_ci95", math.nan)
        return _with_interval(scale * row[name], scale * half, spec)

    return text


SUMMARY_COLUMNS: dict[str, tuple[str, Callable[[pd.Series, str], str]]] = {
    "val_accuracy": ("val, %", _formatter(100, ".2f")),
    "test_nll": ("NLL", _formatter(1, ".3f")),
    "params": ("params", _formatter(1, ",.0f")),
    "budget": ("budget", lambda row, name: str(row[name])),
}
PROBABILITY_COLUMNS: dict[str, tuple[str, Callable[[pd.Series, str], str]]] = {
    "test_nll": ("NLL", _formatter(1, ".3f")),
    "test_brier": ("Brier", _formatter(1, ".3f")),
    "test_ece": ("ECE", _formatter(1, ".3f")),
    "test_ece_floor": ("ECE floor", _formatter(1, ".3f")),
    "test_agreement": ("agreement, %", _formatter(100, ".1f")),
    "test_teacher_kl": ("KL from teacher", _formatter(1, ".3f")),
}


def comparison_table(tables: Tables) -> TextTable:
    """Return the summary as text, followed by the teachers; an empty table if no run is done."""
    table = tables.summary
    if table.empty:
        return TextTable()
    shown = _present(table, SUMMARY_COLUMNS)
    for name in ("params", "budget"):  # shown only if they differ
        if table[name].nunique() < 2:
            shown.pop(name, None)
    columns = [
        Column("setting", "", "setting"),
        Column("n", "n", "number"),
        Column("test_accuracy", "test, %", "number"),
        *(Column(name, title, "number") for name, (title, _) in shown.items()),
        Column("difference", "vs standard", "number"),
        Column("p", "p", "number"),
        Column("verdict", "verdict", "sentence"),
    ]
    rows = []
    for _, row in table.iterrows():
        n = str(row["n"]) if row["n"] == row["planned"] else f"{row['n']} of {row['planned']}"
        if not pd.isna(row.get("teachers", math.nan)):
            n += f" ({row['teachers']:.0f} teachers)"
        cells = {
            "setting": row["setting"],
            "n": n,
            "test_accuracy": format_accuracy(row),
            **{name: formatter(row, name) for name, (_, formatter) in shown.items()},
            "difference": format_interval(row["difference"], row["difference_ci95"], "+.2f"),
            "p": format_p(row["p"]),
            "verdict": row["verdict"],
        }
        rows.append(Row(cells, bool(row["chosen"])))
    for teacher, accuracy, params in teachers(table):
        cells = dict.fromkeys((column.name for column in columns), "")
        cells |= {"setting": f"teacher {teacher}", "test_accuracy": f"{100 * accuracy:.2f}"}
        if "params" in cells:
            cells["params"] = f"{params:,.0f}"
        rows.append(Row(cells))
    return TextTable(columns, rows)


def probability_table(tables: Tables) -> TextTable:
    """Return calibration of the chosen settings, and their agreement with the teacher, as text."""
    table = tables.summary[tables.summary["chosen"]]
    shown = _present(table, PROBABILITY_COLUMNS)
    columns = [
        Column("setting", "", "setting"),
        *(Column(name, title, "number") for name, (title, _) in shown.items()),
    ]
    rows = []
    for _, row in table.iterrows():
        cells = {name: formatter(row, name) for name, (_, formatter) in shown.items()}
        rows.append(Row({"setting": row["setting"], **cells}))
    return TextTable(columns, rows)


def _present(
    table: pd.DataFrame, columns: dict[str, tuple[str, Callable[[pd.Series, str], str]]]
) -> dict[str, tuple[str, Callable[[pd.Series, str], str]]]:
    """Return the columns that have a value in some row."""
    return {
        name: column
        for name, column in columns.items()
        if name in table and table[name].notna().any()
    }


def teachers(table: pd.DataFrame) -> list[tuple[str, float, float]]:
    """Return (name, test accuracy, parameters) of each teacher in a summary."""
    taught = table.dropna(subset=["teacher_test_accuracy"])
    columns = taught[["teacher", "teacher_test_accuracy", "teacher_params"]]
    distinct = columns.round(6).drop_duplicates()
    return list(distinct.itertuples(index=False, name=None))


def format_interval(value: float, half_width: float, spec: str = ".2f") -> str:
    """Format a fraction and the half-width of its confidence interval in percent."""
    return _with_interval(100 * value, 100 * half_width, spec)


def _with_interval(value: float, half_width: float, spec: str) -> str:
    """Format a number and the half-width of its interval, which is never shown as 0."""
    if pd.isna(value):
        return ""
    digits = spec.lstrip("+,")
    if pd.isna(half_width) or not digits.endswith("f"):
        return format(value, spec)
    smallest = float(format(0.0, digits)[:-1] + "1") if digits != ".0f" else 1.0
    shown = format(half_width, digits)
    if float(shown) == 0:
        shown = f"< {smallest:{digits}}"
    return f"{format(value, spec)} ± {shown}"


def format_accuracy(row: "pd.Series[Any]") -> str:
    """Format the test accuracy of a row of the summary in percent, with its interval.

    The ends of an interval near 0 or 100 % are written out, because they are not equally far from
    the mean. An unstable setting has a median and no interval.
    """
    if row.get("unstable", 0):
        return f"{100 * row['test_accuracy_median']:.2f} (median)"
    mean, half = 100 * row["test_accuracy"], 100 * row["test_accuracy_ci95"]
    low, high = 100 * row["test_accuracy_low"], 100 * row["test_accuracy_high"]
    asymmetry = max(abs(mean - half - low), abs(mean + half - high))
    is_inside = mean - half >= 0 and mean + half <= 100
    if pd.isna(half) or (is_inside and asymmetry < 0.1 * half + 0.005):
        return _with_interval(mean, half, ".2f")
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def format_p(value: float) -> str:
    """Format a p-value, with three decimals."""
    if pd.isna(value):
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
