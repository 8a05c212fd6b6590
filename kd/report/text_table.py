"""Tables of text, whose columns are named: for the terminal, Markdown, LaTeX and the page."""

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import pandas as pd


class Column(NamedTuple):
    """A column: its name, its heading, and what it holds, which decides how it is drawn."""

    name: str
    title: str
    kind: Literal["setting", "text", "number", "sentence"] = "text"


class Row(NamedTuple):
    """A row: its text by the name of the column, and whether it is emphasized."""

    cells: dict[str, str]
    is_emphasized: bool = True


class TextTable(NamedTuple):
    """Columns and rows of text."""

    columns: Sequence[Column] = ()
    rows: Sequence[Row] = ()

    def texts(self, without: Collection[str] = ()) -> list[list[str]]:
        """Return the headings, then the rows, except for the columns named in `without`."""
        columns = [column for column in self.columns if column.name not in without]
        rows = [[row.cells[column.name] for column in columns] for row in self.rows]
        return [[column.title for column in columns], *rows]

    def lines(self, without: Collection[str] = ()) -> list[str]:
        """Return the table as aligned lines, the first column to the left, others to the right."""
        rows = self.texts(without)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in rows
        ]

    def markdown(self) -> str:
        """Return the table in Markdown."""
        return f"{self._frame().to_markdown(index=False, disable_numparse=True)}\n"

    def latex(self) -> str:
        """Return the table in LaTeX, with its text escaped."""
        frame = self._frame().rename(columns=lambda name: name.replace("%", r"\%"))
        return str(frame.style.format(escape="latex").hide(axis="index").to_latex(hrules=True))

    def _frame(self) -> pd.DataFrame:
        head, *rows = self.texts()
        return pd.DataFrame(rows, columns=[title or "setting" for title in head])
