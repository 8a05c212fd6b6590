"""Whatever lies in run directories, a report is made.

What is damaged says so, and the rest is as if it were not there.


Each random case damages one file of a small sweep; its number is its seed.
"""

import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from kd.report import build, command_line, figures
from kd.report import tables as table

CASES, DRAWN = 96, 2  # random cases, and how many of them are drawn, too

FILES = ("result.json", "status.json", "history.csv", "config.yaml")
CONFIG: dict[str, Any] = {
    "method": {},
    "student": {"name": "cnn", "scale": 4, "epochs": 3},
    "teacher": {"name": "cnn", "scale": 8},
    "data": {
        "name": "digits",
        "mean": [0.3, 0.3, 0.3],
        "augment": {"crop_padding": 4, "flip": False},
    },
    "batch_size": 64,
    "optimizer": {"name": "sgd", "lr": 0.05},
    "device": "cpu",
    "threads": None,
    "rerun": False,
    "paths": {"runs": "runs"},
    "tracker": {"mode": "disabled", "group": None, "tags": []},
}
METHODS = [{"name": "standard"}, {"name": "logits", "T": 2.0}, {"name": "logits", "T": 4.0}]
SEEDS = 3
STATES = {"runs/failed": "failed", "runs/running": "running"}
ODD = [
    None, True, -1, 0, 1e300, -1e-300, 10**30, 10**400, math.nan, math.inf, -math.inf, "", "x",
    "\x00", "\ud800", "🦉\u202e", "$\\frac$", "<b>&\"'", "a\nb,c\n", "0.5", [], {}, [[[1]]],
    {"": {"name": None}}, "../" * 50, "x" * 70000,
]  # fmt: skip


def sweep(place: Path) -> Path:
    """The directory of a sweep of three settings.

    Its runs are finished, but for one that failed and one that another machine is at.
    """
    jobs = []
    configs = [
        CONFIG | {"method": method, "seed": seed} for method in METHODS for seed in range(SEEDS)
    ]
    configs += [CONFIG | {"method": METHODS[0], "seed": SEEDS + i} for i in range(len(STATES))]
    names = [f"runs/r{i}" for i in range(SEEDS * len(METHODS))] + list(STATES)
    for number, (name, config) in enumerate(zip(names, configs, strict=True)):
        folder, taught = place / name, config["method"]["name"] != "standard"
        folder.mkdir(parents=True)
        state = STATES.get(name, "done")
        said = {
            "state": state,
            "reason": f"it {state}",
            "host": "elsewhere",
            "pid": 12,
            "born": 7.0,
            "time": 1.7e9,
        }
        (folder / "status.json").write_text(json.dumps(said))
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        lines = [
            f"{e},{0.05 / e},{0.2 * e + number / 100},{2 / e},{0.25 * e},{1.5 / e}"
            for e in (1, 2, 3)
        ]
        (folder / "history.csv").write_text(
            "epoch,lr,accuracy,hard,val_accuracy,val_nll\n" + "\n".join(lines) + "\n"
        )
        if state == "done":
            (folder / "result.json").write_text(
                json.dumps(result(number, config, taught), indent=2)
            )
        jobs.append(
            {
                "overrides": [f"seed={config['seed']}"],
                "id": f"{number:012x}",
                "folder": str(folder),
                "taught": taught,
                "baseline": str(place / "runs" / f"r{config['seed']}"),
                "content": "digits",
                "config": config,
            }
        )
    (place / "sweep").mkdir()
    table.write_plan(place / "sweep", jobs)
    (place / "sweep" / "study.json").write_text(
        json.dumps({"storage": "nowhere.journal", "study": "none"})
    )
    return place / "sweep"


def result(number: int, config: dict[str, Any], taught: bool) -> dict[str, Any]:
    accuracy = 0.7 + number / 100
    metrics = {
        "test_accuracy": accuracy,
        "test_nll": 1.1,
        "test_ece": 0.1,
        "val_accuracy": accuracy,
        "val_nll": 1.2,
    }
    bins = {"images": [24.0] * 15, "confidence": [12.5] * 15, "right": [11.0] * 15}
    teacher = {
        "name": "cnn-8",
        "source": "x",
        "metrics": {"test_accuracy": 0.9},
        "params": 800,
        "macs": 8000,
    }
    return {
        "id": f"{number:012x}",
        "method": config["method"]["name"],
        "student": "cnn-4",
        "seed": config["seed"],
        "epochs": 3,
        "metrics": metrics | ({"test_agreement": 0.6} if taught else {}),
        "teacher": teacher if taught else None,
        "reliability": bins,
        "size": {"params": 400, "macs": 4000, "method_params": 0},
        "time": {
            "train_seconds": 1.5,
            "packed": 1,
            "epoch_seconds": [0.5] * 3,
            "images_per_second": 5000.5,
        },
        "content": "digits",
        "samples": {"train": 1000, "val": 100, "test": 360},
        "config": config,
    }


def values(runs: pd.DataFrame, columns: list[str]) -> dict[str, list[Any]]:
    """The rows by their directory's name."""
    return {
        Path(row["folder"]).name: [None if pd.isna(row[name]) else row[name] for name in columns]
        for row in runs.to_dict("records")
    }


# ---- damage


def truncate(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 1, 2, 8, 100))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def replace(path: Path, chance: random.Random) -> None:
    """One value becomes an odd one, or goes."""
    if path.suffix == ".csv":
        rows = [line.split(",") for line in path.read_text().splitlines()]
        chance.choice(rows)[chance.randrange(6)] = str(chance.choice(ODD))
        path.write_text("\n".join(map(",".join, rows)) + "\n", errors="surrogatepass")
        return
    node = said = (
        json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    )
    while True:
        key = chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], (dict, list)) or not node[key] or chance.random() < 0.25:
            break
        node = node[key]
    if chance.random() < 0.3:
        del node[key]
    else:
        node[key] = chance.choice(ODD)
    if isinstance(node, dict) and chance.random() < 0.1:
        node[chance.choice(("status", "test_accuracy", "val_nll", "", "a.b", "method.name"))] = (
            chance.choice(ODD)
        )
    path.write_text(
        json.dumps(said)
        if path.suffix == ".json" or chance.random() < 0.5
        else yaml.safe_dump(said)
    )


def elsewise(path: Path, chance: random.Random) -> None:
    """No longer a file, or not this one."""
    path.unlink()
    odd: list[Callable[[], Any]] = [
        lambda: None,
        path.mkdir,
        lambda: path.symlink_to(path.parent / "gone"),
        lambda: path.symlink_to(path),
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(chance.randbytes(3000)),
        lambda: path.write_text("[" * 100_000),
        lambda: path.write_text(json.dumps(chance.choice(ODD))),
        lambda: path.write_text(json.dumps([ODD, {"metrics": ODD}])),
    ]
    chance.choice(odd)()


def displaced(path: Path, chance: random.Random) -> None:
    """The whole directory is gone or is no directory."""
    shutil.rmtree(path.parent)
    kind = chance.randrange(3)
    if kind == 1:
        path.parent.write_text("x")
    elif kind == 2:
        path.parent.symlink_to(path.parent)


# ---- whatever it is, there is a report


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, table.Tables]:
    """A sweep of which nothing is damaged, and its tables."""
    place = tmp_path_factory.mktemp("whole")
    return place, table.load_tables([sweep(place)])


@pytest.fixture
def place(whole: tuple[Path, table.Tables], tmp_path: Path) -> Path:
    """A copy of it: the sweep's directory."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    os.utime(tmp_path / "runs" / "running" / "status.json")  # its heartbeat
    return tmp_path / "sweep"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("number", range(CASES))
def test_one_damaged_file_changes_no_other_row(
    number: int, whole: tuple[Path, table.Tables], place: Path, tmp_path: Path
) -> None:
    chance, plan, good = random.Random(number), place / table.PLAN, whole[1].runs
    files = sorted(path for path in tmp_path.rglob("*.*") if path.name in FILES)
    path = chance.choice(files if number % 4 else [plan, plan, place / "study.json"])
    kinds = [
        truncate,
        flip,
        replace,
        replace,
        replace,
        elsewise,
        *([displaced] if path in files else []),
    ]
    chance.choice(kinds)(path, chance)
    planned = number % 3 != 0 or path not in files  # or else read as runs that no sweep planned

    out = tmp_path / "out"
    found = build.write([place if planned else tmp_path / "runs"], out, figures=number < DRAWN)

    runs, summary, mine = found.tables.runs, found.tables.summary, path.parent.name
    if path in files:
        named = ("id", "setting", "full_setting", "overrides")
        unplanned = (*named, *whole[1].swept)  # what another's damaged configuration may change
        columns = [name for name in good if name != "folder" and (planned or name not in unplanned)]
        rows, before = values(runs, columns), values(good, columns)
        assert {k: v for k, v in rows.items() if k != mine} == {
            k: v for k, v in before.items() if k != mine
        }
        assert mine in rows or not planned
    elif path == plan and len(runs) > 1:
        columns = ["seed", "method", "status", "student", "test_accuracy", "params"]
        same = [
            Path(job["folder"]).name
            for job in planned_in(whole[0] / "sweep")
            if job in planned_in(place)
        ]
        rows, before = values(runs, columns), values(good, columns)
        assert {name: rows[name] for name in same} == {name: before[name] for name in same}
    if len(summary):
        counted = runs[runs["status"] == "done"].groupby("setting")["test_accuracy"]
        assert summary.set_index("setting")["n"].to_dict() == counted.nunique().to_dict()
    assert all(0 <= accuracy <= 1 for accuracy in summary.get("test_accuracy", []))
    for name in ("runs", "history", "summary"):
        assert len(pd.read_parquet(out / f"{name}.parquet")) == len(getattr(found.tables, name))
        assert (out / f"{name}.csv").read_text(encoding="utf-8")
    assert found.page is None or found.page.exists()


def planned_in(place: Path) -> list[dict[str, Any]]:
    return json.loads((place / table.PLAN).read_bytes().decode(errors="replace"))


def changed(dotted: str, value: Any) -> Callable[[Path], Any]:
    """Another value in a JSON file; of a list's index, too."""

    def change(path: Path) -> None:
        node = said = json.loads(path.read_text())
        *above, last = [int(key) if key.isdigit() else key for key in dotted.split(".")]
        for key in above:
            node = node[key]
        node[last] = value
        path.write_text(json.dumps(said))

    return change


def filled(content: str | bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def linked(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


LINE = "1,0.1,0.5,1.5,0.5,1.2\n"
HEAD = "epoch,lr,accuracy,hard,val_accuracy,val_nll\n"
NAMED = [  # a file, what happens to it, its run's status, and the reason
    (
        "r0/result.json",
        filled('{"metrics": {"test_ac'),
        "failed",
        "result.json is damaged: EOF while parsing",
    ),
    (
        "r0/result.json",
        filled('{"metrics": {}}'),
        "failed",
        "result.json is damaged: id is missing",
    ),
    (
        "r0/result.json",
        filled("[" * 100_000),
        "failed",
        "result.json is damaged: recursion limit exceeded",
    ),
    ("r0/result.json", folder, "failed", "result.json is damaged: Is a directory"),
    (
        "r0/result.json",
        linked,
        "failed",
        "result.json is damaged: Too many levels of symbolic links",
    ),
    ("r0/result.json", changed("metrics", {}), "failed", "metrics: test_accuracy is missing"),
    (
        "r0/result.json",
        changed("metrics.test_accuracy", "0.7"),
        "failed",
        "test_accuracy: should be a valid number",
    ),
    (
        "r0/result.json",
        changed("metrics.test_accuracy", 7.3),
        "failed",
        "test_accuracy should be between 0 and 1",
    ),
    (
        "r0/result.json",
        changed("metrics.val_nll", math.nan),
        "failed",
        "metrics.val_nll: should be",
    ),
    (
        "r0/result.json",
        changed("metrics.val_nll", [[1.0]]),
        "failed",
        "metrics.val_nll: should be a valid number",
    ),
    (
        "r0/result.json",
        changed("size.params", 10**30),
        "failed",
        "size.params: should be less than",
    ),
    ("r0/result.json", changed("samples", None), "failed", "samples: should be a valid dictionary"),
    ("r0/result.json", changed("reliability.right", [1.0]), "failed", "reliability.right"),
    (
        "r0/result.json",
        changed("config.seed", "0"),
        "failed",
        "config.seed: should be a valid integer",
    ),
    (
        "r8/result.json",
        changed("teacher", "cnn"),
        "failed",
        "teacher: should be a valid dictionary",
    ),
    (
        "r8/result.json",
        changed("id", "\ud800"),
        "failed",
        "result.json is damaged: unexpected end of hex escape",
    ),
    ("r0/result.json", changed("metrics.setting", 1.0), "done", ""),
    ("r0/status.json", filled("x"), "done", ""),
    ("r0/config.yaml", filled("- 1"), "done", ""),
    (
        "r0/history.csv",
        filled(HEAD + LINE + "2,0.1,0.5,1.5,0.5,1."),
        "done",
        "history.csv is damaged after epoch 1",
    ),
    (
        "r0/history.csv",
        filled(HEAD + LINE + "2,0.1,0.5\n"),
        "done",
        "history.csv is damaged after epoch 1",
    ),
    (
        "r0/history.csv",
        filled(HEAD.encode() + LINE.encode() + b"\x00\xff"),
        "done",
        "is damaged after epoch 1",
    ),
    (
        "r0/history.csv",
        filled(HEAD + LINE.replace("0.1", "x")),
        "done",
        "history.csv is damaged after epoch 0",
    ),
    (
        "r0/history.csv",
        filled("seed,epoch\n0.5,1\n"),
        "done",
        "history.csv is damaged after epoch 0",
    ),
    ("r0/history.csv", filled("a,b\n1,2\n"), "done", "history.csv is damaged after epoch 0"),
    ("r0/history.csv", folder, "done", "history.csv is damaged after epoch 0"),
    ("r0/history.csv", filled(HEAD + LINE.replace("1.5", "nan")), "done", ""),
    (
        "failed/status.json",
        changed("state", ["failed"]),
        "failed",
        "status.json is damaged: state: should be",
    ),
    (
        "failed/status.json",
        changed("reason", "\ud800"),
        "failed",
        "status.json is damaged: unexpected end of hex",
    ),
    (
        "failed/status.json",
        filled("[" * 100_000),
        "failed",
        "status.json is damaged: recursion limit exceeded",
    ),
    ("failed/status.json", folder, "failed", "status.json is damaged: Is a directory"),
    (
        "running/status.json",
        changed("pid", 10**30),
        "failed",
        "status.json is damaged: pid: should be less than",
    ),
    ("running/status.json", changed("time", "noon"), "running", "it running"),
]


@pytest.mark.parametrize(("name", "damage", "status", "reason"), NAMED)
def test_what_is_damaged_is_named(
    name: str, damage: Callable, status: str, reason: str, place: Path
) -> None:
    runs = place.parent / "runs"
    damage(runs / name)
    for where in (place, runs):
        found = values(table.load_tables([where]).runs, ["status", "reason", "test_accuracy"])[
            name.split("/")[0]
        ]
        assert (found[0], reason in found[1], bool(found[1])) == (status, True, bool(reason))
        assert (found[2] is None) == (status != "done")


@pytest.mark.parametrize(
    "content",
    ["", "- 1", "a: [", "method: {name: 3}", "a: !!bool ''", b"\x00\xff", "&a [*a]", None],
)
def test_a_run_whose_configuration_is_lost_is_a_row(
    content: str | bytes | None, place: Path, tmp_path: Path
) -> None:
    """Unless its result, which holds it too, is there."""
    for name in ("r0", "failed"):
        path = tmp_path / "runs" / name / "config.yaml"
        path.unlink() if content is None else filled(content)(path)
    found = build.write([tmp_path / "runs"], tmp_path / "out", figures=False)
    runs = found.tables.runs.set_index("folder")
    assert runs.loc[str(tmp_path / "runs" / "r0"), "status"] == "done"
    lost = runs.loc[str(tmp_path / "runs" / "failed")]
    assert lost["status"] == "failed"
    assert lost["reason"].startswith("config.yaml is ")
    assert ("1 of those have damaged files" in found.text) == (content is not None)


def test_a_job_that_is_damaged_in_the_plan_is_read_from_its_own_files(place: Path) -> None:
    plan = place / table.PLAN
    changed("0.config", None)(plan)
    changed("1", {"folder": "../runs/r1"})(plan)
    changed("9.taught", "no")(plan)
    changed("10.folder", "a\x00b")(plan)
    changed("3.baseline", 7)(plan)
    runs = table.load_tables([place]).runs
    assert runs["status"].tolist() == ["done"] * 9 + ["failed", "failed"]
    assert runs["setting"].tolist()[:4] == ["standard", "standard", "standard", "logits T=2"]
    assert runs["reason"][9] == "it failed"
    assert runs["reason"][10].startswith(
        "jobs.json is damaged: job 11: folder: String should match"
    )
    assert [Path(job["folder"]).name for job in table.read_plan(place)] == [
        f"r{n}" for n in range(9)
    ] + ["failed"]


def test_a_figure_that_cannot_be_drawn_is_left_out(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd.report.figures.drawing.accuracy", lambda tables: 1 / 0)
    drawn, left = figures.draw(table.load_tables([place]), tmp_path / "figures")
    assert "Response to T" in [one.title for one in drawn]
    assert "drawing failed: " in {one.title: one.reason for one in left}["Test accuracy"]
    assert not list(tmp_path.glob("figures/.*"))


def test_a_study_that_is_gone_is_not_made(place: Path, tmp_path: Path) -> None:
    gone = {"study": "x", "storage": str(tmp_path / "gone.journal")}
    _, left = figures.draw(table.load_tables([place]), tmp_path / "figures", [(gone, "")])
    reason = f"the study cannot be read: {gone['storage']} does not exist"
    titles = ("Search history", "Hyperparameter importance")
    assert left[-2:] == [(title, reason) for title in titles]
    assert not (tmp_path / "gone.journal").exists()


def test_a_report_of_nothing_but_damage(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for path in tmp_path.rglob("*.*"):
        if path.name in FILES:
            path.write_bytes(b"\xff")
    (tmp_path / "runs" / "failed").rename(os.fsdecode(os.fsencode(tmp_path) + b"/runs/odd\xff"))
    for path in (place / table.PLAN, place / "study.json"):
        command_line.main([str(tmp_path / "runs"), str(place), "--out", str(tmp_path / "out")])
        said = capsys.readouterr().out
        assert said.startswith("no run has finished")
        page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
        assert page.count("config.yaml is damaged: unacceptable character") == 11
        path.write_bytes(b"\xff")
    assert "jobs.json is damaged: expected value at line 1" in page
    assert "odd\\udcff" in page
    command_line.main([str(place)])
    assert "Search history (study.json is damaged" in (place / "index.html").read_text(
        encoding="utf-8"
    )
