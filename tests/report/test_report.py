"""From files to evidence: what sets runs apart, statistics, figures, the page.

The statistics are compared with those of scipy and statsmodels.
"""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import config, made, tables
from scipy import stats

from kd.report import build, figures
from kd.report import tables as table
from kd.report.verdict import headline

# ---- what sets runs apart


def test_a_setting_names_what_differs_and_nothing_else() -> None:
    def labels(*configs: dict) -> list[str]:
        return table.make_labels(
            [{"config": c, "taught": c["method"]["name"] != "standard"} for c in configs]
        )[0]

    assert labels(config("standard", 0), config("logits", 1), config("feature", 0)) == [
        "standard",
        "logits",
        "feature",
    ]
    assert labels(config("logits", 0), config("logits", 0, method__T=8.0)) == [
        "logits T=4",
        "logits T=8",
    ]
    mixed = [config("standard", 0), config("logits", 0, optimizer__lr=0.2), config("logits", 0)]
    assert labels(*mixed) == [
        "standard optimizer.lr=0.1",
        "logits optimizer.lr=0.2",
        "logits optimizer.lr=0.1",
    ]
    other = [
        config("standard", 0),
        config("standard", 0, optimizer={"name": "adam", "lr": 0.01, "eps": 1e-8}),
    ]
    assert labels(*other) == ["standard optimizer=sgd", "standard optimizer=adam"]
    teachers = [
        config("standard", 0),
        config("standard", 0, teacher__scale=16),
        config("logits", 0, teacher__scale=16),
    ]
    assert labels(*teachers) == ["standard", "standard", "logits"], (
        "standard has no teacher that could differ"
    )
    near = [config("logits", 0, method__T=4.00001), config("logits", 0, method__T=4.00002)]
    assert labels(*near) == ["logits T=4.00001", "logits T=4.00002"], (
        "brief where that is enough, exact where not"
    )


def test_seeds_are_folded_as_scipy_folds_them(tmp_path: Path) -> None:
    values = [0.70, 0.72, 0.71]
    made(
        tmp_path, [config("standard", s) for s in range(3)] + [config("logits", 0)], [*values, 0.75]
    )
    summary = tables(tmp_path).summary.set_index("setting")
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert summary.loc["standard", "test_accuracy_ci95"] == pytest.approx((high - low) / 2)
    assert summary.loc["standard", "test_accuracy_std"] == pytest.approx(np.std(values, ddof=1))
    assert summary.loc["standard", "n"] == 3
    assert math.isnan(summary.loc["logits", "test_accuracy_ci95"]), "an interval from one seed"


def test_every_column_is_explained(tmp_path: Path) -> None:
    made(
        tmp_path,
        [config(m, s) for m in ("standard", "logits") for s in (0, 1)],
        [0.7, 0.71, 0.72, 0.74],
    )
    build.write([tmp_path], tmp_path, figures=False)
    for name in ("runs", "summary", "history"):
        columns = pd.read_csv(tmp_path / f"{name}.csv").columns
        unknown = {c for c in columns if c not in table.COLUMNS and not c.startswith("val_")}
        assert unknown <= {"accuracy", "hard"}, f"{name}.csv: {unknown}"
        typed, text = (
            pd.read_parquet(tmp_path / f"{name}.parquet"),
            pd.read_csv(tmp_path / f"{name}.csv"),
        )
        assert list(typed.columns) == list(text.columns)
        for column in text.dropna(axis=1, how="all").select_dtypes("number"):
            np.testing.assert_allclose(
                typed[column].astype(float), text[column].astype(float), err_msg=column
            )
        if name == "summary":
            assert typed.dtypes[["n", "teacher_params"]].map(str).tolist() == ["Int64", "Int64"]


# ---- statistics


def test_hyperparameters_are_chosen_on_validation_and_only_those_are_claimed(
    tmp_path: Path,
) -> None:
    configs = [config("standard", s) for s in range(3)]
    configs += [config("logits", s, method__T=t) for t in (1.0, 8.0) for s in range(3)]
    test = [0.700, 0.701, 0.702, 0.800, 0.801, 0.803, 0.900, 0.901, 0.903]
    # The better on test is the worse on validation
    val = [0.7] * 3 + [0.9, 0.9, 0.9] + [0.8, 0.8, 0.8]
    made(tmp_path, configs, test, val)
    summary = tables(tmp_path).summary.set_index("setting")
    assert summary["chosen"].to_dict() == {
        "standard": True,
        "logits T=1": True,
        "logits T=8": False,
    }
    assert summary.loc["logits T=1", "verdict"] == (
        "10.03 points better than standard (over 3 seeds, with this teacher, on these test "
        "images, best of 2, chosen on the same seeds)"
    )
    assert summary.loc["logits T=8", "verdict"] == "not chosen on validation"
    paired = stats.ttest_rel(test[3:6], test[:3])
    assert summary.loc["logits T=1", "p"] == pytest.approx(paired.pvalue, abs=1e-6)
    assert math.isnan(summary.loc["logits T=8", "p"])
    assert headline(tables(tmp_path)).startswith(
        "Best of 3 settings on validation: logits T=1, 80.13 ± 0.38 % test accuracy (3 seeds), "
    )


def test_each_student_is_compared_with_its_own_baseline(tmp_path: Path) -> None:
    configs = [
        config(m, s, student__scale=k)
        for k in (4, 8)
        for m in ("standard", "logits")
        for s in (0, 1)
    ]
    made(tmp_path, configs, [0.5, 0.51, 0.6, 0.62, 0.7, 0.71, 0.71, 0.74])
    summary = tables(tmp_path).summary.set_index("setting")
    assert summary.loc["logits student.scale=4", "baseline"] == "standard student.scale=4"
    assert summary.loc["logits student.scale=8", "difference"] == pytest.approx(0.02)
    assert summary["chosen"].all()


def test_words_for_what_cannot_be_told(tmp_path: Path) -> None:
    configs = [
        config("standard", 0),
        config("standard", 1),
        config("logits", 0),
        config("feature", 0, student__epochs=9),
    ]
    configs += [config("feature", 1, student__epochs=9), config("logits", 1)]
    made(tmp_path, configs, [0.70, 0.72, 0.71, 0.74, 0.70, None])
    found = tables(tmp_path)
    summary = found.summary.set_index("method")
    assert summary.loc["logits", "decision"] == summary.loc["feature", "decision"] == "too few"
    assert summary.loc["logits", "verdict"] == (
        "too few seeds to tell: 1.00 points above standard student.epochs=3 (over 1 seed, with "
        "this teacher, on these test images, 1 of 2 runs are not done)"
    )
    assert summary.loc["feature", "verdict"].endswith("with another budget)")
    assert summary["shares_budget"].to_dict() == {
        "standard": True,
        "logits": True,
        "feature": False,
    }
    assert (summary.loc["logits", "n"], summary.loc["logits", "planned"]) == (1, 2)
    said = build.write([tmp_path], tmp_path, figures=False).text
    assert "1 of 2" in said
    assert "note: 1 of 6 runs are not done (1 failed)" in said
    assert "note: the rows have different numbers of seeds" in said
    assert "note: not all rows share one budget" in said
    assert "9 x 1,000" in said


# ---- figures


@pytest.mark.slow
def test_the_figures_follow_the_sweeps_shape(tmp_path: Path) -> None:
    configs = [
        config("logits", s, method__T=t, method__alpha=a, student__scale=k)
        for t in (1.0, 2.0, 8.0)
        for a in (0.1, 0.5)
        for k in (4, 8)
        for s in (0, 1)
    ]
    g = np.random.default_rng(0)
    made(tmp_path, configs, list(0.7 + 0.1 * g.random(len(configs))))
    found = build.write([tmp_path], tmp_path)
    assert set(found.figures) == {
        "accuracy",
        "curves",
        "response-method.T",
        "response-method.alpha",
        "response-student.scale",
        "heat-method.T-method.alpha",
        "heat-method.T-student.scale",
        "heat-method.alpha-student.scale",
        "size",
        "reliability",
    }
    for name in found.figures:
        for ending in ("png", "svg"):
            assert (tmp_path / "figures" / f"{name}.{ending}").stat().st_size > 2000
    assert not list(tmp_path.rglob("*.part*"))


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    made(tmp_path, [config("standard", 0), config("logits", 0)], [0.7, 0.8])
    _, left = figures.draw(tables(tmp_path), tmp_path / "figures")
    assert {one.title: one.reason for one in left} == {
        "Response curves": "no numeric key was swept",
        "Heat maps": "fewer than two numeric keys were swept",
        "Accuracy against size": "all students have the same size",
    }


def test_axes_are_log_where_the_values_are() -> None:
    assert figures.spread([1, 2, 4, 8, 16]) == "log"
    assert figures.spread([0.1, 0.5, 0.9]) == "linear"
    assert figures.spread([1e-4, 1e-3, 1e-2]) == "log"
    assert figures.spread([0, 1, 10, 100]) == "linear"


def test_a_pareto_front_holds_what_nothing_beats() -> None:
    assert figures.pareto([(2, 0.5), (1, 0.4), (3, 0.45), (4, 0.9), (1, 0.3)]) == [
        (1, 0.4),
        (2, 0.5),
        (4, 0.9),
    ]


# ---- the page, and broken directories


def test_the_page_stands_alone_and_escapes_what_was_typed(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script>"
    made(
        tmp_path,
        [config("standard", 0), config("logits", 0, data__name=nasty), config("logits", 1)],
        [0.7, 0.8, None],
    )
    page = build.write([tmp_path], tmp_path).page.read_text()
    assert nasty not in page
    assert "&lt;script&gt;" in page
    assert "it &lt;b&gt;broke&lt;/b&gt;" in page
    assert "http" not in page.replace("http-equiv", "").split("base64,")[0]
    assert page.count('src="data:image/') == page.count("<img")
    assert 'href="runs/r2"' in page
    assert (
        page.index("<h1>")
        < page.index("<h2>Comparison")
        < page.index("<h2>Figures")
        < page.index("<h2>Runs")
    )


@pytest.mark.slow
def test_a_report_can_be_made_of_anything(tmp_path: Path) -> None:
    """Damaged, absent, running and dead runs are rows with a status; nothing is a traceback."""
    jobs = made(tmp_path, [config("standard", s) for s in range(6)], [0.7] * 6)
    folders = [Path(job["folder"]) for job in jobs]
    (folders[1] / "result.json").write_text('{"metrics": {"test_ac')
    (folders[2] / "result.json").unlink()
    (folders[3] / "result.json").unlink()
    host = __import__("platform").node()
    (folders[2] / "status.json").write_text(
        json.dumps({"state": "running", "pid": 2**22 - 1, "host": host})
    )
    (folders[3] / "status.json").write_text(
        json.dumps({"state": "running", "pid": 1, "host": "elsewhere"})
    )
    (folders[4] / "history.csv").write_bytes(b"epoch,accuracy\n1,0.5\n2,\x00\xff")
    __import__("shutil").rmtree(folders[5])
    runs = build.write([tmp_path], tmp_path).tables.runs
    assert runs["status"].tolist() == ["done", "planned", "killed", "running", "done", "planned"]
    assert "is gone" in runs["reason"][2]
    stale = time.time() - 600
    __import__("os").utime(folders[3] / "status.json", (stale, stale))
    assert build.write([tmp_path], tmp_path).tables.runs["status"][3] == "killed", (
        "no heartbeat for ten minutes"
    )


@pytest.mark.slow
def test_several_sweeps_and_repeated_runs_are_counted_once(tmp_path: Path) -> None:
    made(tmp_path / "a", [config("standard", 0), config("standard", 1)], [0.7, 0.72])
    made(tmp_path / "b", [config("logits", 0), config("logits", 1)], [0.8, 0.82])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / table.PLAN).write_text((tmp_path / "a" / table.PLAN).read_text())
    command = [sys.executable, "-m", "kd.report", "a", "b", "c", "--out", "both"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    summary = pd.read_csv(tmp_path / "both" / "summary.csv").set_index("setting")
    assert summary["n"].to_dict() == {"standard": 2, "logits": 2}
    assert "report   both/index.html" in said.stdout
    assert (tmp_path / "both" / "summary.tex").read_text().count(r"\\") == 4


@pytest.mark.parametrize(
    ("words", "line"), [(["nowhere"], "no such directory: nowhere"), (["."], "no run found in .")]
)
def test_a_place_without_runs_is_one_line(words: list, line: str, tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "kd.report", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert (said.returncode, said.stderr) == (2, f"kd: {line}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_results_may_move_and_a_runs_own_files_stay(tmp_path: Path) -> None:
    jobs = made(tmp_path / "here", [config("standard", 0), config("logits", 0)], [0.7, 0.8])
    table.write_plan(tmp_path / "here", jobs)
    (tmp_path / "here").rename(tmp_path / "there")
    assert table.load_tables([tmp_path / "there"]).runs["status"].tolist() == ["done", "done"]
    own = tmp_path / "there" / "runs" / "r0"
    (own / "status.json").write_text("{}")
    (own / "config.yaml").write_text(json.dumps(config("standard", 0)))
    before = {p.name: p.read_bytes() for p in own.iterdir()}
    command = [sys.executable, "-m", "kd.report", str(own)]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    refused = subprocess.run(
        [*command, "--out", str(own)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert {p.name: p.read_bytes() for p in own.iterdir()} == before
    assert (tmp_path / "kd-report" / "index.html").exists()


def test_data_is_told_apart_by_its_content(tmp_path: Path) -> None:
    jobs = [
        {"config": config("standard", 0, data__root=root), "taught": False, "content": content}
        for root, content in (("/a", "x"), ("/b", "x"), ("/c", "y"))
    ]
    assert table.make_labels(jobs[:2])[0] == ["standard", "standard"]
    assert table.make_labels(jobs)[0] == [
        "standard data.root=/a",
        "standard data.root=/a",
        "standard data.root=/c",
    ]


def test_one_setting_of_several_equal_ones_is_chosen(tmp_path: Path) -> None:
    made(tmp_path, [config("logits", 0, method__T=t) for t in (1.0, 2.0)], [0.7, 0.8], [0.9, 0.9])
    assert tables(tmp_path).summary["chosen"].tolist() == [True, False]


def test_a_terminal_is_shown_the_chosen_and_not_everything(tmp_path: Path) -> None:
    configs = [config("logits", 0, method__T=float(t)) for t in range(1, 61)] + [
        config("standard", 0)
    ]
    made(tmp_path, configs, [0.5 + t / 1000 for t in range(61)])
    said = build.write([tmp_path], tmp_path, figures=False).text
    assert "logits T=60" in said
    assert f"... 31 more settings in {tmp_path / 'summary.csv'}" in said
    assert said.count("logits T=") == 29
    assert "teacher cnn-8" in said
    assert len(pd.read_csv(tmp_path / "summary.csv")) == 61


def test_no_method_no_claim(tmp_path: Path) -> None:
    made(
        tmp_path,
        [config("standard", s, student__scale=k) for k in (4, 8) for s in (0, 1)],
        [0.7, 0.71, 0.8, 0.82],
    )
    assert "better" not in headline(tables(tmp_path))


def test_a_finished_baseline_that_was_not_part_of_the_sweep_is_found(tmp_path: Path) -> None:
    import yaml

    jobs = made(tmp_path / "before", [config("standard", 0), config("standard", 1)], [0.7, 0.72])
    for job in jobs:
        (Path(job["folder"]) / "config.yaml").write_text(yaml.safe_dump(job["config"]))
    after = made(tmp_path / "after", [config("logits", 0), config("logits", 1)], [0.75, 0.76])
    plan = [one | {"baseline": before["folder"]} for one, before in zip(after, jobs, strict=True)]
    (tmp_path / "after" / table.PLAN).write_text(json.dumps(plan))
    summary = tables(tmp_path / "after").summary.set_index("setting")
    assert summary.loc["logits", "seeds"] == 2
    assert summary.loc["logits", "baseline"] == "standard"
