"""What the tests share: ways to compose a configuration and type a command, and tiny data."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from wandb_server import Server

from kd import cli
from kd.config.schema import Config
from kd.config.validate import validate_config
from kd.core.io import write_json
from kd.report.tables import read_plan
from kd.runs import directory
from kd.runs.status import RunState, RunStatus
from kd.sweep.scheduler import LocalScheduler
from kd.training.device import Device
from kd.training.run import TrainingRun

for variable in [name for name in os.environ if name.startswith("WANDB_")]:
    del os.environ[variable]
os.environ["WANDB_MODE"] = "disabled"  # tests of the tracker say otherwise
# A shell's background job ignores it; its children would too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# benchmarks/gpu.sh runs the tests of the training path on cuda.
DEVICE = os.environ.get("KD_TEST_DEVICE", "cpu")
FP32, BF16 = (Device(torch.device(DEVICE), dtype) for dtype in (torch.float32, torch.bfloat16))
ON_CPU = DEVICE == "cpu"
if not ON_CPU:  # the tests compare bits, and float32 with float32
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False

SWEPT = [
    "data=digits",
    "student.epochs=2",
    "teacher.epochs=1",
    "student.scale=2",
    "teacher.scale=2",
]
SWEPT += [f"device={DEVICE}"]
SWEPT += ["threads=1", "tracker.mode=disabled"]
LONG = [*SWEPT, "student.epochs=100000", "method=standard"]
# Seconds until what a test waits for is taken to hang; no test asks how fast a machine is.
PATIENCE = 600
SMALL = [
    "data=digits",
    "teacher.scale=2",
    "student.scale=1",
    "teacher.epochs=1",
    "student.epochs=1",
]
SMALL += [f"device={DEVICE}"]


class Said(NamedTuple):
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def _one_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.set_num_threads(1)
    os.environ["KD_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def composed(tmp_path: Path) -> Callable[..., Config]:
    """composed("method=logits", ...): the checked configuration of a small run on digits.

    Its runs are kept in tmp_path.
    """

    def compose_(*overrides: str, small: bool = True) -> Config:
        words = [*(SMALL if small else []), f"paths.runs={tmp_path / 'runs'}", *overrides]
        with initialize_config_dir(str(cli.CONF), version_base="1.3"):
            return validate_config(cli.to_container(compose("config", words)))

    return compose_


@pytest.fixture
def kd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> Callable[..., Said]:
    """kd("method=logits", ...): what `python -m kd` with these words says.

    It is run in an empty directory.
    """
    place = tmp_path / "cwd"
    place.mkdir()
    monkeypatch.chdir(place)

    def run(*words: str) -> Said:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["kd", *words])
        try:
            cli.main()
            code: int | str | None = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            # As when a process ends: W&B's service writes only after a run's `finish` has returned.
            if "wandb" in sys.modules:
                sys.modules["wandb"].teardown()
        said = capfd.readouterr()
        return Said(code if isinstance(code, int) else 0 if code is None else 1, said.out, said.err)

    return run


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A W&B server of the test's own, with a key for it in the environment."""
    if "wandb" in sys.modules:  # it may have read the environment of an earlier test
        sys.modules["wandb"].teardown()
    made = Server()
    made.begin()
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", made.url)
    yield made
    made.end()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder of two classes, 12 training and 4 test images each, of odd sizes."""
    root = tmp_path / "images"
    for split, count in (("train", 12), ("test", 4)):
        for number, name in enumerate(("dark", "light é")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                shade = 40 + 150 * number + i
                Image.new("RGB", (20 + i, 18), (shade, shade, 90)).save(
                    root / split / name / f"{i:02d}.png"
                )
    return root


def shared_cifar() -> Path:
    """The CIFAR-10 image folder that the project's developers have beside the repository.

    Without it, the test is skipped.
    """
    root = Path(__file__).parents[2] / "shared" / "data" / "cifar10-images"
    if not (root / "train").is_dir():
        pytest.skip(f"no CIFAR-10 image folder at {root}")
    return root


def run(config: Config, **options: Any) -> dict[str, Any]:
    """Execute one run in this process and return its result."""
    return TrainingRun(config, **options).execute()


class Place:
    """A directory in which sweeps are typed."""

    def __init__(self, folder: Path):
        self.folder, self.started = folder, list[subprocess.Popen]()
        folder.mkdir()

    def start(self, *words: str, module: str = "kd") -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        process = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            cwd=self.folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.started.append(process)
        return process

    def type(self, *words: str) -> tuple[int, str, str]:
        process = self.start(*words)
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out, err

    def runs(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob("runs/*/status.json"))

    def wait(self, for_: Callable[[], object], seconds: float = PATIENCE) -> None:
        deadline = time.monotonic() + seconds
        while not for_():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.05)

    def workers(self) -> list[int]:
        """Processes that work in this directory."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                name = (path / "comm").read_text().strip()
                if (path / "cwd").readlink() == self.folder and name == "kd-worker":
                    found.append(int(path.name))
            except OSError:
                continue
        return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path / "place")
    yield made
    for process in made.started:
        process.kill()
        process.communicate()


def is_one_line(said: Any, start: str) -> bool:
    text = said.err.removesuffix("\n")
    return said.code == 2 and text.startswith(f"kd: {start}") and text.isprintable()


class Trap:
    """Unpickled, it makes a folder."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("sprung",)


def result_of(accuracy: float, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The least that a result.json must hold, as of a run with this accuracy."""
    return {
        "id": "0" * 12,
        "student": "cnn-1",
        "teacher": None,
        "samples": {"train": 1000},
        "config": config,
        "metrics": dict.fromkeys(
            ("test_accuracy", "val_accuracy", "test_nll", "val_nll", "val_ece"), accuracy
        ),
        "size": {"params": 1, "macs": 1, "method_params": 0},
        "time": {"train_seconds": 1.0, "images_per_second": 1.0},
    }


@pytest.fixture
def ends() -> dict[int, str]:
    """How those jobs of `launched` end that are not done, by the order in which they are started.

    failed, killed, or stop (Ctrl-C) or kill (of the whole process) in the middle of them.
    """
    return {}


@pytest.fixture
def launched(ends: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The jobs that sweeps start, in order.

    They are not trained: each is done at once, with an accuracy of its own.
    """
    jobs: list[dict[str, Any]] = []

    def run(scheduler: LocalScheduler) -> None:
        while (unit := scheduler.source()) is not None:
            for job, _ in unit:
                folder, outcome = Path(job["folder"]), RunStatus(RunState.DONE)
                if not directory.load_result(folder):
                    end = ends.pop(len(jobs), "done")
                    jobs.append(job)
                    folder.mkdir(parents=True, exist_ok=True)
                    if end == "kill":
                        raise KeyboardInterrupt
                    if end == "done":
                        write_json(
                            folder / "result.json", result_of(len(jobs) / 100, job["config"])
                        )
                    else:
                        outcome = RunStatus(
                            RunState.FAILED if end == "failed" else "killed", "of a test"
                        )
                        directory.write_status(folder, *outcome)
                scheduler.on_job_end(job, outcome)
                if outcome.state == "killed" and end == "stop":
                    raise KeyboardInterrupt

    monkeypatch.setattr(LocalScheduler, "run", run)
    monkeypatch.setattr("kd.report.figures.draw", lambda *_, **__: ([], []))
    return jobs


@pytest.fixture
def planned(
    kd: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, Any]]]:
    """planned("-m", ...): the jobs of a sweep of toys, run in this process and without training."""
    ran: list[str] = []
    monkeypatch.setattr(TrainingRun, "execute", lambda self: ran.append(self.config.identity()))
    monkeypatch.setattr("kd.training.finalize.summary_lines", lambda *_: [])
    monkeypatch.setattr("kd.sweep.scheduler._write_report", lambda *_, **__: "")

    def run(*words: str) -> list[dict[str, Any]]:
        said = kd(
            "data=digits", "student.scale=1", "teacher.scale=1", "device=cpu", "threads=1", *words
        )
        assert said.code == 0, said.err
        (plan,) = Path().glob("**/jobs.json")
        jobs = read_plan(plan.parent)
        assert ran == [job["id"] for job in jobs], (
            "every planned job is run, in this process and in order"
        )
        return jobs

    return run


def write(path: str, text: str | bytes) -> None:
    """A file of the user's, below the current directory."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(text if isinstance(text, bytes) else text.encode())
