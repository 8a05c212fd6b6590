"""What a report says and shows: ties, order, what was run, links, names that fit, all columns."""

import json
import re
import sys
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pandas as pd
import pytest
import yaml
from conftest import SMALL
from helpers import config, made, tables
from wandb_server import Server

import kd
from kd.report import build, command_line, figures, published
from kd.report import tables as table
from kd.report.verdict import headline
from kd.runs import directory as record
from kd.runs import labels
from kd.sweep import scheduler
from kd.sweep.directory import SweepDirectory


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "draw", lambda *_: ([], []))


def written(place: Path) -> tuple[str, str, pd.DataFrame]:
    """A report on a sweep: as text, as a page, and its summary."""
    found = build.write([place], place)
    assert found.page is not None
    return (
        found.text,
        found.page.read_text(),
        pd.read_csv(place / "summary.csv").set_index("setting"),
    )


# ---- ties


def test_methods_that_tie_on_validation_are_not_preferred(tmp_path: Path) -> None:
    made(
        tmp_path,
        [config("logits", 0), config("standard", 0), config("feature", 0)],
        [0.7, 0.8, 0.9],
        [0.6, 0.6, 0.5],
    )
    text, page, _ = written(tmp_path)
    verdict = (
        "Of 3 settings, logits and standard tie on validation (60.00 %). "
        "The one planned first, logits, reaches "
    )
    assert headline(tables(tmp_path)).startswith(f"{verdict}70.00 % test accuracy (1 seed)")
    assert verdict in text
    assert verdict in unescape(page)
    assert "Best of" not in text + page


def test_settings_of_one_method_that_tie_are_told(tmp_path: Path) -> None:
    """Means of the same numbers in another order differ in their last bits; they tie anyway."""
    val = [0.1, 0.2, 0.3, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1]
    assert sum(val[:3]) != sum(val[3:6])
    configs = [config("logits", s, method__T=t) for t in (8.0, 1.0, 2.0) for s in (0, 1, 2)]
    configs += [config("standard", s) for s in (0, 1, 2)]
    made(tmp_path, configs, [0.7] * 12, [*val, 0.1, 0.1, 0.1])
    text, page, summary = written(tmp_path)
    assert summary["chosen"].to_dict() == {
        "logits T=8": True,
        "standard": True,
        "logits T=1": False,
        "logits T=2": False,
    }
    assert summary["tied_with"].dropna().to_dict() == {"logits T=1": "logits T=8"}
    assert summary.loc["logits T=1", "verdict"] == (
        "not chosen: ties on validation with logits T=8, which was planned first"
    )
    assert summary.loc["logits T=2", "verdict"] == "not chosen on validation"
    assert "Of 4 settings, logits T=8 and logits T=1 tie on validation (20.00 %)." in text
    note = (
        "settings of the same method tie on validation (logits T=1 with logits T=8); "
        "of those, the one planned first is chosen"
    )
    assert note in text
    assert note in page
    assert "the one planned first" in " ".join(table.COLUMNS["chosen"].split())


def test_many_that_tie_are_counted_and_one_that_leads_is_preferred(tmp_path: Path) -> None:
    configs = [config("logits", 0, method__T=float(t)) for t in range(1, 9)]
    made(tmp_path / "tie", configs, [0.5] * 8, [0.5] * 8)
    assert headline(tables(tmp_path / "tie")).startswith(
        "Of 8 settings, logits T=1, logits T=2, logits T=3 and 5 more tie on validation"
    )
    made(tmp_path / "lead", configs, [0.5] * 8, [0.5] * 6 + [0.500001, 0.5])
    assert headline(tables(tmp_path / "lead")).startswith(
        "Best of 8 settings on validation: logits T=7, "
    )


# ---- the order of settings


def test_the_best_setting_by_validation_comes_first_everywhere(tmp_path: Path) -> None:
    count = 120
    val = [0.3 + 0.5 * ((37 * t) % count) / count for t in range(count)]
    configs = [config("logits", 0, method__T=float(t)) for t in range(1, count + 1)]
    configs += [config("standard", 0), config("feature", 0)]
    made(tmp_path, configs, [1 - v for v in val] + [0.5, 0.5], [*val, 0.31, 0.32])
    text, page, summary = written(tmp_path)
    ranked = sorted(range(count), key=lambda t: -val[t])
    expected = [f"logits T={t + 1}" for t in ranked]
    expected = [expected[0], "feature", "standard", *expected[1:]]
    assert summary.index.tolist() == expected
    assert pd.read_parquet(tmp_path / "summary.parquet")["setting"].tolist() == expected
    markdown = (tmp_path / "summary.md").read_text().splitlines()[2:]
    assert [line.split("|")[1].strip() for line in markdown][: count + 2] == expected
    lines = text.splitlines()[1 : build.MAX_PRINTED_SETTINGS + 1]
    assert [re.split(r"\s{2,}", line)[0] for line in lines] == expected[
        : build.MAX_PRINTED_SETTINGS
    ]
    shown = re.findall(r'<tr class="(?:chosen|other)"><td class="setting">([^<]*)</td>', page)
    assert shown[: count + 2] == expected


def test_without_validation_the_grids_order_stays_and_is_told(tmp_path: Path) -> None:
    configs = [config("logits", 0, method__T=float(t)) for t in (3, 1, 4, 2)]
    jobs = made(tmp_path, configs, [0.5, 0.9, 0.3, 0.7])
    for job in jobs:
        result = json.loads((Path(job["folder"]) / "result.json").read_text())
        del result["metrics"]["val_accuracy"]
        (Path(job["folder"]) / "result.json").write_text(json.dumps(result))
    text, page, summary = written(tmp_path)
    assert summary.index.tolist() == ["logits T=3", "logits T=1", "logits T=4", "logits T=2"]
    assert not summary["chosen"].any()
    for where in (text, page):
        assert "their rows keep the order in which they were planned" in where


# ---- what was run

NASTY = "<img src=x onerror=alert(1)>"
ENVIRONMENT = {
    "kd": "0.1.0",
    "python": "3.11.9",
    "torch": "2.13.0",
    "device": "cpu",
    "precision": "bfloat16",
    "threads": 2,
    "processor": "A processor",
    "platform": "Linux-6",
    "command": ["__main__.py", "-m", "method=logits", NASTY],
    "git": {"commit": "0123456789abcdef", "dirty": True},
}
STARTED = {
    "command": ["python", "-m", "kd", "-m", "method=standard,logits", "data.root=/a b", NASTY],
    "directory": "/home/me/work",
    "started": "2026-11-24T10:00:00+00:00",
    "environment": {"kd": "0.1.0", "hydra": "1.3.8", "wandb": "0.28.2", "host": "node-17"},
}


def ran(
    place: Path, methods: tuple[str, ...] = ("standard", "logits"), started: Any = STARTED
) -> list[Path]:
    """A sweep of two runs a method, as a training leaves them; their folders."""
    configs = [config(method, seed) for method in methods for seed in (0, 1)]
    folders = []
    for job in made(place, configs, [0.7, 0.71, 0.8, 0.82][: len(configs)]):
        folder = Path(job["folder"])
        result = json.loads((folder / "result.json").read_text())
        result |= {"environment": ENVIRONMENT, "samples": {"train": 1437, "val": 180, "test": 181}}
        result["time"]["train_seconds"] = 90.0 + 10 * len(folders)
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "config.yaml").write_text(yaml.safe_dump(job["config"]))
        (folder / "kd.log").write_text("")
        ended = 1795514400.0 + 600 + len(folders)  # ten minutes after the start
        (folder / "status.json").write_text(json.dumps({"state": "done", "time": ended}))
        folders.append(folder)
    if started is not None:
        (place / "sweep.json").write_text(json.dumps(started))
    return folders


def what_was_run(page: Path) -> dict[str, str]:
    """The section of that name: each fact with its text."""
    said = page.read_text().split("<h2>What was run</h2>")[1].split("</dl>")[0]
    facts: dict[str, str] = {}
    for name, text in re.findall(r"<dt>(.*?)</dt><dd[^>]*>(.*?)</dd>", said, re.DOTALL):
        facts[unescape(name)] = unescape(re.sub(r"</?code>", "", text))
        assert NASTY not in text, "escaped"
    return facts


def test_the_page_says_what_was_run(tmp_path: Path) -> None:
    ran(tmp_path)
    page = build.write([tmp_path], tmp_path).page
    assert page is not None
    assert what_was_run(page) == {
        "command": f"python -m kd -m method=standard,logits 'data.root=/a b' '{NASTY}'",
        "started": "2026-11-24 10:00 in /home/me/work on node-17",
        "data": "digits: 1,437 training, 180 validation, 181 test images, from /x",
        "student": "cnn-4, 400 parameters, 3 epochs",
        "teacher": "cnn-8, 800 parameters, 5 epochs, 90.00 % on test",
        "training": "batches of 64, sgd at lr=0.1",
        "seeds": "0, 1",
        "versions": "kd 0.1.0 (0123456789, changed), python 3.11.9, torch 2.13.0; "
        "hydra 1.3.8, wandb 0.28.2",
        "machine": "A processor, cpu, bfloat16, 2 threads, Linux-6",
        "time": "4 students were trained for 7 min 00 s in total, 1 min 30 s to 2 min 00 s each; "
        "10 min 03 s from the start to the last result",
    }
    header = page.read_text().split("<header>")[1].split("</header>")[0]
    assert "method=standard,logits" in header
    assert NASTY not in page.read_text()
    assert page.read_text().count("1 min 30 s</td>") == 1, "the time of each run"


def test_several_sweeps_say_what_each_ran(tmp_path: Path) -> None:
    ran(tmp_path / "one")
    ran(tmp_path / "two", ("feature",), STARTED | {"command": ["kd", "-m", "method=feature"]})
    page = build.write([tmp_path / "one", tmp_path / "two"], tmp_path / "out").page
    assert page is not None
    facts = what_was_run(page)
    assert facts["command of two"] == "kd -m method=feature"
    assert facts["command of one"].startswith("python -m kd -m method=standard,logits")
    assert facts["student"] == "cnn-4, 400 parameters, 3 epochs"
    assert "from the start" not in facts["time"]


@pytest.mark.parametrize("password", ["s3cret", "s3/cr@et", "s3:cret/"])
def test_no_password_is_on_the_page(password: str, tmp_path: Path) -> None:
    command = ["kd", "-m", f"hydra.sweeper.storage=postgresql://me:{password}@host:5432/db"]
    ran(tmp_path, started=STARTED | {"command": command})
    _, page, _ = written(tmp_path)
    assert "postgresql://me:***@host:5432/db" in page
    assert password not in page


# ---- several students and data sets


def test_validation_is_compared_within_a_data_set(tmp_path: Path) -> None:
    """An easier data set is no reason to prefer a method.

    One without validation images is no reason against it.
    """
    configs = [config(m, 0, data__name=d) for d in ("easy", "hard") for m in ("standard", "logits")]
    made(tmp_path, configs, [0.985, 0.98, 0.60, 0.63], [0.98, 0.97, 0.6, 0.62])
    text, _, _ = written(tmp_path)
    assert (
        "Best of 2 settings on validation: standard data=easy, 98.50 % test accuracy (1 seed)."
        in text
    )
    assert (
        "Best of 2 settings on validation: logits data=hard, 63.00 % test accuracy (1 seed), "
        "too few seeds to tell: 3.00 points above" in text
    )
    assert "of 4 settings" not in text.lower()


def test_a_sweep_without_validation_images_takes_no_choice_from_another(tmp_path: Path) -> None:
    rates = [config("logits", 0, method__T=t) for t in (1.0, 2.0, 4.0)]
    made(
        tmp_path / "a",
        [*rates, config("standard", 0)],
        [0.7, 0.8, 0.75, 0.72],
        [0.71, 0.82, 0.76, 0.7],
    )
    blind = [
        config(m, 0, data__name="other", optimizer__lr=r)
        for m in ("logits", "standard")
        for r in (0.1, 0.2)
    ]
    for job in made(tmp_path / "b", blind, [0.9, 0.91, 0.92, 0.93]):
        path = Path(job["folder"]) / "result.json"
        result = json.loads(path.read_text())
        del result["metrics"]["val_accuracy"]
        path.write_text(json.dumps(result))
    build.write([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    summary = pd.read_csv(tmp_path / "out" / "summary.csv")
    mine, other = (
        summary[summary["data"] == name] for name in (config("logits", 0)["data"]["name"], "other")
    )
    assert mine.loc[mine["chosen"], ["method", "test_accuracy"]].values.tolist() == [
        ["logits", 0.8],
        ["standard", 0.72],
    ]
    assert not other["chosen"].any()
    assert set(other.loc[other["method"] == "logits", "verdict"]) == {
        "no baseline: standard has several settings, and no validation images to choose on"
    }
    assert set(other.loc[other["method"] == "standard", "verdict"]) == {
        "not chosen: there are no validation images to choose on"
    }


def test_a_run_that_lies_in_two_folders_is_drawn_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        made(tmp_path / name, [config("standard", 0)], [0.7])
    found = table.load_tables([tmp_path / "a", tmp_path / "b"])
    assert len(found.runs) == 2
    assert found.summary["n"].tolist() == [1]
    assert found.history["epoch"].is_unique
    assert found.reliability["standard"]["images"] == [50.0] * 15


def test_runs_without_a_sweep_tell_their_command(tmp_path: Path) -> None:
    ran(tmp_path, started=None)
    page = build.write([tmp_path / "runs"], tmp_path / "out").page
    assert page is not None
    facts = what_was_run(page)
    assert facts["command"] == f"python -m kd -m method=logits '{NASTY}'"
    assert facts["versions"] == "kd 0.1.0 (0123456789, changed), python 3.11.9, torch 2.13.0"
    assert "started" not in facts
    assert 'href="../runs/r0/config.yaml"' in page.read_text()


def test_what_is_planned_is_told_before_a_run_is_done(tmp_path: Path) -> None:
    for folder in ran(tmp_path):
        (folder / "result.json").unlink()
    page = build.write([tmp_path], tmp_path).page
    assert page is not None
    facts = what_was_run(page)
    assert facts["data"] == "digits, from /x"
    assert facts["student"] == "cnn-4, 3 epochs"
    assert facts["teacher"] == "cnn-8, 5 epochs"
    assert "time" not in facts


@pytest.mark.slow
@pytest.mark.parametrize(
    "odd",
    [
        None,
        [],
        "x",
        1,
        {"command": "kd"},
        {**STARTED, "environment": []},
        {**STARTED, "started": "noon"},
    ],
)
def test_a_damaged_sweep_json_ends_no_report(odd: Any, tmp_path: Path) -> None:
    ran(tmp_path, started=odd)
    (tmp_path / "sweep.json").write_text(json.dumps(odd))
    page = build.write([tmp_path], tmp_path).page
    assert page is not None
    facts = what_was_run(page)
    good = isinstance(odd, dict) and odd.get("started") == "noon"
    assert facts["command"].startswith("python -m kd" if good else "sweep.json is damaged: ")
    assert facts.get("started", "").startswith("noon") == good


@pytest.mark.parametrize(
    "odd", [None, [], "x", {"git": 3, "kd": [], "command": [1], "threads": "<b>"}]
)
def test_an_odd_environment_ends_no_report(odd: Any, tmp_path: Path) -> None:
    for folder in ran(tmp_path, started=None):
        result = json.loads((folder / "result.json").read_text()) | {"environment": odd}
        (folder / "result.json").write_text(json.dumps(result))
    _, page, _ = written(tmp_path)
    assert "<b>" not in page.split("What was run")[1].split("<h2>")[0]


def test_a_sweep_writes_down_how_it_was_started(
    composed: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed("method=standard").to_dict()
    words = ["-m", "method=standard", "tracker.notes=a b\udcff"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/kd/__main__.py", *words])
    monkeypatch.chdir(tmp_path)
    directory = SweepDirectory(tmp_path / "sweep")
    directory.claim()
    jobs = scheduler.plan(directory, [(["method=standard"], config)])
    said = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert said["command"] == [
        "python",
        "-m",
        "kd",
        "-m",
        "method=standard",
        "tracker.notes=a b\\udcff",
    ]
    assert said["directory"] == str(tmp_path)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", said["started"])
    environment = said["environment"]
    assert environment["kd"] == kd.__version__
    assert environment["git"] == record.git_state()
    import hydra
    import torch
    import wandb

    packages = {
        "torch": torch.__version__.split("+")[0],
        "hydra": hydra.__version__,
        "wandb": wandb.__version__,
    }
    assert {name: environment[name].split("+")[0] for name in packages} == packages
    before = (tmp_path / "sweep" / "sweep.json").read_bytes()
    monkeypatch.setattr(sys, "argv", ["kd", "worker"])
    scheduler.plan(directory, [(["method=standard"], {**config, "seed": 1})], jobs)
    directory.release()
    assert (tmp_path / "sweep" / "sweep.json").read_bytes() == before, (
        "a search plans its jobs one by one"
    )


# ---- links


def linked(page: Path) -> dict[str, list[str]]:
    """Each link of the page's table of runs, by its text."""
    found: dict[str, list[str]] = {}
    table_of_runs = page.read_text().split("<h2>Runs</h2>")[1].split("</table>")[0]
    for link, text in re.findall(r'<a href="([^"]*)">(?:<code>)?([^<]*)', table_of_runs):
        found.setdefault(unescape(text), []).append(unescape(link))
    return found


def test_each_run_links_what_it_has_and_nothing_else(tmp_path: Path) -> None:
    folders = ran(tmp_path)
    (folders[0] / "kd.log").unlink()
    (folders[1] / "config.yaml").unlink()
    (folders[1] / "wandb" / "offline-run-20261124_100000-abc").mkdir(parents=True)
    (folders[1] / "wandb.json").write_text(
        '{"id": "abc", "offline": "wandb/offline-run-20261124_100000-abc"}'
    )
    (folders[2] / "wandb.json").write_text(
        '{"id": "abd", "url": "https://wandb.ai/me/kd/runs/abd?a=1&b=<2>"}'
    )
    (folders[3] / "wandb.json").write_text('{"id": "abe", "url": "javascript:alert(1)"}')
    page = build.write([tmp_path], tmp_path).page
    assert page is not None
    assert linked(page) == {
        "r0": ["runs/r0"],
        "r1": ["runs/r1"],
        "r2": ["runs/r2"],
        "r3": ["runs/r3"],
        "config.yaml": ["runs/r0/config.yaml", "runs/r2/config.yaml", "runs/r3/config.yaml"],
        "kd.log": ["runs/r1/kd.log", "runs/r2/kd.log", "runs/r3/kd.log"],
        "W&B": [
            "runs/r1/wandb/offline-run-20261124_100000-abc",
            "https://wandb.ai/me/kd/runs/abd?a=1&b=<2>",
        ],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "odd", ["x", "[]", '{"id": 3}', '{"id": "*"}', '{"offline": true, "url": null}', "\xff"]
)
def test_an_odd_wandb_json_has_no_link(odd: str, tmp_path: Path) -> None:
    for folder in ran(tmp_path):
        (folder / "wandb" / "offline-run-1-abc").mkdir(parents=True)
        (folder / "wandb.json").write_bytes(odd.encode("latin-1"))
    page = build.write([tmp_path], tmp_path).page
    assert page is not None
    assert "W&B" not in linked(page)


def test_an_offline_run_that_is_named_is_linked(tmp_path: Path) -> None:
    folder = ran(tmp_path)[0]
    (tmp_path / "W" / "offline-run-2").mkdir(parents=True)
    (folder / "wandb.json").write_text('{"id": "abc", "offline": "../../W/offline-run-2"}')
    page = build.write([tmp_path], tmp_path).page
    assert page is not None
    assert linked(page)["W&B"] == ["W/offline-run-2"]


@pytest.mark.slow
def test_a_sweep_links_its_runs_on_the_server(server: Server, kd: Callable, tmp_path: Path) -> None:
    words = [
        *SMALL,
        "method=standard",
        "seed=0,1",
        "hydra.sweep.dir=sweep",
        "hydra.launcher.slots=1",
    ]
    assert kd("-m", *words, "tracker.timeout=300").code == 0
    wanted = {
        f"{server.url}/me/kd/runs/{id_}"
        for id_, run in server.runs.items()
        if run.job_type == "student"
    }
    assert len(wanted) == 2
    assert set(linked(tmp_path / "cwd" / "sweep" / "index.html")["W&B"]) == wanted


def test_links_lead_through_odd_names(tmp_path: Path) -> None:
    place = tmp_path / 'a #1? 100% "b"&c' / "javascript:x"
    ran(place)
    page = build.write([place / "runs"], tmp_path / "out").page
    assert page is not None
    links = [link for group in linked(page).values() for link in group]
    assert len(links) == 12
    for link in links:
        assert not set("#?\" '<>") & set(link)
        assert (page.parent / unquote(link)).exists()


# ---- names of settings


def of_sum(*parts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    made = config("standard", 0, **changes)
    return made | {"method": {"name": "sum", "parts": [{"weight": 1.0, **part} for part in parts]}}


LOGITS, ATTENTION = {"name": "logits", "T": 4.0, "alpha": 0.1}, {"name": "attention", "p": 2}
RKD = {"name": "rkd", "distance": 25.0, "angle": 50.0}
LONG = "/data/" + "x" * 80
NAMES: list[tuple[list[dict[str, Any]], list[str]]] = [
    ([of_sum(LOGITS, ATTENTION | {"weight": 0.5}, RKD), of_sum(LOGITS, RKD), config("standard", 0)],
     ["sum: logits + 0.5 attention + rkd", "sum: logits + rkd", "standard"]),
    ([of_sum(LOGITS, RKD), of_sum(LOGITS | {"T": 2.0}, RKD),
      of_sum(LOGITS, RKD | {"distance": 10.0})],
     ["sum: logits(T=4) + rkd(distance=25)", "sum: logits(T=2) + rkd(distance=25)",
      "sum: logits(T=4) + rkd(distance=10)"]),
    ([of_sum(LOGITS, RKD, optimizer__lr=lr) for lr in (0.1, 0.2)],
     ["sum optimizer.lr=0.1", "sum optimizer.lr=0.2"]),
    ([of_sum(*[LOGITS, ATTENTION, RKD] * 3, part) for part in (LOGITS, RKD)],
     ["sum: logits + attention + … rkd + logits", "sum: logits + attention + … + rkd + rkd"]),
    ([of_sum(*[LOGITS, ATTENTION] * 2, part, *[RKD] * 4) for part in (LOGITS, RKD)],
     ["sum: logits + attention … + rkd + rkd #1", "sum: logits + attention … + rkd + rkd #2"]),
    ([config("logits", 0, method__T=T, method__alpha=0.5 / T, student__scale=int(8 * T),
             optimizer__lr=0.1 * T) for T in (1.0, 0.5)],
     ["logits T=1 alpha=0.5 scale=8 lr=0.1", "logits T=0.5 alpha=1 scale=4 lr=0.05"]),
    ([config("logits", 0, data__root=f"/very/long/path/to/some/{name}") for name in ("a", "b")],
     ["logits root=…/a", "logits root=…/b"]),
    ([config("logits", 0, data__root=root) for root in (f"{LONG}1{LONG}", f"{LONG}2{LONG}", "/c")],
     ["logits root=…/xxxxxxxx…xxxxx #1", "logits root=…/xxxxxxxx…xxxxx #2", "logits root=/c"]),
    ([config("logits", 0, student__scale=s, teacher__scale=t,
             method__pairs=[["block1", "block2"]] * n) for s, t, n in ((4, 8, 1), (8, 16, 2))],
     ["logits pairs=[['block1'…k2…acher.scale=8", "logits pairs=[['block1'…k2…cher.scale=16"]),
    ([config("logits", 0, data__name=name) for name in ("a\nb", "\u202ec")],
     ["logits data=a\\nb", "logits data=\\u202ec"]),
]  # fmt: skip


@pytest.mark.parametrize(("configs", "expected"), NAMES, ids=range(len(NAMES)))
def test_names_are_short_and_as_many_as_settings(configs: list, expected: list[str]) -> None:
    names = labels.describe(
        [{"config": c, "taught": c["method"]["name"] != "standard"} for c in configs]
    )
    assert len(set(names.short)) == len(set(names.full)) == len(configs)
    assert max(map(len, names.short)) <= labels.MAX_LABEL
    assert all(name.isprintable() for name in names.short)
    assert names.short == expected


def test_equal_settings_share_a_name_however_long() -> None:
    configs = [
        config("logits", seed, data__name="x" * 500, method__T=T)
        for T in (1.0, 2.0)
        for seed in (0, 1)
    ]
    configs.append(config("logits", 0, data__name="y" * 500))
    names = labels.describe([{"config": c, "taught": True} for c in configs])
    assert names.short[0] == names.short[1] != names.short[2] == names.short[3]
    assert len(set(names.short)) == len(set(names.full)) == 3


@pytest.mark.parametrize("parts", [None, "x", [], [3], [{"name": 3}], [[]]])
def test_odd_parts_are_named_as_they_are(parts: Any) -> None:
    configs = [of_sum(LOGITS), of_sum(LOGITS) | {"method": {"name": "sum", "parts": parts}}]
    names = labels.describe([{"config": c, "taught": True} for c in configs])
    assert names.short[0] == "sum: logits"
    assert len(set(names.short)) == 2


def test_a_long_setting_is_whole_in_runs_csv_and_on_the_page(tmp_path: Path) -> None:
    nasty = {**RKD, "distance": "<i>\"'"}
    configs = [
        of_sum(*[LOGITS, ATTENTION] * 3, RKD),
        of_sum(*[LOGITS, ATTENTION] * 3, nasty),
        config("standard", 0),
    ]
    made(tmp_path, configs, [0.7, 0.8, 0.6])
    text, page, summary = written(tmp_path)
    runs = pd.read_csv(tmp_path / "runs.csv")
    assert max(map(len, text.splitlines()[0:4])) < 120
    assert runs["full_setting"][0] == f"sum parts={configs[0]['method']['parts']}"
    assert runs["full_setting"][2] == runs["setting"][2] == "standard"
    assert set(summary.index) == set(runs["setting"])
    assert (
        "note: the names of 2 settings are shortened; the column full_setting of runs.csv" in text
    )
    titles = dict(re.findall(r'<span title="([^"]*)">([^<]*)</span>', page))
    assert {unescape(short): unescape(full) for full, short in titles.items()} == dict(
        zip(runs["setting"][:2], runs["full_setting"][:2], strict=True)
    )
    assert "<i>" not in page
    verdict = unescape(page.split("<h1>")[1].split("</h1>")[0])
    assert len(max(verdict.split(), key=len)) <= labels.MAX_LABEL


def test_nothing_is_said_of_names_where_none_is_cut(tmp_path: Path) -> None:
    made(tmp_path, [config("logits", 0, method__T=t) for t in (1.0, 2.0)], [0.7, 0.8])
    text, page, _ = written(tmp_path)
    assert "shortened" not in text + page


# ---- columns, and the page's layout


def test_columns_of_two_tables_are_explained_apart(capsys: pytest.CaptureFixture) -> None:
    command_line.main(["--columns"])
    first, second = capsys.readouterr().out.split("published.csv")
    for text, columns in ((first, table.COLUMNS), (second, published.COLUMNS)):
        said = dict(re.findall(r"^(\w+) +(.+)$", text, re.MULTILINE))
        assert {name: said.get(name) for name in columns} == columns
    both = set(table.COLUMNS) & set(published.COLUMNS)
    assert any(table.COLUMNS[name] != published.COLUMNS[name] for name in both)


def test_long_words_break_instead_of_leaving_the_page(tmp_path: Path) -> None:
    """Looked at in a browser from 360 to 1600 pixels; this holds the rules that do it."""
    made(tmp_path, [config("logits", 0)], [0.7])
    _, page, _ = written(tmp_path)
    style = page.split("<style>")[1].split("</style>")[0]
    assert "overflow-wrap: anywhere" in re.findall(r"body \{(.*?)\}", style, re.DOTALL)[0]
    assert "nowrap" not in re.findall(r"h1 \{(.*?)\}", style, re.DOTALL)[0]
    assert "overflow-x: auto" in re.findall(r"\.scroll \{(.*?)\}", style, re.DOTALL)[0]
    assert (
        re.sub(r'<div class="scroll"><table>.*?</table></div>', "", page, flags=re.DOTALL).count(
            "<table"
        )
        == 0
    )
    assert 'content="width=device-width, initial-scale=1"' in page
