"""The comparison of settings as a table of text."""

from collections.abc import Callable
from typing import Any

import pandas as pd

from kd.report.tables import Tables
from kd.report.text_table import Column, Row, TextTable


def _formatter(scale: float, spec: str) -> Callable[[Any], str]:
    return lambda value: "" if pd.isna(value) else format(scale * value, spec)


SUMMARY_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "val_accuracy": ("val, %", _formatter(100, ".2f")),
    "test_nll": ("NLL", _formatter(1, ".3f")),
    "test_ece": ("ECE", _formatter(1, ".3f")),
    "test_agreement": ("agreement, %", _formatter(100, ".1f")),
    "params": ("params", _formatter(1, ",.0f")),
    "budget": ("budget", str),
}


def comparison_table(tables: Tables) -> TextTable:
    """Return the summary as text, followed by the teachers; an empty table if no run is done."""
    table = tables.summary
    if table.empty:
        return TextTable()
    shown = {
        name: column
        for name, column in SUMMARY_COLUMNS.items()
        if name in table and table[name].notna().any()
    }
    for name in ("params", "budget"):  # shown only if they differ
        if table[name].nunique() < 2:
            shown.pop(name, None)
    columns = [
        Column("setting", "", "setting"),
        Column("n", "n", "number"),
        Column("test_accuracy", "test, %", "number"),
        *(Column(name, title, "number") for name, (title, _) in shown.items()),
        Column("difference", "vs standard", "number"),
        Column("p_holm", "p (Holm)", "number"),
        Column("verdict", "verdict", "sentence"),
    ]
    rows = []
    for _, row in table.iterrows():
        n = str(row["n"]) if row["n"] == row["planned"] else f"{row['n']} of {row['planned']}"
        cells = {
            "setting": row["setting"],
            "n": n,
            "test_accuracy": format_interval(row["test_accuracy"], row["test_accuracy_ci95"]),
            **{name: formatter(row[name]) for name, (_, formatter) in shown.items()},
            "difference": format_interval(row["difference"], row["difference_ci95"], "+.2f"),
            "p_holm": _format_p(row["p_holm"]),
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


def teachers(table: pd.DataFrame) -> list[tuple[str, float, float]]:
    """Return (name, test accuracy, parameters) of each teacher in a summary."""
    taught = table.dropna(subset=["teacher_test_accuracy"])
    columns = taught[["teacher", "teacher_test_accuracy", "teacher_params"]]
    distinct = columns.round(6).drop_duplicates()
    return list(distinct.itertuples(index=False, name=None))


def format_interval(value: float, half_width: float, spec: str = ".2f") -> str:
    """Format a fraction and the half-width of its confidence interval in percent."""
    if pd.isna(value):
        return ""
    interval = "" if pd.isna(half_width) else f" ± {100 * half_width:.2f}"
    return format(100 * value, spec) + interval


def _format_p(value: float) -> str:
    if pd.isna(value):
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
