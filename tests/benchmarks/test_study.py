"""docs/study.md: its runner keeps what a page needs, and its page says what the tables say."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks import study, study_claims, study_figures, study_page
from kd.core.io import write_json
from kd.report.inference import compare
from kd.report.tables import MISALIGNED

ROOT = Path(__file__).parents[2]
SIZES = {4: 70_000, 8: 270_000, 16: 1_070_000, 32: 4_271_338}


def row(
    method: str,
    seed: int,
    accuracy: float,
    setting: str | None = None,
    scale: int = 16,
    **also: Any,
) -> dict:
    epochs = also.get("student.epochs", 15)
    taught = method not in ("standard", "label_smoothing")
    teacher = {
        "teacher": "cnn-32",
        "teacher_params": SIZES[32],
        "teacher_macs": 10**8,
        "teacher_test_accuracy": 0.85,
    }
    return {
        "setting": setting or method, "method": method, "student": f"cnn-{scale}", "seed": seed,
        "status": "done", "epochs": epochs, "samples": 45_000, "batch_size": 128,
        "data": "imagefolder", "budget": f"{epochs} x 45,000", "test_accuracy": accuracy,
        "test_nll": 0.5, "test_ece": 0.02, "val_accuracy": accuracy, "params": SIZES[scale],
        "macs": 20 * SIZES[scale], "method_params": 0, "train_seconds": 100.0,
        "images_per_second": 4000.0, **(teacher if taught else dict.fromkeys(teacher)),
        "test_agreement": 0.9 if taught else None, **also,
    }  # fmt: skip


def kept(folder: Path, part: str, rows: list[dict], swept: list[str]) -> pd.DataFrame:
    """A part's tables, as the runner keeps them."""
    runs = pd.DataFrame(rows).assign(sweep=0)
    (folder / part).mkdir()
    runs.to_csv(folder / part / "runs.csv", index=False)
    study.write_summary(part, study.summary_of(part, runs, swept), folder)
    history = [
        {
            "setting": r["setting"],
            "method": r["method"],
            "seed": r["seed"],
            "epoch": e,
            "hard": 2 / e,
            "accuracy": 0.5,
            "val_accuracy": r["test_accuracy"] - 0.1 / e,
            "val_nll": 1 / e,
        }
        for r in rows
        for e in (1, 2, 3)
    ]
    pd.DataFrame(history).to_csv(folder / part / "history.csv", index=False)
    latency = {f"cnn-{scale}": {"1": 0.1 * scale, "128": 1.5 * scale} for scale in SIZES}
    environment = {"threads": 2, "processor": "a processor", "precision": "bfloat16"}
    words = ["method=standard", "data.root=PATH"]
    sweep = {"words": words, "seconds": 600, "swept": swept, "environment": environment}
    content = {"sweeps": {"0": sweep}, "of": 1, "latency": latency}
    write_json(folder / part / "part.json", content)
    return runs


@pytest.fixture
def made(tmp_path: Path) -> dict[str, pd.DataFrame]:
    """All parts; logits gain about a point over standard, feature none, whatever else is swept."""
    draw = np.random.default_rng(0).normal
    gain = {
        "standard": 0.0,
        "logits": 0.01,
        "feature": 0.0003,
        "label_smoothing": 0.004,
        "logits" + MISALIGNED: -0.1,
    }

    def rows(names: list[str], seeds: int, **also: Any) -> list[dict]:
        base = [0.8 + draw(0, 0.003) for _ in range(seeds)]
        return [
            row(n, s, base[s] + gain[n] + draw(0, 0.001), **also)
            for n in names
            for s in range(seeds)
        ]

    found = {
        "original": kept(
            tmp_path,
            "original",
            rows(["standard", "logits", "feature", "logits" + MISALIGNED], 3),
            [],
        )
    }
    tried = [row("standard", 0, 0.8)]
    for T in (1.0, 4.0):
        for alpha in (0.1, 0.5):
            accuracy = 0.81 + 0.001 * T - 0.002 * alpha
            keys = {"method.T": T, "method.alpha": alpha}
            tried.append(row("logits", 0, accuracy, f"logits T={T:g} alpha={alpha}", **keys))
    tried += [
        row("feature", 0, 0.8 + b / 100, f"feature beta={b}", **{"method.beta": b})
        for b in (0.1, 0.3)
    ]
    for s in (0.1, 0.2):
        setting = f"label_smoothing smoothing={s}"
        tried.append(row("label_smoothing", 0, 0.8 - s / 100, setting, **{"method.smoothing": s}))
    keys = ["method.T", "method.alpha", "method.beta", "method.smoothing"]
    found["choice"] = kept(tmp_path, "choice", tried, keys)
    found["fair"] = kept(
        tmp_path, "fair", rows(["standard", "logits", "feature", "label_smoothing"], 5), []
    )
    fair = json.loads((tmp_path / "fair" / "part.json").read_text())
    fair["sweeps"]["0"]["words"] = ["+experiment=fair", "method=logits", "method.T=4"]
    write_json(tmp_path / "fair" / "part.json", fair)
    for part, values in (
        ("labels", (0.01, 0.1, 1.0)),
        ("budget", (5, 15, 45)),
        ("student", tuple(SIZES)),
    ):
        key = study_claims.SWEPT[part][0]
        some = []
        for value in values:
            more = {"scale": value} if part == "student" else {}
            some += rows(["standard", "logits"], 3, **{key: value}, **more)
        for one in some:
            one["setting"] += f" {key}={one[key]}"
        found[part] = kept(tmp_path, part, some, [key])
    some = rows(["standard"], 3)
    for value in (16, 32, 64):
        own = {
            "teacher.scale": value,
            "teacher": f"cnn-{value}",
            "teacher_test_accuracy": 0.8 + value / 1000,
        }
        some += [one | {"setting": f"logits {value}"} for one in rows(["logits"], 3, **own)]
    found["teacher"] = kept(tmp_path, "teacher", some, ["teacher.scale"])
    return found


@pytest.mark.slow
def test_the_page_says_what_the_tables_say(made: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    """Every comparison is that of the report's procedure; what is undecided is not claimed."""
    study_page.publish(tmp_path)
    text = (tmp_path / "study.md").read_text()
    assert "Not run yet" not in text
    assert text.index("**Use `logits`**") < text.index("## ")
    assert "`feature`: " in text
    assert "    python -m kd method=logits method.T=4\n" in text
    fair = made["fair"].pivot(index="seed", columns="method", values="test_accuracy")
    found = compare(fair, "standard", {}, 1e-4, 0.05 * 3 / 4).estimates  # a fourth is made below
    for one in found.values():
        shown = f"{100 * one.difference:+.2f} ± {100 * one.half_width:.2f}"
        assert f"{shown} points, {one.decide()} " in text.replace("equal within ± 0.5", "equal")
    assert found["logits"].decide() == "better"
    assert found["feature"].decide() in ("undecided", "equal")
    difference = (fair["logits"] - fair["label_smoothing"]).mean()
    said = re.search(r"`logits` against `label_smoothing`.*: (\S+) ± (\S+) points", text)
    assert said.group(1) == f"{100 * difference:+.2f}"
    error = found["logits"].error
    assert float(said.group(2)) == pytest.approx(
        100 * error * stats.t.ppf(1 - 0.05 / 8, 12), abs=0.006
    )
    for part, (key, _) in study_claims.SWEPT.items():
        runs = made[part]
        for value in sorted(runs[runs["method"] == "logits"][key].unique()):
            taught = runs[(runs["method"] == "logits") & (runs[key] == value)].set_index("seed")[
                "test_accuracy"
            ]
            plain = runs[runs["method"] == "standard"]
            plain = plain if part == "teacher" else plain[plain[key] == value]
            mean = 100 * (taught - plain.set_index("seed")["test_accuracy"]).mean()
            assert re.search(
                rf"\| {value:g} \| (\d\d\.\d\d \| )?3 \| .* \| \{mean:+.2f} ± ", text
            ), (part, value)
            assert re.search(
                rf"^- \[.*\{mean:+.2f} ± [\d.]+(\*\*)? at {value:g}[,.]", text, re.M
            ), (part, value)
    for title, link in re.findall(r"^- \[(.*)\]\(#(.*)\) \(", text, re.M):
        assert f"\n## {title}\n" in text
        assert link == title.lower().replace(" ", "-")
    tried = pd.concat([made["fair"], made["budget"], made["teacher"]]).fillna({"teacher": "nobody"})
    tried = tried.drop_duplicates(["method", "epochs", "teacher", "seed"])
    for within, mark in ((15, 79.73), (45, 82.44)):
        groups = tried[tried["epochs"] <= within].groupby(["method", "epochs", "teacher"])
        (method, epochs, teacher), best = max(
            groups, key=lambda pair: pair[1]["val_accuracy"].mean()
        )
        best = 100 * best["test_accuracy"]
        said = re.search(
            rf"- within {within} epochs: (\S+) ± \S+ % \((.*)\), (\d) of (\d) seeds above {mark} %",
            text,
        )
        who = f"`{method}` taught by {teacher}, {epochs} epochs"
        assert said.groups() == (
            f"{best.mean():.2f}",
            who,
            str((best > mark).sum()),
            str(len(best)),
        )
    assert f"| teacher cnn-32 | {SIZES[32]:,} | " in text  # the summary has it to six digits
    taught = made["teacher"].pivot(index="seed", columns="teacher.scale", values="test_accuracy")
    said = re.search(r"The largest teacher against the smallest: (\S+) ± .* \(.*n = 3", text)
    assert said.group(1) == f"{100 * (taught[64] - taught[16]).mean():+.2f}"
    assert [f"| {scale} | {80 + scale / 10:.2f} | 3 |" in text for scale in (16, 32, 64)] == [
        True
    ] * 3
    figures = {path.stem for path in tmp_path.glob("*.png")}
    assert figures == set(re.findall(r"\]\(study/(\w+)\.png\)", text))
    assert {"accuracy_comparison", "distillation_comparison", "bug", "pareto"} <= figures
    for path in tmp_path.glob("*.png"):
        assert path.stat().st_size < 300_000


def test_a_study_that_finds_nothing_says_so(tmp_path: Path) -> None:
    rows = [
        row(name, seed, 0.8 + 0.001 * ((seed * 7 + i) % 5))
        for i, name in enumerate(["standard", "logits"])
        for seed in range(5)
    ]
    kept(tmp_path, "fair", rows, [])
    text = study_page.page(study_page.gathered(tmp_path), {})
    assert "**No method is better than plain training at this budget.**" in text
    assert "**Use" not in text
    assert "Not run yet: `original`" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gain", "title", "said"),
    [
        (0.01, None, None),
        (0.0, "Not needed", "equal within ± 0.5"),
        (-0.02, "Not", "worse"),
    ],
)
def test_the_verdict_on_long_training_is_the_tables(
    gain: float, title: str | None, said: str | None, tmp_path: Path
) -> None:
    """What holds for short training is not said of long training.

    This is so where long training was measured and the gain is gone.
    """
    noise = [0.001 * ((seed * 7) % 5 - 2) for seed in range(5)]
    gains = {5: 0.02, 15: 0.01, 45: gain}
    rows = {
        epochs: [
            row(name, seed, 0.8 + of * i + noise[(seed + 2 * i) % 5], **{"student.epochs": epochs})
            for i, name in enumerate(["standard", "logits"])
            for seed in range(5)
        ]
        for epochs, of in gains.items()
    }
    kept(tmp_path, "fair", rows[15], [])
    kept(tmp_path, "budget", [one for some in rows.values() for one in some], ["student.epochs"])
    text = study_page.page(study_page.gathered(tmp_path), {})
    assert "**Use `logits`**" in text
    found = re.findall(
        r"\*\*(.*) for long training\*\*: with 45 epochs `logits` against `standard` is (.*)\.\n",
        text,
    )
    assert [one for one, _ in found] == ([title] if title else [])
    if said is not None:
        assert re.fullmatch(
            rf"\{100 * gain:+.2f} ± [\d.]+ points, {said} \((p (=|<) [\d.]+, )?n = 5\)", found[0][1]
        )


def test_the_original_protocol_is_as_its_text_gives_it(composed: Callable) -> None:
    words = study.original(Path())
    methods = []
    for experiment, *more, seeds in words:
        config = composed(experiment, *more, small=False)
        methods.append(config.method.name)
        assert (config.optimizer.name, config.optimizer.lr, config.batch_size) == (
            "adam",
            1e-3,
            128,
        )
        assert config.student.epochs == (10 if config.method.name == "feature" else 15)
        assert config.teacher.epochs == 25
        said = {
            key: getattr(config.method, key, value)
            for key, value in {"T": 3, "alpha": 0.5, "beta": 0.4}.items()
        }
        assert said == {"T": 3, "alpha": 0.5, "beta": 0.4}
        assert (config.misaligned, seeds) == ("misaligned" in " ".join(more), study.FEW)
    assert methods == ["standard", "logits", "feature", "logits"]


@pytest.mark.slow
def test_settings_come_from_validation(made: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    assert study.chosen(tmp_path, "logits") == ["method.T=4", "method.alpha=0.1"]
    assert study.chosen(tmp_path, "feature") == ["method.beta=0.3"]
    assert ["+experiment=fair", "method=label_smoothing", "method.smoothing=0.1"] in study.fair(
        tmp_path
    )
    assert ["+experiment=fair", "method=standard"] in study.fair(tmp_path)


@pytest.mark.slow
def test_a_part_is_run_and_kept_without_a_trace_of_the_machine(tmp_path: Path) -> None:
    words = (
        "original data=digits student.epochs=1 teacher.epochs=1 student.scale=1 teacher.scale=2 "
        "device=cpu"
    )
    command = [
        sys.executable,
        "-m",
        "benchmarks.study",
        *words.split(),
        "--place",
        "runs_here",
        "--kept",
        "kept",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run() -> str:
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    part = tmp_path / "kept" / "original"
    assert "is kept" not in run()
    first = (part / "runs.csv").read_text()
    said = json.loads((part / "part.json").read_text())
    write_json(
        part / "part.json", said | {"sweeps": {n: x for n, x in said["sweeps"].items() if n != "1"}}
    )
    assert study.load("original", tmp_path / "kept") is None, "not the whole part"
    *others, last = first.splitlines(keepends=True)
    (part / "runs.csv").write_text("".join([*others, last.replace(",done,", ",failed,")]))
    again = run()
    assert again.count("is kept") == 2
    assert again.count("python -m kd -m") == 2
    assert (part / "runs.csv").read_text() == first
    assert run().count("is kept") == 4
    tables, said = study.load("original", tmp_path / "kept")
    assert sorted(tables.summary["method"]) == [
        "feature",
        "logits",
        "logits" + MISALIGNED,
        "standard",
    ]
    assert (tables.summary["n"] == 3).all()
    assert len(tables.runs) == len(tables.history) == 12, (
        "a baseline that another sweep ran is no run of this one"
    )
    for path in (tmp_path / "kept").rglob("*"):
        assert path.is_dir() or str(tmp_path) not in path.read_text()
    assert said["seconds"] > 0
    assert set(study.latency(["cnn-1", "cnn-2", "cnn-1", "resnet20"], passes=1)) == {
        "cnn-1",
        "cnn-2",
    }


@pytest.mark.slow
@pytest.mark.skipif(not study_page.gathered(), reason="no part of the study is kept yet")
def test_the_page_is_written_from_what_is_kept(tmp_path: Path) -> None:
    """Change a number in the page, or in a table, and this fails."""
    parts = study_page.gathered()
    drawn = study_figures.draw(parts, tmp_path)
    assert study_page.page(parts, drawn) == study_page.PAGE.read_text()
    for name in drawn:
        assert (study_page.HERE / f"{name}.png").exists()
    for part, (tables, _) in parts.items():
        (tmp_path / part).mkdir()
        study.write_summary(part, tables.summary, tmp_path)
        kept_table = (study_page.HERE / part / "summary.csv").read_text()
        assert (tmp_path / part / "summary.csv").read_text() == kept_table


@pytest.mark.parametrize("part", study.PARTS)
def test_what_is_kept_is_what_the_study_asks_for(part: str) -> None:
    """The page's numbers are those of the commands that it gives and benchmarks.study runs."""
    asked = [
        [*words, "data=imagefolder", "data.root=PATH"] for words in study.PARTS[part](study.HERE)
    ]
    assert [study.whole(part, number, words, study.HERE) for number, words in enumerate(asked)] == [
        True
    ] * len(asked)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("nothing", "there is no part nothing; allowed: original, choice"),
        ("fair", "the part choice comes first"),
    ],
)
def test_a_part_that_cannot_be_run(part: str, line: str, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.study",
        part,
        "--kept",
        str(tmp_path),
        "--place",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert line in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("logits", "wrong", "title"),
    [
        (0.81, 0.70, "Logits distillation does not hurt; a bug did."),
        (0.77, 0.70, "Logits distillation hurts in this protocol; a bug made it look far worse."),
        (0.81, 0.81, "The bug does not explain the published collapse."),
    ],
)
def test_the_verdict_on_the_bug_is_the_tables(
    logits: float, wrong: float, title: str, tmp_path: Path
) -> None:
    means = {"standard": 0.80, "logits": logits, "feature": 0.80, "logits" + MISALIGNED: wrong}
    rows = [
        row(name, seed, mean + 0.001 * ((3 * seed + n) % 4))
        for n, (name, mean) in enumerate(means.items())
        for seed in range(3)
    ]
    kept(tmp_path, "original", rows, [])
    text = study_page.page(study_page.gathered(tmp_path), {})
    assert f"**{title}**" in text
    assert text.count("**") == 2


@pytest.mark.slow
def test_the_notebook_reads_what_is_kept(made: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    """On what is kept in the repository, and on a whole study.

    The whole study is there so that every cell has something to read.
    """
    import nbclient
    import nbformat

    places = [ROOT / "examples"] if study_page.gathered() else []
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "study").symlink_to(tmp_path)
    for place in [*places, tmp_path]:
        notebook = nbformat.read(ROOT / "examples" / "study.ipynb", as_version=4)
        assert not any(cell.get("outputs") for cell in notebook.cells)
        nbclient.NotebookClient(
            notebook, timeout=600, resources={"metadata": {"path": place}}
        ).execute()
        said = "".join(str(output) for cell in notebook.cells for output in cell.get("outputs", []))
        assert "image/png" in said
        assert "standard" in said
