"""Locks, where the kernel has them and where it has none.

One process at a time, none for ever, and no file is left.
"""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import LONG, PATIENCE, Place
from conftest import SWEPT as SMALL
from hydra import compose, initialize_config_dir

from kd import cli
from kd.config.schema import run_dir
from kd.config.validate import validate_config
from kd.core import locks
from kd.runs import directory

ONE = [*SMALL, "method=standard"]
NUMBERS = ["ENOLCK", "EOPNOTSUPP", "EBADF", "ENOSYS", "EPERM", "EINVAL", "EIO"]


@pytest.fixture
def lockless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """lockless("ENOLCK"): from now on flock answers so, in this process and those it starts."""
    folder = tmp_path / "site"
    folder.mkdir()

    def forbid(name: str) -> None:
        number = getattr(errno, name)

        def flock(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        code = (
            "import fcntl, os\n"
            f"def flock(*_): raise OSError({number}, os.strerror({number}))\n"
            "fcntl.flock = flock\n"
        )
        (folder / "sitecustomize.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        monkeypatch.setattr("fcntl.flock", flock)

    locks._warn_fallback.cache_clear()
    yield forbid
    locks._warn_fallback.cache_clear()


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*") if path.name != ".hydra")


# ---- what a lock promises


@pytest.mark.parametrize("answer", [None, *NUMBERS])
def test_one_has_it_and_nothing_is_left(
    answer: str | None, tmp_path: Path, lockless: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    if answer:
        lockless(answer)
    path = tmp_path / "runs" / ".run.lock"
    path.parent.mkdir()
    other = locks._Lock(path)
    for _ in range(2):
        with locks.hold(path, "waiting"):
            assert not other.attempt()
            assert other.owner() == f" (process {os.getpid()})"
            assert path.with_name(".run.lock.lease").exists() == bool(answer)
    assert other.attempt()
    other.release()
    assert list(path.parent.iterdir()) == []
    told = [r.getMessage() for r in caplog.records if "does not support locks" in r.getMessage()]
    assert len(told) == bool(answer), "once"
    if answer:
        assert os.strerror(getattr(errno, answer)) in told[0]


COUNT = """
import sys, time
from pathlib import Path
from kd.core import locks
locks.LONGEST_PAUSE = 0.01
counter = Path("counter")
for _ in range(40):
    with locks.hold(Path(".counter.lock"), "waiting"):
        number = int(counter.read_text())
        time.sleep(0.0005)
        counter.write_text(str(number + 1))
"""


@pytest.mark.parametrize("answer", [None, "ENOLCK"])
def test_processes_that_count_together_lose_nothing(
    answer: str | None, tmp_path: Path, lockless: Callable
) -> None:
    """Each release removes the file that the others wait for."""
    if answer:
        lockless(answer)
    folder = tmp_path / "count"
    folder.mkdir()
    (folder / "counter").write_text("0")
    counting = [subprocess.Popen([sys.executable, "-c", COUNT], cwd=folder) for _ in range(4)]
    assert [process.wait(PATIENCE) for process in counting] == [0] * 4
    assert (folder / "counter").read_text() == "160"
    assert [path.name for path in folder.iterdir()] == ["counter"]


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking, the last holder of the file removes it.

    A third process makes it anew and locks that.
    """
    path = tmp_path / ".run.lock"
    lock = locks._try_flock
    third = locks._Lock(path)

    def overtaken(descriptor: int) -> bool:
        monkeypatch.setattr(locks, "_try_flock", lock)
        path.unlink()
        assert third.attempt()
        return lock(descriptor)

    monkeypatch.setattr(locks, "_try_flock", overtaken)
    mine = locks._Lock(path)
    assert not mine.attempt()
    third.release()
    assert mine.attempt()
    mine.release()


def test_a_dead_owner_is_succeeded_at_once(tmp_path: Path, lockless: Callable) -> None:
    for answer in (None, "EOPNOTSUPP"):
        if answer:
            lockless(answer)
        code = "import os, sys; from pathlib import Path; from kd.core import locks\n"
        code += "with locks.hold(Path('.run.lock'), 'waiting'): os.kill(os.getpid(), 9)"
        assert (
            subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == -9
        )
        assert (tmp_path / ".run.lock").exists()
        with locks.hold(tmp_path / ".run.lock", "waiting"):
            assert locks._Lock(tmp_path / ".run.lock").attempt() is False
        assert hidden(tmp_path) == []


def elsewhere(path: Path, lockless: Callable, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lease of a process on another machine."""
    lockless("ENOLCK")
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.4)
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.1)
    lease = path.with_name(f"{path.name}.lease")
    with locks.hold(path, "waiting"):
        lines = lease.read_text().splitlines()
    lease.write_text(
        "".join("host=node7\n" if line.startswith("host=") else f"{line}\n" for line in lines)
    )
    return lease


def test_a_silent_owner_on_another_machine_is_succeeded(
    tmp_path: Path,
    lockless: Callable,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    elsewhere(tmp_path / ".run.lock", lockless, monkeypatch)
    with locks.hold(tmp_path / ".run.lock", "student: waiting", patience=0):
        pass
    assert f"student: waiting (process {os.getpid()} on node7)" in [
        r.getMessage() for r in caplog.records
    ]
    assert hidden(tmp_path) == []


def test_an_owner_that_shows_signs_of_life_is_not(
    tmp_path: Path, lockless: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = elsewhere(tmp_path / ".run.lock", lockless, monkeypatch)
    mine = locks._Lock(tmp_path / ".run.lock")
    for number in range(20):
        os.utime(lease, (number, number))
        assert not mine.attempt()
        time.sleep(0.05)


def test_a_lease_without_an_owner_is_removed(
    tmp_path: Path, lockless: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its maker died before it could write its name."""
    lockless("ENOSYS")
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.1)
    (tmp_path / ".run.lock").touch()  # as earlier versions left it behind
    (tmp_path / ".run.lock.lease").touch()
    with locks.hold(tmp_path / ".run.lock", "waiting"):
        pass
    assert hidden(tmp_path) == []


def test_a_file_system_that_has_locks_only_at_times(
    tmp_path: Path, lockless: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock of either kind keeps out those who would take one of the other."""
    path = tmp_path / ".run.lock"
    first, second = locks._Lock(path), locks._Lock(path)
    with monkeypatch.context() as patch:
        assert first.attempt()
        patch.setattr(
            "fcntl.flock",
            lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")),
        )
        assert not second.attempt()
        first.release()
        assert second.attempt()
    assert not first.attempt()
    second.release()
    assert first.attempt()
    first.release()
    assert hidden(tmp_path) == []


def test_a_wait_is_told_once_and_can_be_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path, attempts = tmp_path / ".run.lock", iter(range(5))

    def pause() -> None:
        if next(attempts, None) is None:
            raise KeyboardInterrupt

    def wait() -> None:
        with (
            pytest.raises(KeyboardInterrupt),
            locks.hold(path, "student: waiting", patience=0, pause=pause),
        ):
            pytest.fail("two have it")

    with locks.hold(path, "waiting"):
        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join()
        assert path.exists()
    assert [r.getMessage() for r in caplog.records] == [f"student: waiting (process {os.getpid()})"]


# ---- runs


@pytest.mark.slow
@pytest.mark.parametrize("answer", [None, "ENOSYS"])
def test_two_processes_want_one_run(answer: str | None, place: Place, lockless: Callable) -> None:
    """One trains it, the other finds it; earlier versions left a lock file behind."""
    if answer:
        lockless(answer)
    words = [*ONE, "student.epochs=3"]
    (place.folder / "runs").mkdir()
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        name = run_dir(validate_config(cli.to_container(compose("config", words)))).name
    (place.folder / "runs" / f".{name}.lock").touch()
    both = [place.start(*words), place.start(*words)]
    said = [process.communicate(timeout=PATIENCE) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum(out.count("epoch 1/3") for out, _ in said) == 1
    assert sum(out.count("student: found in") for out, _ in said) == 1
    assert all(out.count("does not support locks") == bool(answer) for out, _ in said)
    assert not any(err for _, err in said)
    (folder,) = place.runs()
    assert (folder.name, directory.read_status(folder).state) == (name, "done")
    assert hidden(place.folder) == []


@pytest.mark.slow
def test_who_waits_goes_on_where_a_killed_one_stopped(place: Place, lockless: Callable) -> None:
    lockless("EBADF")
    first = place.start(*ONE, "student.epochs=100000")
    place.wait(lambda: list(place.folder.glob("runs/*/checkpoints/*.pt")))
    second = place.start(*ONE, "student.epochs=100000")
    assert second.stdout is not None
    waiting = next(line for line in second.stdout if "waiting for" in line)
    assert waiting == f"student: waiting for the process that trains it (process {first.pid})\n"
    first.kill()
    first.wait()
    assert "student: resuming after epoch" in next(
        line for line in second.stdout if "does not support locks" not in line
    )
    second.terminate()
    assert second.wait(PATIENCE) == 143
    assert hidden(place.folder) == []


@pytest.mark.slow
def test_ctrl_c_ends_a_wait_and_leaves_the_owner_alone(place: Place, lockless: Callable) -> None:
    lockless("ENOLCK")
    first = place.start(*LONG)
    place.wait(lambda: list(place.folder.glob("runs/*/history.csv")))
    second = place.start(*LONG)
    assert second.stdout is not None
    assert any("waiting for" in line for line in second.stdout)
    second.send_signal(signal.SIGINT)
    _, err = second.communicate(timeout=PATIENCE)
    assert (second.returncode, err) == (130, "kd: interrupted\n")
    assert first.poll() is None
    (folder,) = place.runs()
    assert directory.read_status(folder).state == "running"
    assert f".{folder.name}.lock.lease" in hidden(place.folder)


@pytest.mark.slow
@pytest.mark.parametrize("answer", [None, "EOPNOTSUPP"])
def test_a_sweep_and_its_cache_keep_no_lock_file(
    answer: str | None,
    place: Place,
    lockless: Callable,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if answer:
        lockless(answer)
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "own"))
    words = [
        "-m",
        *SMALL,
        "method=logits",
        "student.epochs=1",
        "seed=0,1",
        "hydra.launcher.slots=2",
    ]
    words += ["teacher.cache.fill=eager"]
    code, _, err = place.type(*words)
    assert code == 0, err
    assert len(list(place.folder.glob("runs/standard-*/result.json"))) == 1
    assert len(list(place.folder.glob("runs/logits-*/result.json"))) == 2
    assert hidden(place.folder) == []
    assert [
        path for folder in (place.folder, tmp_path / "own") for path in folder.rglob("*.lock*")
    ] == []
