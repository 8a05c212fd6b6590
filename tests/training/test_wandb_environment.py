"""W&B's variables and the user's home do what users of W&B expect.

A resumed sweep stays one group.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from conftest import PATIENCE, SMALL, is_one_line
from wandb_server import Server

from kd.config import wandb_env
from kd.runs import directory
from kd.training import wandb_run

WORDS = [*SMALL, "threads=1", "tracker.timeout=300"]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No W&B variable and no key: the home, which is empty."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.fixture(autouse=True)
def _new_session() -> Iterator[None]:
    """W&B reads the environment once a process."""
    yield
    wandb.teardown()


def segments() -> list[Path]:
    return sorted(Path.cwd().glob("**/wandb/*run-*"))


def own_notes(run: Any) -> str:
    """The user's notes, which stand before where the run's files are."""
    return str(run.notes).partition("\n\nfiles: ")[0]


# ---- variables


@pytest.mark.slow
def test_the_variables_name_project_tags_and_the_commands_own_run(
    server: Server, kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "PROJECT": "thesis",
        "ENTITY": "lab",
        "TAGS": "a, b",
        "NAME": "my run",
        "NOTES": "why",
        "RUN_GROUP": "g",
        "JOB_TYPE": "ablation",
        "RESUME": "must",
        "RUN_ID": "mine",
    }
    for name, value in given.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert kd(*WORDS, "method=logits").code == 0
    (teacher,), run = server.of("teacher"), server.runs["mine"]
    assert (run.project, run.entity, run.group, own_notes(run)) == ("thesis", "lab", "g", "why")
    assert (run.display_name, run.job_type, run.tags) == (
        "my run",
        "ablation",
        ["a", "b", "logits"],
    )
    assert (teacher.project, teacher.entity, teacher.group, own_notes(teacher)) == (
        "thesis",
        "lab",
        "g",
        "why",
    )
    assert teacher.tags == ["a", "b", "standard"]
    assert teacher.display_name is not None
    assert teacher.display_name.startswith("standard-cnn-2-")
    assert len(server.runs) == 2


def test_an_explicit_key_wins_over_its_variable(
    server: Server, kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PROJECT", "ENTITY", "TAGS", "NOTES", "RUN_GROUP"):
        monkeypatch.setenv(f"WANDB_{name}", "variable")
    keys = [
        "tracker.project=p",
        "tracker.entity=e",
        "tracker.tags=[]",
        "tracker.notes=n",
        "tracker.group=g",
    ]
    assert kd(*WORDS, "method=standard", *keys).code == 0
    ((_, run),) = server.runs.items()
    assert (run.project, run.entity, run.tags, own_notes(run), run.group) == (
        "p",
        "e",
        ["standard"],
        "n",
        "g",
    )


@pytest.mark.parametrize(
    ("variables", "key", "expected"),
    [
        ({"WANDB_MODE": "offline"}, "auto", "offline"),
        ({"WANDB_MODE": "dryrun"}, "auto", "offline"),
        ({"WANDB_MODE": "run"}, "auto", "online"),
        ({"WANDB_MODE": "shared"}, "auto", "online"),
        ({"WANDB_MODE": "disabled"}, "auto", None),
        ({"WANDB_MODE": ""}, "auto", "online"),
        ({"WANDB_DISABLED": "true"}, "auto", None),
        ({"WANDB_DISABLED": "1", "WANDB_MODE": "online"}, "auto", None),
        ({"WANDB_DISABLED": "false"}, "auto", "online"),
        ({"WANDB_DISABLED": "true"}, "offline", "offline"),
        ({"WANDB_MODE": "bogus"}, "offline", "offline"),
    ],
)
def test_modes(
    variables: dict[str, str],
    key: str,
    expected: str | None,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tracker_settings: Callable,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with wandb_run.started(
        tracker_settings(mode=key), tmp_path / "run", wandb_run.RunSettings("x", "student")
    ) as run:
        found = None if run is None else "offline" if run.offline else "online"
    assert found == expected
    assert bool(server.runs) == (expected == "online")


@pytest.fixture
def tracker_settings() -> Callable[..., Any]:
    from kd.core.execution import TrackerSettings

    given = {
        "mode": "auto",
        "project": None,
        "entity": None,
        "group": None,
        "tags": None,
        "notes": None,
    }
    return lambda **more: TrackerSettings(
        **{**given, "samples": 0, "artifacts": False, "timeout": 300, **more}
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        (
            "WANDB_MODE",
            "maybe",
            "WANDB_MODE: 'maybe' is not known; allowed: online, run, shared, offline, dryrun, dis",
        ),
        ("WANDB_DISABLED", "perhaps", "WANDB_DISABLED: should be true or false, got 'perhaps'"),
        ("WANDB_SILENT", "2", "WANDB_SILENT: should be true or false, got '2'"),
        ("WANDB_RUN_ID", "a/b", "WANDB_RUN_ID: should have none of :;,#?/'"),
        ("WANDB_RUN_ID", "x" * 250, "WANDB_RUN_ID: should have 1 to 128 characters for W&B"),
        ("WANDB_JOB_TYPE", "x" * 65, "WANDB_JOB_TYPE: should have 1 to 64 characters for W&B"),
        (
            "WANDB_BASE_URL",
            "wandb.mine.org",
            "WANDB_BASE_URL: 'wandb.mine.org' is not a web address",
        ),
        (
            "WANDB_PROJECT",
            "x" * 10_001,
            "WANDB_PROJECT: String should have at most 10000 characters, got 'xxx",
        ),
        ("WANDB_CONSOLE", "loud", "WANDB_CONSOLE: 'loud' is not known; allowed: auto, off"),
    ],
)
@pytest.mark.parametrize("multirun", [[], ["-m"]])
def test_an_unknown_word_is_one_line(
    name: str,
    value: str,
    line: str,
    multirun: list[str],
    bare: Path,
    kd: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(name, value)
    assert is_one_line(kd(*multirun, *WORDS, "method=standard"), line)
    assert not Path("runs").exists()


def test_silent_and_dir(
    bare: Path, kd: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    said = kd(*WORDS, "method=standard")
    assert said.code == 0
    assert "W&B" not in said.out
    assert len(list((tmp_path / "elsewhere" / "wandb").glob("offline-run-*"))) == 1
    assert segments() == []


def test_a_directory_that_cannot_be_made_is_replaced(
    bare: Path, kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DIR", "/dev/null/x")
    said = kd(*WORDS, "method=standard")
    assert said.code == 0
    assert said.out.count("cannot write to WANDB_DIR=/dev/null/x") == 1
    assert len(segments()) == 1


def test_a_variable_that_stops_wandb_is_ignored(
    bare: Path, kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_START_METHOD", "forkserver")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "soon")
    said = kd(*WORDS, "method=standard")
    assert said.code == 0
    assert said.out.count("WANDB_INIT_TIMEOUT is ignored") == 1
    assert len(segments()) == 1
    assert os.environ["WANDB_INIT_TIMEOUT"] == "soon"


@pytest.mark.slow
def test_the_environment_is_left_as_it_was(
    server: Server, kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in wandb_run.HIDDEN:
        monkeypatch.setenv(name, "offline" if name == "WANDB_MODE" else "x")
    monkeypatch.delenv("WANDB_DIR")
    before = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    assert kd(*WORDS, "method=standard", "tracker.mode=online").code == 0
    assert {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"} == before


# ---- the key, and the home


def test_the_key_is_looked_up_as_wandb_does(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mode(wanted: wandb_env.Mode | None = None) -> str:
        wandb.teardown()
        with wandb_run._environment():
            return wandb_run._with_key(wanted)

    key = "x" * 40
    assert mode() == mode("online") == "offline", "W&B would prompt"
    (bare / ".netrc").write_text(f"machine elsewhere.org login user password {key}\n")
    assert mode() == "offline"
    (bare / ".netrc").write_text(f"machine api.wandb.ai login user password {key}\n")
    assert mode() == mode("online") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "http://mine.example")
    assert mode() == "offline"
    (bare / "own").write_text(f"machine mine.example login user password {key}\n")
    monkeypatch.setenv("NETRC", str(bare / "own"))
    assert mode() == "online"
    monkeypatch.delenv("NETRC")
    monkeypatch.setenv("WANDB_API_KEY", key)
    assert mode() == "online"
    (bare / ".config" / "wandb").mkdir(parents=True, exist_ok=True)
    (bare / ".config" / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    assert mode() == "offline", "as `wandb offline` writes it"


@pytest.mark.slow
@pytest.mark.parametrize(
    "content", ["machine", "\x00\x01", 'machine api.wandb.ai login "', "machine api.wandb.ai\n"]
)
def test_a_malformed_netrc_ends_nothing(
    content: str, bare: Path, kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb reads a key from one of them, so the server is one that refuses connections."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    (bare / ".netrc").write_text(content.replace("api.wandb.ai", "127.0.0.1"))
    said = kd(*SMALL, "threads=1", "tracker.timeout=2", "method=standard")
    assert said.code == 0
    assert len(said.out.splitlines()) < 15
    assert len(segments()) == 1


# the user's own program; as root, without the power to read everything
AS_USER = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-all"]
NO_HOME = "import os, pwd, sys\ndef unknown(_): raise KeyError(_)\npwd.getpwuid = unknown\n"


@pytest.mark.slow
@pytest.mark.parametrize("home", ["unreadable", "read-only", "missing", "a file", "unset"])
def test_any_home_will_do(home: str, bare: Path, kd: Callable, tmp_path: Path) -> None:
    place, environment = Path.cwd(), {**os.environ}
    code = "from kd.cli import main\nmain()\n"
    if home in ("unreadable", "read-only"):
        if os.geteuid() == 0:
            os.chown(bare, 12345, 12345)
            probe = subprocess.run([*AS_USER, "ls", str(bare)], capture_output=True, check=False)
            if not Path("/usr/bin/setpriv").exists() or b"invalid" in probe.stderr:
                pytest.skip("cannot become less than root here")
        bare.chmod(0o700 if home == "unreadable" and os.geteuid() == 0 else 0o555)
    elif home == "missing":
        environment["HOME"] = "/dev/null/home"
    elif home == "a file":
        (tmp_path / "file").touch()
        environment["HOME"] = str(tmp_path / "file")
    else:
        del environment["HOME"]
        code = NO_HOME + code
    sweep = ["-m", "seed=0,1", "hydra.sweep.dir=sweep"] if home in ("unreadable", "unset") else []
    command = [sys.executable, "-c", code, *WORDS, "method=logits", *sweep]
    prefix = AS_USER if os.geteuid() == 0 and home in ("unreadable", "read-only") else []
    done = subprocess.run(
        [*prefix, *command],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    bare.chmod(0o700)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert len(said.splitlines()) < 60, said
    assert "INFO " not in said, "W&B's service logs to the terminal where it has no file"
    offline = [path.parent for path in place.glob("**/wandb/offline-run-*/run-*.wandb")]
    assert len(offline) == (4 if sweep else 2), (
        "a teacher, two students and the summary; or a teacher and a student"
    )
    assert all((path / "files").is_dir() for path in offline)
    tables = [*place.glob("sweep/wandb/offline-run-*/files/media/table/*")]
    assert len(tables) == (2 if sweep else 0), "runs and summary"


# ---- groups


@pytest.mark.slow
def test_a_resumed_sweep_stays_one_group(
    server: Server, kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        *WORDS,
        "method=standard,label_smoothing",
        "seed=0,1",
        "student.epochs=2",
        "hydra.launcher.slots=1",
    ]
    assert kd("-m", *words, "hydra.sweep.dir=first").code == 0
    (group,) = {run.group for run in server.runs.values()}
    assert group is not None
    assert group.startswith("standard-label_smoothing-")
    for path in list(Path("runs").glob("label_smoothing-*/result.json")):
        path.unlink()
    server.runs.clear()
    assert kd("-m", *words, "hydra.sweep.dir=second").code == 0
    assert {run.group for run in server.runs.values()} == {group}
    assert len(server.runs) == 3, "two again, and the summary"
    server.runs.clear()
    assert kd("-m", *words, "hydra.sweep.dir=third", "method=standard,nkd").code != 2
    assert group not in {run.group for run in server.runs.values()}, "another sweep, another group"


@pytest.mark.slow
def test_a_search_is_a_group_also_when_it_goes_on(server: Server, kd: Callable) -> None:
    words = [
        *WORDS,
        "method=standard",
        "hydra/sweeper=optuna",
        "optimizer.lr=interval(0.01,0.1)",
        "student.epochs=1",
    ]
    for trials in (1, 2):
        assert (
            kd("-m", *words, "hydra.launcher.slots=1", f"hydra.sweeper.n_trials={trials}").code == 0
        )
    (group,) = {run.group for run in server.runs.values()}
    (sweep, *_) = Path().glob("multirun/*/*/study.json")
    assert group == f"search-{json.loads(sweep.read_text())['study']}"
    assert len(server.of("student")) == 2


@pytest.mark.slow
def test_a_run_of_a_sweep_that_goes_on_alone_stays_in_its_group(
    server: Server, kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = directory.RunDirectory.append_epoch

    def stopped(self: directory.RunDirectory, row: dict[str, Any]) -> None:
        epoch(self, row)
        raise KeyboardInterrupt

    words = [*WORDS, "method=standard", "student.epochs=2"]
    with monkeypatch.context() as patch:
        patch.setattr(directory.RunDirectory, "append_epoch", stopped)
        assert kd("-m", *words, "seed=0,1", "hydra/launcher=basic").code == 130
    ((name, first),) = server.runs.items()
    assert first.group is not None
    group = first.group
    assert kd(*words, "seed=0").code == 0
    assert list(server.runs) == [name]
    assert server.runs[name].group == group
    assert server.runs[name].epochs() == [1, 2]
