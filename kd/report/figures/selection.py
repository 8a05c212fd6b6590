"""Select the settings that a figure shows: by validation accuracy, never by test accuracy."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from kd.report.figures.style import listed, looks, short, short_value
from kd.report.summary import finished_runs
from kd.report.tables import Tables

NO_VALIDATION = (
    "There are no validation images: this is test accuracy, "
    "which must not be used to choose a setting."
)


class FigureNotApplicable(Exception):  # noqa: N818
    """A figure does not apply to this sweep; the message gives the reason."""


class Selection(NamedTuple):
    """The rows that a figure shows, and the caption's sentence about omitted rows."""

    rows: pd.DataFrame
    note: str


def done_runs(tables: Tables) -> pd.DataFrame:
    """Return the finished runs.

    Raises:
        FigureNotApplicable: No run has finished.
    """
    if tables.summary.empty:
        raise FigureNotApplicable("no run has finished")
    return finished_runs(tables.runs)


def validated(table: pd.DataFrame) -> bool:
    """Return whether all rows have a validation accuracy."""
    return "val_accuracy" in table and bool(table["val_accuracy"].notna().all())


def panels(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Return (column, title) of each panel: validation accuracy, if there is any, before test."""
    shown = [("test_accuracy", "test accuracy, %")]
    if "val_accuracy" in table and table["val_accuracy"].notna().any():
        shown.insert(0, ("val_accuracy", "validation accuracy, %"))
    return shown


def method_names(tables: Tables) -> list[str]:
    """Return all methods in a fixed order, so that a method has the same look in all figures."""
    return list(dict.fromkeys(tables.runs["method"].dropna()))


def method_looks(tables: Tables) -> dict[str, dict[str, Any]]:
    """Return {method: its colour, marker and dash}."""
    return looks(method_names(tables))


def setting_looks(tables: Tables) -> dict[str, dict[str, Any]]:
    """Return the look of each of the `candidates`.

    The first setting of a method has the method's look; each further setting has one of its own.
    """
    names = method_names(tables)
    shown = candidates(tables.summary)
    repeated = shown["method"].duplicated()
    all_looks = looks([*names, *shown["setting"][repeated]])
    owners = shown["method"].where(~repeated, shown["setting"])
    return {
        setting: all_looks[owner] for setting, owner in zip(shown["setting"], owners, strict=True)
    }


def contexts(table: pd.DataFrame) -> "pd.Series[Any]":
    """Return the student and data set of each row, as one text."""
    return table["context"] if "context" in table else pd.Series("", index=table.index)


def candidates(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows chosen on validation, for each method, student and data set.

    Where none was chosen, all rows of the group are returned.
    """
    chosen = table.groupby([contexts(table), table["method"]])["chosen"].transform("any")
    return table[table["chosen"] | ~chosen]


def ranked(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows ordered by validation accuracy, the chosen settings before the others.

    With several students or data sets, the best row of each precedes the second-best row of any.
    Without validation images, the order of the table is kept.
    """
    if not validated(table):
        return table
    rank = table.groupby([contexts(table), table["chosen"]])["val_accuracy"].rank(
        ascending=False, method="first"
    )
    sortable = table.assign(_other=~table["chosen"], _rank=rank, _value=-table["val_accuracy"])
    return sortable.sort_values(["_other", "_rank", "_value"], kind="stable")[list(table.columns)]


def select(table: pd.DataFrame, most: int) -> Selection:
    """Return the first `most` of the ranked rows."""
    rows = ranked(table)
    return Selection(rows.head(most), omission_note(rows, most, validated(table)))


def omission_note(rows: pd.DataFrame, most: int, by_validation: bool) -> str:
    """Return the caption's sentences about the rows after the first `most`, or "" without any."""
    if len(rows) <= most:
        return ""
    noun = "settings" if rows["method"].duplicated().any() else "methods"
    missing = [
        name
        for name in dict.fromkeys(rows["method"])
        if name not in set(rows["method"].iloc[:most])
    ]
    names = ""
    if missing:
        label = "Methods without a setting shown" if noun == "settings" else "Left out"
        names = f" {label}: {listed(missing)}."
    return f"{most} of {len(rows)} {noun}: {_omission_reason(rows, most, by_validation)}{names}"


def _omission_reason(rows: pd.DataFrame, most: int, by_validation: bool) -> str:
    if not by_validation:
        return "the first in the sweep, because there are no validation images to choose by."
    per_context = " for each student and data set" if contexts(rows).nunique() > 1 else ""
    chosen = ", the chosen ones first" if rows["chosen"].any() and not rows["chosen"].all() else ""
    around_cut = rows["val_accuracy"].iloc[most - 1 : most + 1]
    tied = " Ties are broken by the order of the sweep." if around_cut.nunique() == 1 else ""
    return f"those best on validation{per_context}{chosen}.{tied}"


def best_methods(table: pd.DataFrame, names: Sequence[str], most: int) -> tuple[list[str], str]:
    """Select the methods whose best row has the highest validation accuracy.

    Args:
        table: Rows of the summary.
        names: The methods to select from.
        most: The largest number of methods to select.

    Returns:
        (methods, the caption's sentence about the other methods or "").
    """
    rows = table[table["method"].isin(names)]
    if validated(rows):
        rows = rows.sort_values("val_accuracy", ascending=False, kind="stable")
    best = rows.drop_duplicates("method")
    note = omission_note(best.assign(chosen=True), most, validated(rows))
    return list(best["method"].head(most)), note


# ---- values of the keys that a figure does not show


def fix_other_settings(
    summary: pd.DataFrame, swept: Sequence[str], free: Sequence[str]
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Select the rows in which all swept keys but the free ones have their method's fixed values.

    The fixed values are those of the method's best setting on validation, or of its first setting
    if there are no validation images.

    Args:
        summary: A row for each setting.
        swept: The swept keys.
        free: The keys whose values are not fixed.

    Returns:
        (rows, {method: the values that were fixed, as text}).
    """
    others = [key for key in swept if key not in free and key in summary]
    selected = []
    fixed: dict[str, str] = {}
    for method, rows in summary.groupby("method", sort=False):
        best = ranked(rows.assign(chosen=True)).iloc[0]
        matches = pd.Series(True, index=rows.index)
        for key in others:
            matches &= rows[key].isna() if pd.isna(best[key]) else rows[key] == best[key]
        selected.append(rows[matches])
        varied = [key for key in others if not pd.isna(best[key]) and rows[key].nunique() > 1]
        if varied:
            source = "best on validation" if validated(rows) else "first in the sweep"
            values = ", ".join(
                f"{short(key).removesuffix('.name')} = {short_value(best[key])}" for key in varied
            )
            fixed[str(method)] = f"{values} ({source})"
    return pd.concat(selected), fixed


def fixed_settings_note(fixed: Mapping[str, str], methods: Sequence[str]) -> str:
    """Return the caption's sentence about the fixed values of these methods, or ""."""
    values = [f"{method}: {fixed[method]}" for method in methods if method in fixed]
    return f"Fixed for {'; '.join(values)}." if values else ""


def how_to_read(shown: Sequence[tuple[str, str]]) -> str:
    """Return the caption's sentences about the panels that a figure has."""
    if len(shown) == 1:
        return NO_VALIDATION
    return (
        "Left: validation accuracy, used to choose settings. Right: test accuracy of the same runs."
    )
