"""A report on a sweep that was copied or moved: its runs are found or named.

A good report is never replaced by one with less in it.
"""

import csv
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pandas as pd
import pytest
import yaml
from helpers import config, made, name_of

from kd.report import build, command_line, figures, tables

SETTINGS = [config(method, seed) for method in ("standard", "logits") for seed in (0, 1)]
ACCURACIES = [0.70, 0.71, 0.75, 0.77]


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "draw", lambda *_: ([], []))


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A directory as a finished sweep leaves it: runs/NAME-ID beside multirun/DATE/TIME."""
    shutil.copytree(finished, tmp_path / "project")
    rows = sweep_of(tmp_path / "project") / "runs.csv"
    rows.write_text(rows.read_text().replace(str(finished), str(tmp_path / "project")))
    return tmp_path / "project"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda *_: ([], []))
        return planned(tmp_path_factory.mktemp("finished") / "project")


def planned(project: Path, configs: list[dict] = SETTINGS, accuracies: list = ACCURACIES) -> Path:
    """Make runs/ and a sweep of them, with its report."""
    jobs = made(project / "made", configs, accuracies)
    (project / "runs").mkdir()
    for job in jobs:
        folder = project / "runs" / f"{job['config']['method']['name']}-{job['id']}"
        Path(job["folder"]).rename(folder)
        (folder / "config.yaml").write_text(yaml.safe_dump(job["config"]))
        if not (folder / "status.json").exists():
            (folder / "status.json").write_text(json.dumps({"state": "done"}))
        job["folder"] = str(folder)
    shutil.rmtree(project / "made")
    sweep = project / "multirun" / "day" / "time"
    sweep.mkdir(parents=True)
    tables.write_plan(sweep, jobs)
    build.write([sweep], sweep)
    return project


def sweep_of(project: Path) -> Path:
    return project / "multirun" / "day" / "time"


def reported(capsys: pytest.CaptureFixture, *words: Any) -> tuple[int, str, str]:
    """`python -m kd.report` with these words: its exit code, and what it printed."""
    capsys.readouterr()
    code: Any = 0
    try:
        command_line.main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def numbers(folder: Path) -> dict[str, float]:
    """The mean accuracies in a report's summary.csv."""
    return pd.read_csv(folder / "summary.csv").set_index("setting")["test_accuracy"].to_dict()


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def broken_links(page: Path) -> list[str]:
    links = re.findall(r'href="([^"]*)"', page.read_text())
    assert links
    return [link for link in links if not (page.parent / unquote(link)).exists()]


GOOD = {"standard": pytest.approx(0.705), "logits": pytest.approx(0.76)}


# ---- found


def copied_out(project: Path) -> list[Any]:
    """As in `cp -r multirun/day/time elsewhere`."""
    shutil.copytree(sweep_of(project), project / "elsewhere")
    return [project / "elsewhere"]


def copied_deeper(project: Path) -> list[Any]:
    shutil.copytree(sweep_of(project), project / "a" / "b" / "c" / "d" / "e")
    return [project / "a" / "b" / "c" / "d" / "e"]


def with_runs_inside(project: Path) -> list[Any]:
    other = project.parent / "usb" / "sweep"
    shutil.copytree(sweep_of(project), other)
    (project / "runs").rename(other / "runs")
    return [other]


def runs_among_its_files(project: Path) -> list[Any]:
    other = project.parent / "usb" / "sweep"
    shutil.copytree(project / "runs", other)
    shutil.copytree(sweep_of(project), other, dirs_exist_ok=True)
    shutil.rmtree(project)
    return [other]


def both_on_another_machine(project: Path) -> list[Any]:
    """Under another path, and the sweep not as deep as it was."""
    other = project.parent / "home" / "me"
    other.mkdir(parents=True)
    sweep_of(project).rename(other / "time")
    (project / "runs").rename(other / "runs")
    shutil.rmtree(project)
    return [other / "time"]


def the_whole_project(project: Path) -> list[Any]:
    project.rename(project.parent / "renamed")
    return [sweep_of(project.parent / "renamed")]


def without_its_runs(project: Path) -> list[Any]:
    """They are where they were, which runs.csv names."""
    shutil.copytree(sweep_of(project), project.parent / "far" / "away")
    return [project.parent / "far" / "away"]


def without_its_runs_before_a_report(project: Path) -> list[Any]:
    """They are where they were: sweep.json names where the command was typed."""
    other = project.parent / "far" / "away"
    other.mkdir(parents=True)
    shutil.copy(sweep_of(project) / "jobs.json", other)
    (other / "sweep.json").write_text(json.dumps({"command": ["kd"], "directory": str(project)}))
    return [other]


def runs_alone(project: Path) -> list[Any]:
    (project.parent / "archive").mkdir()
    (project / "runs").rename(project.parent / "archive" / "old runs")
    return [sweep_of(project), "--runs", project.parent / "archive" / "old runs"]


def runs_deep_in_a_given_folder(project: Path) -> list[Any]:
    (project.parent / "archive" / "x" / "y").mkdir(parents=True)
    (project / "runs").rename(project.parent / "archive" / "x" / "y" / "z")
    return [sweep_of(project), "--runs", project.parent / "archive"]


def runs_in_two_places(project: Path) -> list[Any]:
    for number, run in enumerate(sorted((project / "runs").iterdir())):
        (project.parent / f"disk{number % 2}").mkdir(exist_ok=True)
        run.rename(project.parent / f"disk{number % 2}" / run.name)
    return [
        sweep_of(project),
        "--runs",
        project.parent / "disk0",
        "--runs",
        project.parent / "disk1",
    ]


def a_linked_sweep(project: Path) -> list[Any]:
    (project.parent / "links").mkdir()
    (project.parent / "links" / "latest").symlink_to(sweep_of(project))
    return [project.parent / "links" / "latest"]


def linked_runs(project: Path) -> list[Any]:
    (project / "runs").rename(project.parent / "big disk")
    shutil.copytree(sweep_of(project), project.parent / "home" / "sweep")
    (project.parent / "home" / "runs").symlink_to(project.parent / "big disk")
    return [project.parent / "home" / "sweep"]


def half_a_copy_and_the_whole(project: Path) -> list[Any]:
    """A partial copy where the runs were planned does not hide what is finished in --runs."""
    shutil.copytree(project / "runs", project.parent / "whole")
    for run in (project / "runs").iterdir():
        (run / "result.json").unlink()
    return [sweep_of(project), "--runs", project.parent / "whole"]


def others_of_the_same_name(project: Path) -> list[Any]:
    """Beside the copy are runs of those names with another content; theirs are further up."""
    other = project / "x" / "elsewhere"
    shutil.copytree(sweep_of(project), other)
    for run in (project / "runs").iterdir():
        (other / "runs" / run.name).mkdir(parents=True)
        result = json.loads((run / "result.json").read_text())
        result |= {"id": "0" * 12, "metrics": result["metrics"] | {"test_accuracy": 0.01}}
        (other / "runs" / run.name / "result.json").write_text(json.dumps(result))
        (other / "runs" / run.name / "config.yaml").write_text(
            yaml.safe_dump(config("standard", 77))
        )
    return [other]


MOVES = [
    copied_out, copied_deeper, with_runs_inside, runs_among_its_files, both_on_another_machine,
    the_whole_project, without_its_runs, without_its_runs_before_a_report, runs_alone,
    runs_deep_in_a_given_folder, runs_in_two_places, a_linked_sweep, linked_runs,
    half_a_copy_and_the_whole, others_of_the_same_name,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("move", MOVES)
def test_the_runs_of_a_moved_sweep_are_found(
    move: Callable, project: Path, capsys: pytest.CaptureFixture
) -> None:
    words = move(project)
    code, out, err = reported(capsys, *words)
    assert (code, err) == (0, "")
    assert numbers(words[0]) == GOOD
    runs = pd.read_csv(words[0] / "runs.csv")
    assert runs["status"].tolist() == ["done"] * 4
    assert all((Path(folder) / "result.json").exists() for folder in runs["folder"])
    assert broken_links(words[0].resolve() / "index.html") == []
    assert ("are not where they were planned" in out) == (
        move not in (the_whole_project, a_linked_sweep)
    )


def test_what_is_found_is_told_and_what_was_given_in_vain(
    project: Path, capsys: pytest.CaptureFixture
) -> None:
    (project.parent / "empty").mkdir()
    (place,) = copied_out(project)
    _, out, _ = reported(capsys, place, "--runs", project.parent / "empty")
    moved = f"note: 4 of 4 runs of {place} are not where they were planned"
    assert f"{moved}; they were found in {project / 'runs'}" in out
    assert f"note: --runs {project.parent / 'empty'}: no run was taken from this folder" in out
    assert str(project / "runs") in (place / "index.html").read_text()


def test_several_moved_sweeps_make_one_report(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first = planned(tmp_path / "one")
    second = planned(tmp_path / "two", [config("feature", s) for s in (0, 1)], [0.8, 0.82])
    sweep_of(first).rename(tmp_path / "first")
    sweep_of(second).rename(tmp_path / "second")
    (tmp_path / "one" / "runs").rename(tmp_path / "store1")
    (tmp_path / "two" / "runs").rename(tmp_path / "store2")
    given = "--runs", tmp_path / "store1", "--runs", tmp_path / "store2"
    code, _, err = reported(
        capsys, tmp_path / "first", tmp_path / "second", *given, "--out", tmp_path / "out"
    )
    assert (code, err) == (0, "")
    assert numbers(tmp_path / "out") == {**GOOD, "feature": pytest.approx(0.81)}
    assert broken_links(tmp_path / "out" / "index.html") == []


def test_one_of_several_sweeps_without_its_runs_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first = planned(tmp_path / "one")
    second = planned(tmp_path / "two", [config("feature", s) for s in (0, 1)], [0.8, 0.82])
    shutil.rmtree(second / "runs")
    code, out, _ = reported(capsys, sweep_of(first), sweep_of(second), "--out", tmp_path / "out")
    assert code == 0
    assert numbers(tmp_path / "out") == GOOD
    assert f"note: 2 of 2 runs of {sweep_of(second)} were not found (feature-" in out
    assert "pass the folder that contains them with --runs DIR" in out
    lost = pd.read_csv(tmp_path / "out" / "runs.csv").iloc[4:]
    assert lost[["status", "reason"]].values.tolist() == [["planned", "the run was not found"]] * 2


def test_a_moved_baseline_is_compared_with(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It was not part of the sweep, and only its directory's name says which run it is."""
    project = planned(tmp_path / "project", SETTINGS[2:], ACCURACIES[2:])
    before = planned(tmp_path / "before", SETTINGS[:2], ACCURACIES[:2])
    jobs = json.loads((sweep_of(project) / "jobs.json").read_text())
    for job, run in zip(jobs, tables.read_plan(sweep_of(before)), strict=True):
        target = project / "runs" / Path(run["folder"]).name
        Path(run["folder"]).rename(target)
        job["baseline"] = os.path.relpath(target, sweep_of(project))
    (sweep_of(project) / "jobs.json").write_text(json.dumps(jobs))
    shutil.copytree(sweep_of(project), project / "elsewhere")
    assert reported(capsys, project / "elsewhere")[0] == 0
    summary = pd.read_csv(project / "elsewhere" / "summary.csv").set_index("setting")
    assert summary.loc["logits", ["seeds"]].tolist() == [2]
    assert numbers(project / "elsewhere") == GOOD


def test_a_copy_that_cannot_be_written_is_reported_elsewhere(
    project: Path, capsys: pytest.CaptureFixture
) -> None:
    (place,) = copied_out(project)
    before = content(place)
    assert reported(capsys, place, "--out", project.parent / "out")[0] == 0
    assert content(place) == before
    assert numbers(project.parent / "out") == GOOD
    assert broken_links(project.parent / "out" / "index.html") == []


# ---- not found


def test_without_any_run_nothing_is_written_and_the_line_says_what_to_type(
    project: Path, capsys: pytest.CaptureFixture
) -> None:
    (place,) = copied_out(project)
    shutil.rmtree(project / "runs")
    (project / "runs").mkdir()
    (project / "given").mkdir()
    before = content(place)
    for words in ([place], [place, "--out", project / "out"], [place, "--runs", project / "given"]):
        code, out, err = reported(capsys, *words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        name = f"logits-{name_of(SETTINGS[2])}"
        assert name in err or "and 1 more" in err
        assert err.startswith("kd: none of the planned runs was found (")
        assert str(project / "runs") in err
        assert "--runs DIR" in err
        assert (str(project / "given") in err) == ("--runs" in words)
    assert content(place) == before
    assert not (project / "out").exists()


def test_a_sweep_of_which_no_job_has_begun_is_one_line(
    project: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.rmtree(project / "runs")
    for path in sweep_of(project).iterdir():
        if path.name != "jobs.json":
            path.unlink()
    code, _, err = reported(capsys, sweep_of(project))
    assert (code, err.count("\n")) == (2, 1)
    assert [path.name for path in sweep_of(project).iterdir()] == ["jobs.json"]


@pytest.mark.parametrize("words", [["--runs", "nowhere"], ["--runs", "file"]])
def test_a_folder_of_runs_must_be_one(
    words: list, project: Path, capsys: pytest.CaptureFixture
) -> None:
    (project / "file").write_text("")
    code, _, err = reported(capsys, sweep_of(project), "--runs", project / words[1])
    assert (code, err) == (2, f"kd: --runs: no such directory: {project / words[1]}\n")


# ---- a good report stays


def some_deleted(project: Path) -> list[Any]:
    shutil.rmtree(next((project / "runs").glob("logits-*")))
    return [sweep_of(project)]


def results_not_copied(project: Path) -> list[Any]:
    (place,) = copied_out(project)
    next((project / "runs").glob("logits-*/result.json")).unlink()
    return [place]


def damaged(project: Path) -> list[Any]:
    next((project / "runs").glob("logits-*/result.json")).write_text("{")
    return [sweep_of(project)]


def another_plan(project: Path) -> list[Any]:
    tables.write_plan(sweep_of(project), tables.read_plan(sweep_of(project))[:2])
    return [sweep_of(project)]


def runs_without_a_plan(project: Path) -> list[Any]:
    build.write([project / "runs"], project / "runs")
    return some_deleted(project)[:0] or [project / "runs"]


def in_the_same_out(project: Path) -> list[Any]:
    build.write([sweep_of(project)], project / "out")
    return [*some_deleted(project), "--out", project / "out"]


def runs_in_the_same_out(project: Path) -> list[Any]:
    build.write([project / "runs"], project / "out")
    some_deleted(project)
    return [project / "runs", "--out", project / "out"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "lose",
    [
        some_deleted,
        results_not_copied,
        damaged,
        another_plan,
        runs_without_a_plan,
        in_the_same_out,
        runs_in_the_same_out,
    ],
)
def test_a_report_is_not_replaced_by_a_poorer_one(
    lose: Callable, project: Path, capsys: pytest.CaptureFixture
) -> None:
    words = lose(project)
    out = words[-1]
    before = content(out)
    code, printed, err = reported(capsys, *words)
    assert (code, printed, err.count("\n")) == (2, "", 1)
    assert content(out) == before
    assert f"kd: {out}: the report there counts 4 finished runs, but " in err
    assert "--runs DIR" in err
    assert "--out DIR" in err
    assert ("result.json is damaged" in err) == (lose is damaged)
    code, _, _ = reported(capsys, words[0], "--out", project / "without them")
    assert code == 0, "elsewhere it may be written"
    assert content(out) == before
    assert len(pd.read_csv(project / "without them" / "summary.csv")) in (1, 2)


@pytest.mark.slow
def test_a_report_does_not_go_into_another_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first, second = sweep_of(planned(tmp_path / "one")), sweep_of(planned(tmp_path / "two"))
    before = content(first)
    code, _, err = reported(capsys, second, "--out", first)
    assert (code, content(first)) == (2, before)
    assert f"kd: --out: {first} is the directory of another sweep" in err
    assert reported(capsys, first, second, "--out", first)[0] == 0


def test_a_project_below_superseded_is_found(project: Path, capsys: pytest.CaptureFixture) -> None:
    """kd gives this name to the folder of runs that were done again.

    Anyone may have a folder of that name.
    """
    (project.parent / "superseded").mkdir()
    moved = project.rename(project.parent / "superseded" / "p")
    (run, *_) = (moved / "runs").iterdir()
    shutil.copytree(run, run / "superseded" / "1")
    assert reported(capsys, moved / "runs", "--out", moved / "out")[0] == 0
    assert len(pd.read_csv(moved / "out" / "runs.csv")) == 4


@pytest.mark.slow
def test_a_report_on_other_sweeps_may_go_where_one_was(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first = planned(tmp_path / "one")
    second = planned(tmp_path / "two", [config("feature", s) for s in (0, 1)], [0.8, 0.82])
    assert reported(capsys, sweep_of(first), "--out", tmp_path / "out")[0] == 0
    assert reported(capsys, sweep_of(second), "--out", tmp_path / "out")[0] == 0
    assert numbers(tmp_path / "out") == {"feature": pytest.approx(0.81)}


@pytest.mark.parametrize("state", ["running", "failed", "superseded"])
def test_a_run_that_is_done_again_is_no_loss(
    state: str, project: Path, capsys: pytest.CaptureFixture
) -> None:
    """As with rerun=true: its files say what became of it."""
    run = next((project / "runs").glob("logits-*"))
    (run / "superseded" / "1").mkdir(parents=True)
    for name in ("result.json", "status.json", "config.yaml", "history.csv"):
        (run / name).rename(run / "superseded" / "1" / name)
    if state != "superseded":
        (run / "status.json").write_text(
            json.dumps({"state": state, "host": "elsewhere", "pid": 1, "reason": "x"})
        )
    assert reported(capsys, sweep_of(project))[0] == 0
    with open(sweep_of(project) / "runs.csv", newline="") as file:
        states = {Path(row["folder"]).name: row["status"] for row in csv.DictReader(file)}
    assert states[run.name] == ("planned" if state == "superseded" else state)
    assert sorted(states.values()).count("done") == 3


def test_a_report_in_mid_sweep_grows(project: Path, capsys: pytest.CaptureFixture) -> None:
    kept = project.parent / "later"
    shutil.copytree(project / "runs", kept)
    for path in sweep_of(project).iterdir():
        if path.name != "jobs.json":
            path.unlink()
    for run in (project / "runs").iterdir():
        shutil.rmtree(run)
    for number, run in enumerate(sorted(kept.iterdir()), 1):
        shutil.copytree(run, project / "runs" / run.name)
        code, out, err = reported(capsys, sweep_of(project))
        assert (code, err) == (0, "")
        states = pd.read_csv(sweep_of(project) / "runs.csv")["status"].tolist()
        assert (states.count("done"), states.count("planned")) == (number, 4 - number)
        assert "not found" not in out
    assert numbers(sweep_of(project)) == GOOD


def test_a_job_that_has_not_begun_is_not_taken_from_elsewhere(
    project: Path, capsys: pytest.CaptureFixture
) -> None:
    """Near the sweep are finished runs of the same configurations; it is to train them anew."""
    shutil.copytree(project / "runs", project / "multirun" / "runs")
    for path in sweep_of(project).iterdir():
        if path.name != "jobs.json":
            path.unlink()
    for run in (project / "runs").glob("logits-*"):
        shutil.rmtree(run)
    code, out, _ = reported(capsys, sweep_of(project))
    assert code == 0
    assert pd.read_csv(sweep_of(project) / "runs.csv")["status"].tolist() == [
        "done",
        "done",
        "planned",
        "planned",
    ]
    assert "not found" not in out
    assert "where they were planned" not in out


def test_a_sweeps_own_report_takes_its_runs_from_where_it_put_them(project: Path) -> None:
    """A finished run of that name elsewhere is no run of this sweep's, when it ends."""
    (project / "runs").rename(sweep_of(project) / "runs")
    assert tables.load_tables([sweep_of(project)]).runs["status"].tolist() == ["planned"] * 4


def test_another_run_where_one_was_planned_is_not_counted(
    project: Path, capsys: pytest.CaptureFixture
) -> None:
    run = next((project / "runs").glob("logits-*"))
    result = json.loads((run / "result.json").read_text()) | {"id": "f" * 12}
    (run / "result.json").write_text(json.dumps(result))
    assert reported(capsys, sweep_of(project), "--out", project / "out")[0] == 0
    rows = pd.read_csv(project / "out" / "runs.csv")
    row = rows[rows["folder"] == str(run)].iloc[0]
    assert row["status"] == "planned"
    assert (
        row["reason"]
        == f"the run was not found: its folder holds a different run, with id {'f' * 12}"
    )
    assert pd.read_csv(project / "out" / "summary.csv").set_index("setting")["n"].to_dict() == {
        "standard": 2,
        "logits": 1,
    }
