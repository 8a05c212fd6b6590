"""Tables of text know their columns by name, wherever these are drawn."""

import re
from pathlib import Path

import pytest
from helpers import config, made

from kd.report import build, figures
from kd.report.tables import Tables
from kd.report.text_table import Column, Row, TextTable

TABLE = TextTable(
    [Column("verdict", "verdict", "sentence"), Column("setting", "", "setting"),
     Column("p", "p, %", "number")],
    [Row({"verdict": "better", "setting": "a_b", "p": "0.01"}),
     Row({"verdict": "", "setting": "c", "p": "12"}, is_emphasized=False)],
)  # fmt: skip


def test_columns_are_left_out_by_name() -> None:
    assert TABLE.texts(without=["verdict"]) == [["", "p, %"], ["a_b", "0.01"], ["c", "12"]]
    assert TABLE.lines(without=["verdict"]) == ["     p, %", "a_b  0.01", "c      12"]


def test_a_row_without_a_cell_is_an_error() -> None:
    with pytest.raises(KeyError):
        TextTable(TABLE.columns, [Row({"verdict": ""})]).texts()


def test_latex_and_markdown_escape() -> None:
    assert r"p, \%" in TABLE.latex()
    assert r"a\_b" in TABLE.latex()
    assert TABLE.markdown().splitlines()[0].split() == [
        "|",
        "verdict",
        "|",
        "setting",
        "|",
        "p,",
        "%",
        "|",
    ]


def test_the_verdict_and_the_kinds_are_found_wherever_the_columns_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [config(method, seed) for method in ("standard", "logits") for seed in (0, 1, 2)]
    made(tmp_path, configs, [0.5, 0.6, 0.7, 0.71, 0.82, 0.9])
    monkeypatch.setattr(figures, "draw", lambda *_: ([], []))
    before = build.write([tmp_path], tmp_path).text
    ordered = build.comparison_table

    def reversed_columns(tables: Tables) -> TextTable:
        table = ordered(tables)
        return table._replace(columns=[*table.columns[:1], *reversed(table.columns[1:])])

    monkeypatch.setattr(build, "comparison_table", reversed_columns)
    report = build.write([tmp_path], tmp_path)
    assert sorted(before.split()) == sorted(report.text.split())
    assert "verdict" not in before.splitlines()[0]
    assert report.page is not None
    page = report.page.read_text()
    heads = re.findall(r'<th class="(\w+)">([^<]*)</th>', page.partition("</thead>")[0])
    assert heads[:2] == [("setting", ""), ("sentence", "verdict")]
    assert ("number", "n") in heads
    (row,) = re.findall(r'<tr class="chosen"><td class="setting">logits.*?</tr>', page, re.DOTALL)
    (sentence,) = re.findall(r'<td class="sentence">([^<]*)', row)
    assert "better" in sentence
