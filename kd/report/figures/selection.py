"""Which settings a figure shows: those that validation prefers, never those that test does."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from kd.report.figures.style import listed, looks, short, short_value
from kd.report.tables import Tables, finished_runs, half_width

NO_VALIDATION = (
    "There are no validation images: this is test accuracy, on which nothing may be chosen."
)


class FigureNotApplicable(Exception):  # noqa: N818
    """This sweep does not call for the figure; the text says why."""


class Selection(NamedTuple):
    """The rows that a figure shows, and the caption's sentence about those that it leaves out."""

    rows: pd.DataFrame
    note: str


def done_runs(tables: Tables) -> pd.DataFrame:
    """The finished runs. **Raises:** Unfit without any."""
    if tables.summary.empty:
        raise FigureNotApplicable("no run is done")
    return finished_runs(tables.runs)


def validated(table: pd.DataFrame) -> bool:
    """Whether all rows can be compared on validation images."""
    return "val_accuracy" in table and bool(table["val_accuracy"].notna().all())


def panels(table: pd.DataFrame) -> list[tuple[str, str]]:
    """(column, title) of each panel of accuracies: validation first, test beside it."""
    shown = [("test_accuracy", "test accuracy, %")]
    if "val_accuracy" in table and table["val_accuracy"].notna().any():
        shown.insert(0, ("val_accuracy", "validation accuracy, %"))
    return shown


def half_widths(done: pd.DataFrame, column: str) -> dict[str, float]:
    """Half the 95 % interval of each setting's mean, in percent."""
    if column not in done:
        return {}
    return {
        str(setting): 100 * half_width(rows[column]) for setting, rows in done.groupby("setting")
    }


def method_names(tables: Tables) -> list[str]:
    """All methods, in one order for all figures, so that each has one look in all of them."""
    return list(dict.fromkeys(tables.runs["method"].dropna()))


def method_looks(tables: Tables) -> dict[str, dict[str, Any]]:
    return looks(method_names(tables))


def setting_looks(tables: Tables) -> dict[str, dict[str, Any]]:
    """The look of each of the `candidates`: its method's, or where a method has several, a further one for each."""
    names = method_names(tables)
    shown = candidates(tables.summary)
    repeated = shown["method"].duplicated()
    all_looks = looks([*names, *shown["setting"][repeated]])
    owners = shown["method"].where(~repeated, shown["setting"])
    return {
        setting: all_looks[owner] for setting, owner in zip(shown["setting"], owners, strict=True)
    }


def contexts(table: pd.DataFrame) -> "pd.Series[Any]":
    """The student and data of each row."""
    return table["context"] if "context" in table else pd.Series("", index=table.index)


def candidates(table: pd.DataFrame) -> pd.DataFrame:
    """Of each method, student and data the setting that validation chose, or all where it chose none."""
    chosen = table.groupby([contexts(table), table["method"]])["chosen"].transform("any")
    return table[table["chosen"] | ~chosen]


def ranked(table: pd.DataFrame) -> pd.DataFrame:
    """The chosen settings first, each part best on validation first; of several students or data sets the best of
    each comes before the second of any. Without validation images: the order of the table."""
    if not validated(table):
        return table
    rank = table.groupby([contexts(table), table["chosen"]])["val_accuracy"].rank(
        ascending=False, method="first"
    )
    keyed = table.assign(_other=~table["chosen"], _rank=rank, _value=-table["val_accuracy"])
    return keyed.sort_values(["_other", "_rank", "_value"], kind="stable")[list(table.columns)]


def select(table: pd.DataFrame, most: int) -> Selection:
    """The first `most` of the ranked rows."""
    rows = ranked(table)
    return Selection(rows.head(most), omission_note(rows, most, validated(table)))


def omission_note(rows: pd.DataFrame, most: int, by_validation: bool) -> str:
    """The caption's sentences about the rows after the first `most`, or nothing where there are none."""
    if len(rows) <= most:
        return ""
    noun = "settings" if rows["method"].duplicated().any() else "methods"
    missing = [
        name
        for name in dict.fromkeys(rows["method"])
        if name not in set(rows["method"].iloc[:most])
    ]
    names = (
        f" No setting of: {listed(missing)}."
        if noun == "settings"
        else f" Left out: {listed(missing)}."
    )
    return f"{most} of {len(rows)} {noun}: {_omission_reason(rows, most, by_validation)}{names if missing else ''}"


def _omission_reason(rows: pd.DataFrame, most: int, by_validation: bool) -> str:
    if not by_validation:
        return "the first of the sweep, as there are no validation images to choose on."
    several = " of each student and data set" if contexts(rows).nunique() > 1 else ""
    chosen = ", the chosen ones first" if rows["chosen"].any() and not rows["chosen"].all() else ""
    last = rows["val_accuracy"].iloc[most - 1 : most + 1]
    tied = " Ties are in the order of the sweep." if last.nunique() == 1 else ""
    return f"those best on validation{several}{chosen}.{tied}"


def best_methods(table: pd.DataFrame, names: Sequence[str], most: int) -> tuple[list[str], str]:
    """Of these methods the `most` whose best row is best on validation, and the caption's sentence about the rest."""
    rows = table[table["method"].isin(names)]
    if validated(rows):
        rows = rows.sort_values("val_accuracy", ascending=False, kind="stable")
    best = rows.drop_duplicates("method")
    return list(best["method"].head(most)), omission_note(
        best.assign(chosen=True), most, validated(rows)
    )


# ---- what is held, in words


def fix_other_settings(
    summary: pd.DataFrame, swept: Sequence[str], free: Sequence[str]
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Keep the rows in which every swept key but the free ones has the value that it has in its method's best setting
    by validation, or without validation images in its first.

    **Returns:** (rows, {method: the values that hold in words}).
    """
    others = [key for key in swept if key not in free and key in summary]
    parts, words = [], {}
    for method, rows in summary.groupby("method", sort=False):
        best = ranked(rows.assign(chosen=True)).iloc[0]
        fits = pd.Series(True, index=rows.index)
        for key in others:
            fits &= rows[key].isna() if pd.isna(best[key]) else rows[key] == best[key]
        parts.append(rows[fits])
        varied = [key for key in others if not pd.isna(best[key]) and rows[key].nunique() > 1]
        if varied:
            where = "best on validation" if validated(rows) else "first of the sweep"
            values = ", ".join(
                f"{short(key).removesuffix('.name')} = {short_value(best[key])}" for key in varied
            )
            words[str(method)] = f"{values} ({where})"
    return pd.concat(parts), words


def fixed_settings_note(fixed: Mapping[str, str], methods: Sequence[str]) -> str:
    words = [f"{method}: {fixed[method]}" for method in methods if method in fixed]
    return f"Held at {'; '.join(words)}." if words else ""


def how_to_read(shown: Sequence[tuple[str, str]]) -> str:
    if len(shown) == 1:
        return NO_VALIDATION
    return "Left: validation accuracy, by which to choose. Right: test accuracy of the same runs."
