"""Render a sweep as one HTML page that needs no network.

The page starts with the verdict, followed by the comparison, the figures and the runs.
"""

import base64
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jinja2
import pandas as pd

from kd.core.io import read_json
from kd.report.columns import COLUMNS
from kd.report.details import Detail
from kd.report.figures import Figure, SkippedFigure
from kd.report.provenance import Fact, duration
from kd.report.published import CAPTION, PublishedComparison
from kd.report.tables import Tables
from kd.report.text_table import TextTable

LARGE_FIGURE = 300_000  # bytes of an SVG above which the page embeds the PNG instead


class Page(NamedTuple):
    """The contents of the page.

    Attributes:
        title: Title of the page.
        folder: Directory of the report, in which the page will be.
        tables: The tables of the report.
        verdict: The headline.
        notes: Warnings about the table.
        comparison: The settings, followed by the teachers.
        figures: The figures in the folder `figures` of the report.
        skipped: The figures that were not drawn.
        files: Names of the tables in `folder`.
        published: The comparison with published figures.
        facts: What was run.
        claims: What the claims of the comparison are about.
        details: More tables, each with a title and an explanation.
    """

    title: str
    folder: Path
    tables: Tables
    verdict: str
    notes: Sequence[str]
    comparison: TextTable
    figures: Sequence[Figure]
    skipped: Sequence[SkippedFigure]
    files: Sequence[str]
    published: PublishedComparison | None = None
    facts: Sequence[Fact] = ()
    claims: str = ""
    details: Sequence[Detail] = ()


def render(page: Page) -> str:
    """Return the page as HTML. All text that users typed is escaped."""
    template = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string(Path(__file__).with_name("template.html").read_text(encoding="utf-8"))
    folder = page.folder.resolve()  # links are relative to it
    runs = page.tables.runs
    states = runs["status"].value_counts()
    return template.render(
        title=page.title,
        created=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        verdict=page.verdict,
        counts=[("runs", len(runs)), *((name, count) for name, count in states.items())],
        notes=page.notes,
        comparison=page.comparison,
        full_names=page.tables.with_short_names(),
        published=page.published,
        caption=CAPTION,
        figures=[_embedded(folder, figure) for figure in page.figures],
        skipped=page.skipped,
        facts=page.facts,
        claims=page.claims,
        details=page.details,
        commands=[text for fact in page.facts if fact.command for text in fact.texts],
        runs=[_run_row(row, folder) for _, row in runs.iterrows()],
        files=page.files,
        columns=COLUMNS.items(),
    )


def _embedded(folder: Path, figure: Figure) -> dict[str, Any]:
    """Return a figure for the template, with its image data in base64."""
    path = folder / "figures" / f"{figure.name}.svg"
    kind = "svg+xml"
    if path.stat().st_size > LARGE_FIGURE:
        path = path.with_suffix(".png")
        kind = "png"
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
    """Return the link from the page's folder to a file; "" if there is no such file."""
    if not os.path.lexists(path):
        return ""
    return quote(Path(os.path.relpath(path, folder)).as_posix())


def _wandb_link(run: Path, folder: Path) -> str:
    """Return the link to a W&B run: on its server or, if offline, to its local directory."""
    record = read_json(run / "wandb.json")
    if not isinstance(record, dict):
        return ""
    url = record.get("url")
    if isinstance(url, str) and url.startswith(("https://", "http://")):
        return url
    offline = record.get("offline")
    return _link(run / offline, folder) if isinstance(offline, str) else ""


def _percent(value: Any) -> str:
    return "" if pd.isna(value) else f"{100 * value:.2f} %"
