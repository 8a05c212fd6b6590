"""A sweep as one HTML page that needs no network: the verdict first, then table, figures and runs."""

import base64
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import pandas as pd

from kd.core.io import read_json
from kd.report.figures import Figure, SkippedFigure
from kd.report.provenance import Fact, duration
from kd.report.published import CAPTION, PublishedComparison
from kd.report.tables import COLUMNS, Tables

LARGE_FIGURE = 300_000  # bytes of SVG above which the page holds the PNG


def render(
    title: str,
    folder: Path,
    tables: Tables,
    verdict: str,
    notes: Sequence[str],
    comparison: Sequence[Sequence[str]],
    figures: Sequence[Figure],
    left: Sequence[SkippedFigure],
    files: Sequence[str],
    compared: PublishedComparison | None = None,
    about: Sequence[Fact] = (),
) -> str:
    """The page. Everything that a user typed is escaped.

    **Arguments:** `comparison`: a head and a row for each row of the summary, as text; `files`: beside the page;
    `compared`: with published figures; `about`: what was run.
    """
    template = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string(Path(__file__).with_name("template.html").read_text(encoding="utf-8"))
    folder = folder.resolve()  # the links lead from there
    states = tables.runs["status"].value_counts()
    facts = [("runs", len(tables.runs)), *((name, count) for name, count in states.items())]
    chosen = list(tables.summary["chosen"]) if len(tables.summary) else []
    rows = [
        {"cells": cells, "kind": "chosen" if is_chosen else "other"}
        for cells, is_chosen in zip(
            comparison[1:], [*chosen, *[True] * len(comparison)], strict=False
        )
    ]
    return template.render(
        title=title,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        verdict=verdict,
        facts=facts,
        notes=notes,
        summary={"head": comparison[0] if comparison else [], "rows": rows},
        full=tables.with_short_names(),
        compared=compared,
        caption=CAPTION,
        figures=[_embedded(folder, figure) for figure in figures],
        left=left,
        about=about,
        typed=[text for fact in about if fact.command for text in fact.texts],
        runs=[_run_row(row, folder) for _, row in tables.runs.iterrows()],
        files=files,
        columns=COLUMNS.items(),
    )


def _embedded(folder: Path, figure: Figure) -> dict[str, Any]:
    path, kind = folder / "figures" / f"{figure.name}.svg", "svg+xml"
    if path.stat().st_size > LARGE_FIGURE:
        path, kind = path.with_suffix(".png"), "png"
    data = base64.b64encode(path.read_bytes()).decode()
    return {
        "title": figure.title,
        "caption": figure.caption,
        "kind": kind,
        "data": data,
        "wide": figure.shape > 2.2,
    }


def _run_row(row: pd.Series, folder: Path) -> dict[str, Any]:
    path = Path(str(row["folder"]))
    links = [(name, _link(path / name, folder)) for name in ("config.yaml", "kd.log")]
    links.append(("W&B", _wandb_link(path, folder)))
    seconds = row.get("train_seconds")
    return {
        "setting": row["setting"],
        "seed": "" if pd.isna(row["seed"]) else row["seed"],
        "status": row["status"],
        "reason": row["reason"],
        "test": _percent(row.get("test_accuracy")),
        "val": _percent(row.get("val_accuracy")),
        "time": "" if pd.isna(seconds) else duration(seconds),
        "name": path.name,
        "link": _link(path, folder),
        "links": [(name, link) for name, link in links if link],
    }


def _link(path: Path, folder: Path) -> str:
    """The way to a file from the page's folder; nothing where there is no such file."""
    if not os.path.lexists(path):
        return ""
    return quote(Path(os.path.relpath(path, folder)).as_posix())


def _wandb_link(run: Path, folder: Path) -> str:
    """Where a run's W&B run is to be seen: on its server or, offline, in the run's directory."""
    known = read_json(run / "wandb.json")
    if not isinstance(known, dict):
        return ""
    if isinstance(url := known.get("url"), str) and url.startswith(("https://", "http://")):
        return url
    return _link(run / known["offline"], folder) if isinstance(known.get("offline"), str) else ""


def _percent(value: Any) -> str:
    return "" if pd.isna(value) else f"{100 * value:.2f} %"
