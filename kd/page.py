"""A sweep as one HTML page that needs no network: the verdict first, then table, figures and runs."""

import base64
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from kd.figures import Figure, Left
from kd.published import CAPTION, Beside
from kd.table import COLUMNS, Tables

LARGE = 300_000  # bytes of SVG above which the page holds the PNG


def render(
    title: str, folder: Path, tables: Tables, verdict: str, notes: Sequence[str], comparison: Sequence[Sequence[str]],
    figures: Sequence[Figure], left: Sequence[Left], files: Sequence[str], compared: Beside | None = None,
) -> str:  # fmt: skip
    """The page. Everything that a user typed is escaped.

    **Arguments:** `comparison`: a head and a row for each row of the summary, as text; `files`: beside the page;
    `compared`: with published figures.
    """
    template = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined).from_string(
        Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    )
    states = tables.runs["status"].value_counts()
    facts = [("runs", len(tables.runs)), *((name, count) for name, count in states.items())]
    chosen = list(tables.summary["chosen"]) if len(tables.summary) else []
    rows = [
        {"cells": cells, "kind": "chosen" if is_chosen else "other"}
        for cells, is_chosen in zip(comparison[1:], [*chosen, *[True] * len(comparison)], strict=False)
    ]
    return template.render(
        title=title,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        verdict=verdict,
        facts=facts,
        notes=notes,
        summary={"head": comparison[0] if comparison else [], "rows": rows},
        compared=compared,
        caption=CAPTION,
        figures=[_embedded(folder, figure) for figure in figures],
        left=left,
        runs=[_run(row, folder) for _, row in tables.runs.iterrows()],
        files=files,
        columns=COLUMNS.items(),
    )


def _embedded(folder: Path, figure: Figure) -> dict[str, Any]:
    path, kind = folder / "figures" / f"{figure.name}.svg", "svg+xml"
    if path.stat().st_size > LARGE:
        path, kind = path.with_suffix(".png"), "png"
    data = base64.b64encode(path.read_bytes()).decode()
    return {"title": figure.title, "caption": figure.caption, "kind": kind, "data": data,
            "wide": figure.shape > 2.2}  # fmt: skip


def _run(row: pd.Series, folder: Path) -> dict[str, Any]:
    path = Path(str(row["folder"]))
    return {
        "setting": row["setting"], "seed": "" if pd.isna(row["seed"]) else row["seed"],
        "status": row["status"], "reason": row["reason"],
        "test": _percent(row.get("test_accuracy")), "val": _percent(row.get("val_accuracy")),
        "name": path.name, "link": Path(os.path.relpath(path, folder)).as_posix(),
    }  # fmt: skip


def _percent(value: Any) -> str:
    return "" if pd.isna(value) else f"{100 * value:.2f} %"
