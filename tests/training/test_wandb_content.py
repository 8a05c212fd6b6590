"""What the W&B dashboard shows after a run: read from the offline file, or from a server."""

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import wandb
from conftest import PATIENCE
from PIL import Image
from wandb_server import Server

import kd as package
from kd import data
from kd.core.errors import DivergedError, PrunedError
from kd.core.signals import TerminatedError
from kd.runs.directory import load_result
from kd.training import artifacts, dashboard, tracking

WORDS = [
    "data=digits",
    "teacher.scale=2",
    "teacher.epochs=1",
    "student.scale=1",
    "student.epochs=3",
    "device=cpu",
    "threads=1",
]


def cli(*words: str) -> str:
    """What a command of W&B's prints; it leaves files of its own where it is typed."""
    command = [sys.executable, "-m", "wandb", *words]
    with tempfile.TemporaryDirectory() as place:
        done = subprocess.run(
            command, cwd=place, capture_output=True, text=True, check=True, timeout=PATIENCE
        )
    return done.stdout if words[0] == "leet" else done.stdout + done.stderr


def records(folder: Path, form: str = "offline-run-*") -> dict[str, list[dict[str, Any]]]:
    """The content of the only offline W&B run of a run or sweep in `folder`, by type of record."""
    (path,) = folder.glob(f"wandb/{form}")
    out = cli("leet", "inspect", "--json", str(path.absolute()))
    by_type: dict[str, list[dict[str, Any]]] = {}
    for record in map(json.loads, out.splitlines()):
        by_type.setdefault(record["type"], []).append(record[record["type"]])
    return by_type


def summary_of(read: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for update in read["summary"]:
        merged |= update["update"]
    return merged


def sync(folders: list[Path], copies: Path) -> None:
    """`wandb sync` copies of the offline runs in these folders, one after the other.

    They are copies because it marks what it has synced.
    """
    for folder in folders:
        (path,) = folder.glob("wandb/offline-run-*")
        copy = shutil.copytree(path, copies / path.name)
        assert "ERROR" not in cli("sync", str(copy))


class Offline(NamedTuple):
    """A command's directory, the user's repository; its runs, and what their offline files hold."""

    place: Path
    commit: str
    student: Path
    teacher: Path
    read: dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Offline:
    """One command, typed in the user's repository, whose runs are kept in another."""
    place, kept = tmp_path_factory.mktemp("repository"), tmp_path_factory.mktemp("kept")
    git = ["git", "-c", "user.name=me", "-c", "user.email=me@example.org"]
    for repository in (place, kept):
        subprocess.run([*git, "init", "-q"], cwd=repository, check=True)
        message = f"of {repository.name}"
        subprocess.run(
            [*git, "commit", "-q", "--allow-empty", "-m", message], cwd=repository, check=True
        )
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=place, capture_output=True, text=True, check=True
    ).stdout
    words = [
        *WORDS,
        "method=logits",
        "tracker.mode=offline",
        "tracker.artifacts=true",
        "tracker.notes='mine, first'",
    ]
    command = [sys.executable, "-m", "kd", *words, f"paths.runs={kept}"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    subprocess.run(
        command, cwd=place, check=True, capture_output=True, timeout=PATIENCE, env=environment
    )
    (student,), (teacher,) = kept.glob("logits-*"), kept.glob("standard-*")
    return Offline(place, commit.strip(), student, teacher, records(student))


# ---- files


@pytest.mark.slow
def test_a_run_leaves_few_files(offline: Offline) -> None:
    for folder in (offline.student, offline.teacher):
        files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
        tracked = [
            path
            for path in files
            if folder / "wandb" in path.parents and path.parent.name != "artifacts"
        ]
        assert len(tracked) <= 6, tracked
        assert len([path for path in tracked if path.suffix == ".png"]) == 1
        assert len(files) <= 20, files


@pytest.mark.slow
def test_test_images_are_one_picture(offline: Offline, composed: Callable) -> None:
    (path,) = offline.student.glob("wandb/*/files/media/images/test/*.png")
    shown = np.asarray(Image.open(path).convert("RGB"))
    (logged,) = (
        row["item"] for row in offline.read["history"] if "test/samples._type" in row["item"]
    )
    assert logged["test/samples.path"] == f"media/images/test/{path.name}"
    loaded = package.load(offline.student)
    right = int(logged["test/samples.caption"].split()[0])
    assert logged["test/samples.caption"].startswith(f"{right} of 32 right")
    greens = (shown[..., 1] > shown[..., 0] + 60).any()
    assert greens == (right > 0)
    images, labels = digits(composed)
    spread = [number * len(images) // 32 for number in range(32)]
    predictions = loaded(loaded.preprocess(images[spread])).argmax(dim=1)
    assert abs(int((predictions == labels[spread]).sum()) - right) <= 1, (
        "bfloat16 may decide a close one"
    )
    gap, side = dashboard.GAP, 64
    height = side + 2 * dashboard.LINE + gap
    for number, image in enumerate(images[spread]):
        x, y = gap + number % 8 * (side + gap), gap + number // 8 * height
        wanted = image.repeat_interleave(side // len(image), 0).repeat_interleave(
            side // len(image), 1
        )
        assert np.array_equal(shown[y : y + side, x : x + side], wanted.numpy())


def digits(composed: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """The test images of data=digits, as kd has them, and their labels."""
    config = composed("method=standard")
    split = data.load(
        config.data, config.description, Path(os.environ["KD_CACHE"]), torch.device("cpu")
    ).test
    return split.images[split.index], split.labels[split.index]


class Pictures(NamedTuple):
    images: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor

    def __len__(self) -> int:
        return len(self.index)


class Images(NamedTuple):
    classes: tuple[str, ...]
    test: Pictures


@pytest.mark.parametrize(
    ("count", "total", "size"), [(1, 5, 8), (5, 5, 32), (256, 20, 65), (7, 20, 224), (3, 3, 500)]
)
def test_any_images_and_names_make_a_picture(count: int, total: int, size: int) -> None:
    names = ("漢字 é", "a\nb\x07", "x" * 500, "\u202e", "→")
    pictures = Pictures(
        torch.full((total, size, size, 3), 9, dtype=torch.uint8),
        torch.arange(total) % 5,
        torch.arange(total),
    )
    picture = dashboard.samples(Images(names, pictures), torch.eye(5)[pictures.labels], count)  # type: ignore[arg-type]
    assert picture._caption.startswith(f"{min(count, total)} of {min(count, total)} right")
    assert picture.image.width <= 8 * 150
    assert np.asarray(picture.image)[dashboard.GAP, dashboard.GAP].tolist() == [9, 9, 9]


def test_images_are_of_all_classes_where_the_files_are_sorted() -> None:
    labels = torch.arange(63) // 7
    pictures = Pictures(torch.full((63, 8, 8, 3), 9, dtype=torch.uint8), labels, torch.arange(63))
    # Right for class 0, and wrong for the others
    logits = 1.0 * (labels[:, None] == torch.tensor([0, 8, 1, 2, 3, 4, 5, 6, 7]))
    picture = dashboard.samples(Images(tuple("abcdefghi"), pictures), logits, 32)  # type: ignore[arg-type]
    right = sum(labels[number * 63 // 32] == 0 for number in range(32))
    assert picture._caption.startswith(f"{right} of 32 right"), "not 7 of 32"


# ---- charts and summary


@pytest.mark.slow
def test_charts_are_drawn_against_the_epoch(offline: Offline) -> None:
    axes = {m.get("glob_name") or m["name"]: m.get("step_metric") for m in offline.read["metric"]}
    assert axes == {"epoch": None, "train/*": "epoch", "val/*": "epoch"}
    rows = [row["item"] for row in offline.read["history"]]
    assert [row["epoch"] for row in rows if "epoch" in row] == [1, 2, 3], "each once"


def test_the_summary_has_last_and_best(offline: Offline) -> None:
    with open(offline.student / "history.csv") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    summary = summary_of(offline.read)
    assert summary["best/val/accuracy"] == max(row["val_accuracy"] for row in rows)
    assert summary["best/val/nll"] == pytest.approx(min(row["val_nll"] for row in rows))
    assert summary["best/val/teacher_kl"] == pytest.approx(
        min(row["val_teacher_kl"] for row in rows)
    )
    assert rows[int(summary["best/epoch"]) - 1]["val_accuracy"] == summary["best/val/accuracy"]
    assert summary["val/accuracy"] == rows[-1]["val_accuracy"], "a number, as W&B's sweeps need it"


def test_the_best_is_of_numbers_alone() -> None:
    nan, inf = float("nan"), float("inf")
    rows = [
        {"epoch": 1, "val_accuracy": nan, "val_nll": inf},
        {"epoch": 2, "val_accuracy": 0.5, "val_nll": inf},
    ]
    rows += [
        {"epoch": 3, "val_accuracy": 0.7, "val_nll": 2.0},
        {"epoch": 4, "val_accuracy": 0.7, "val_nll": 3.0},
    ]
    assert dashboard.best(rows) == {"best/val/accuracy": 0.7, "best/epoch": 3, "best/val/nll": 2.0}
    assert dashboard.best([{"epoch": 1, "loss": 1.0}]) == {}


@pytest.mark.slow
def test_the_users_commit_and_command_are_recorded(offline: Offline) -> None:
    environment = next(record for record in offline.read["environment"] if "program" in record)
    assert environment["git"]["commit"] == offline.commit, (
        "of where it was typed, not of where its files are"
    )
    assert offline.read["run"][0]["git"]["commit"] == offline.commit
    assert environment["program"] == "-m kd"
    assert environment["args"][: len(WORDS)] == WORDS


# ---- notes


def test_notes_begin_with_the_users_own(offline: Offline) -> None:
    assert offline.read["run"][0]["notes"] == f"mine, first\n\nfiles: {offline.student}"


@pytest.mark.slow
def test_a_sweep_is_a_group_and_its_notes_lead_to_its_report(
    kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    words = [
        "method=standard",
        "student.epochs=1",
        "seed=0,1",
        "tracker.samples=0",
        "hydra.launcher.slots=1",
    ]
    assert kd("-m", *WORDS, *words, "tracker.mode=offline", "tracker.notes=mine").code == 0
    (sweep,) = Path("multirun").absolute().glob("*/*")
    group = json.loads((sweep / "wandb.json").read_text())["group"]
    assert group.startswith("standard-"), "named after what its jobs are"
    students = sorted(Path("runs").absolute().glob("standard-*"))
    assert len(students) == 2
    for folder in students:
        read = records(folder)
        assert (read["run"][0]["run_group"], read["run"][0]["job_type"]) == (group, "student")
        assert {"method", "optimizer", "seed"} <= set(read["run"][0]["config"]["update"]), (
            "keys to filter by, not one string"
        )
        assert (
            read["run"][0]["notes"] == f"mine\n\nfiles: {folder}\n\nreport: {sweep / 'index.html'}"
        )
        environment = next(record for record in read["environment"] if "program" in record)
        assert environment["program"] == "kd", "what was typed, also of a worker process"
        assert environment["args"][:2] == ["-m", WORDS[0]]
        assert not [row for row in read["history"] if "test/samples._type" in row["item"]]
        assert not list(folder.glob("wandb/*/files/media/images")), "tracker.samples=0"
    read = records(sweep)
    assert (read["run"][0]["run_group"], read["run"][0]["job_type"]) == (group, "sweep-summary")
    assert "figures/accuracy" in json.dumps(read)
    notes = read["run"][0]["notes"]
    assert notes.startswith("mine\n\n")
    assert "standard reaches" in notes
    assert notes.endswith(f"report: {sweep / 'index.html'}")
    assert (sweep / "index.html").exists()


# ---- alerts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "title"),
    [
        (DivergedError("loss is not finite"), "Run diverged"),
        (RuntimeError("out of memory\nand more"), "Run failed"),
        (PrunedError("other trials do better"), None),
        (KeyboardInterrupt(), None),
        (TerminatedError(), None),
        (None, None),
    ],
    ids=repr,
)
def test_an_alert_is_sent_for_what_failed_alone(
    error: BaseException | None,
    title: str | None,
    composed: Callable,
    tmp_path: Path,
    server: Server,
) -> None:
    config = composed("method=standard", "tracker.mode=online", "tracker.timeout=300")
    folder = tmp_path / "run"
    folder.mkdir()

    def end() -> None:
        with tracking.open(config, folder, "student"):
            if error is not None:
                raise error

    if error is None:
        end()
    else:
        with pytest.raises(type(error)):
            end()
    wandb.teardown()
    alerts = [(alert["title"], alert["text"], alert["severity"]) for alert in server.alerts]
    first = str(error).splitlines()[0] if title else ""
    assert alerts == ([(title, f"run: {first}\n\nfiles: {folder}", "ERROR")] if title else [])


@pytest.mark.slow
def test_a_diverged_training_alerts(kd: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    said = kd(*WORDS, "method=standard", "optimizer.lr=1e12", "tracker.mode=offline")
    assert said.code == 1
    (folder,) = Path("runs").absolute().glob("standard-*")
    read = records(folder)
    (alert,) = read["alert"]
    assert (alert["title"], alert["level"]) == ("Run diverged", "ERROR")
    assert str(folder) in alert["text"]
    assert read["exit"][0]["exit_code"] == 1


# ---- artifacts


def test_weights_are_kept_with_the_offline_run(offline: Offline) -> None:
    by_name = {
        artifact["name"]: artifact
        for artifact in offline.read["artifact"]
        if artifact["type"] == "model"
    }
    assert set(by_name) == {offline.student.name, offline.teacher.name}
    for folder in (offline.student, offline.teacher):
        (entry,) = by_name[folder.name]["manifest"]["contents"]
        assert entry["path"] == "model.safetensors"
        local = Path(entry["local_path"])
        assert offline.student in local.parents, "where the run is, not in the user's home"
        assert local.read_bytes() == (folder / "student.safetensors").read_bytes()
    metadata = json.loads(by_name[offline.student.name]["metadata"])
    result = json.loads((offline.student / "result.json").read_text())
    assert metadata["test_accuracy"] == result["metrics"]["test_accuracy"]
    assert (metadata["method"], metadata["epochs"], metadata["id"]) == ("logits", 3, result["id"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "order", [("teacher", "student"), ("student", "teacher")], ids=" then ".join
)
def test_the_lineage_says_who_taught_whom(
    order: tuple[str, str], offline: Offline, server: Server, tmp_path: Path
) -> None:
    sync([getattr(offline, name) for name in order], tmp_path)
    ids = {run.job_type: id_ for id_, run in server.runs.items()}
    models = {artifact.name: artifact for artifact in server.models()}
    assert set(models) == {offline.student.name, offline.teacher.name}, (
        "the teacher's once, whoever logs it"
    )
    teacher, student = models[offline.teacher.name], models[offline.student.name]
    assert (teacher.used_by, student.used_by) == ([ids["student"]], [])
    assert [run for run in teacher.logged_by if run] == [ids["teacher"]]
    assert student.logged_by == [ids["student"]]
    assert teacher.files == {
        "model.safetensors": (offline.teacher / "student.safetensors").read_bytes()
    }
    assert student.files == {
        "model.safetensors": (offline.student / "student.safetensors").read_bytes()
    }
    assert (student.aliases, teacher.aliases) == ({"latest", "epoch-3"}, {"latest", "epoch-1"})
    assert {run.commit for run in server.runs.values()} == {offline.commit}


@pytest.mark.slow
def test_a_server_that_goes_away_does_not_hold_the_run(
    kd: Callable, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = artifacts.log

    def log_to_nobody(*given: Any) -> None:
        server.go_away()
        log(*given)

    monkeypatch.setattr(artifacts, "log", log_to_nobody)
    words = [
        *WORDS,
        "method=standard",
        "student.epochs=1",
        "tracker.artifacts=true",
        "tracker.timeout=1",
    ]
    said = kd(*words)
    assert said.code == 0
    assert (
        "some of the data did not reach the server; to upload it: wandb sync --include-online runs/"
        in said.out
    )
    assert server.models() == []
    (folder,) = Path("runs").glob("standard-*")
    result = load_result(folder)
    assert result is not None
    read = records(folder, "run-*")
    assert summary_of(read)["test/accuracy"] == result["metrics"]["test_accuracy"], (
        "written before the service is killed"
    )
    assert [row["item"]["epoch"] for row in read["history"] if "epoch" in row["item"]] == [1]


@pytest.mark.slow
def test_artifacts_are_off_by_default(kd: Callable, server: Server) -> None:
    assert kd(*WORDS, "method=logits", "student.epochs=1", "tracker.timeout=300").code == 0
    assert server.models() == []
    assert not list(Path("runs").glob("*/wandb/*/artifacts"))
    (student,) = server.of("student")
    assert student.summary["best/val/accuracy"] == student.summary["val/accuracy"]
    assert len([name for name in student.files if name.startswith("media/images/")]) == 1


@pytest.mark.slow
def test_teachers_of_every_kind_are_used(
    kd: Callable, server: Server, offline: Offline, tmp_path: Path
) -> None:
    mine = tmp_path / "my teacher, é.safetensors"
    mine.write_bytes((offline.teacher / "student.safetensors").read_bytes())
    common = [
        *WORDS,
        "method=logits",
        "student.epochs=1",
        "tracker.timeout=300",
        "tracker.artifacts=true",
    ]

    def used(*words: str) -> list[str]:
        server.artifacts.clear()
        assert kd(*common, *words).code == 0
        assert (
            len([artifact for artifact in server.models() if artifact.name.startswith("logits-")])
            == 1
        )
        assert {artifact.state for artifact in server.models()} == {"COMMITTED"}
        return sorted(artifact.name for artifact in server.models() if artifact.used_by)

    (own,) = used(f"teacher.checkpoint='{mine}'")
    assert own.startswith("my_teacher")
    assert used(f"teacher.checkpoint={offline.teacher / 'student.safetensors'}", "seed=1") == [
        offline.teacher.name
    ]
    members = used("teacher.ensemble.size=2", "seed=2")
    assert len(members) == 2
    assert sorted(path.name for path in Path("runs").glob("standard-*")) == members


@pytest.mark.slow
def test_a_failing_artifact_stops_nothing(kd: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Path) -> Path:
        raise OSError("no space left")

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(artifacts, "_linked", full)
    said = kd(
        *WORDS,
        "method=standard",
        "student.epochs=1",
        "tracker.mode=offline",
        "tracker.artifacts=true",
    )
    assert said.code == 0
    assert said.out.count("W&B: no space left; logging to W&B stops, training continues") == 1
    (folder,) = Path("runs").glob("standard-*")
    assert (folder / "result.json").exists()
    assert summary_of(records(folder))["test/accuracy"] > 0, "what was logged before is there"
