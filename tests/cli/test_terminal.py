"""Whatever becomes of the terminal, jobs are done, files written, and no traceback is shown."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import LONG, PATIENCE, Place
from conftest import SWEPT as SMALL

from kd.runs import directory
from kd.training.checkpoint import Checkpoints

ONE = [*SMALL, "method=standard", "student.epochs=1"]
NOISE = ("Traceback", "Exception ignored", "Logging error", "BrokenPipe")


def quiet(err: str) -> bool:
    return not any(word in err for word in NOISE)


# ---- characters


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("utf-8", "97.8 ± 1.7 → é…\\udcff"),
        ("ascii", "97.8 +/- 1.7 -> \\xe9...\\udcff"),
        ("latin-1", "97.8 ± 1.7 -> é...\\udcff"),
        ("cp1252", "97.8 ± 1.7 -> é…\\udcff"),
    ],
)
def test_what_an_encoding_lacks_is_spelled_out(encoding: str, text: str) -> None:
    from kd.core import streams

    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding=encoding, errors=streams.ERRORS) as stream:
        stream.write("97.8 ± 1.7 → é…\udcff")
        stream.flush()
        assert raw.getvalue() == text.encode(encoding)


@pytest.mark.slow
def test_a_sweep_in_a_terminal_that_is_not_utf8_ends_with_its_report(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    words = [
        "-m",
        *ONE,
        "seed=0,1",
        "tracker.mode=offline",
        "paths.runs='rüns→'",
        "hydra.launcher.slots=1",
    ]
    process = place.start(*words)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, quiet(err)) == (0, True), err
    assert " +/- " in out
    (sweep,) = place.folder.glob("multirun/*/*")
    assert (sweep / "index.html").exists()
    assert len(list(sweep.glob("wandb/offline-run-*"))) == 1, "the sweep's summary"
    for log in place.folder.glob("rüns→/*/kd.log"):
        assert "files    rüns→/" in log.read_text(encoding="utf-8")
    again = subprocess.run(
        [sys.executable, "-m", "kd.report", str(sweep), "--out", "röport"],
        cwd=place.folder,
        capture_output=True,
        check=False,
        timeout=PATIENCE,
    )
    assert (again.returncode, again.stderr) == (0, b"")
    assert b"report   r" in again.stdout
    wrong = subprocess.run(
        [sys.executable, "-m", "kd", "optimizer.lr=→"],
        cwd=place.folder,
        capture_output=True,
        check=False,
        timeout=PATIENCE,
    )
    assert (wrong.returncode, wrong.stderr.count(b"\n")) == (2, 1)
    assert b"optimizer.lr: " in wrong.stderr


def test_a_log_file_is_utf8_in_any_locale(tmp_path: Path) -> None:
    code = """
import logging, pathlib, sys
from kd.core import console
(path := pathlib.Path(sys.argv[1])).parent.mkdir()
with console.log_to_file(path):
    logging.getLogger().error("\\u00b1 \\udcff")
"""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    path = tmp_path / "run" / "kd.log"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert path.read_text(encoding="utf-8").endswith("ERROR ± \\udcff\n")


# ---- nobody reads


@pytest.mark.slow
def test_a_sweep_whose_reader_leaves_goes_on_to_its_report(place: Place) -> None:
    """As `kd -m ... | head -1`."""
    process = place.start("-m", *ONE, "seed=0,1", "hydra.launcher.slots=1")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("job 1 of 2")
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    assert (process.wait(PATIENCE), err) == (141, "")
    assert [directory.read_status(path).state for path in place.runs()] == ["done", "done"]
    assert list(place.folder.glob("multirun/*/*/index.html"))


PRINTS = """
import os, subprocess, sys
from kd.core import streams
@streams.protected()
def main():
    for number in range(3):
        print("±" * 1000, number)
        sys.stdout.flush()
        print("a warning", file=sys.stderr)
    open("written", "w").close()
    subprocess.run("echo of a child process; echo again >&2", shell=True, check=True)
main()
"""


@pytest.mark.parametrize("flag", ["", "-u"])
@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        (">&-", 0, ""),
        (">&- 2>&- <&-", 0, ""),
        (">/dev/null 2>/dev/full", 0, ""),
        (">/dev/full 2>/dev/full", 1, ""),
        (
            ">/dev/full",
            1,
            "kd: cannot write to standard output (No space left on device); "
            "the remaining output is lost\n",
        ),
        ("| true", 141, ""),
    ],
)
def test_work_is_done_whoever_takes_its_output(
    redirected: str, flag: str, code: int, said: str, tmp_path: Path
) -> None:
    (tmp_path / "prints.py").write_text(PRINTS)
    script = f"{sys.executable} {flag} prints.py {redirected}\nexit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (tmp_path / "written").exists()
    assert done.stderr.replace("a warning\n", "").replace("again\n", "") == said
    assert done.returncode == code


@pytest.mark.slow
@pytest.mark.parametrize("module", ["kd", "kd.report"])
def test_help_into_a_pipe_that_is_closed_or_a_disk_that_is_full(
    module: str, tmp_path: Path
) -> None:
    for redirected, code in (("| true", 141), ("> /dev/full", 1)):
        script = f"{sys.executable} -m {module} --help {redirected}\nexit ${{PIPESTATUS[0]}}"
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == code
        assert quiet(done.stderr)


# ---- the terminal is closed


def begun(place: Place, *words: str, ignoring: bool = False) -> subprocess.Popen:
    """A long training after its first epoch, with SIGHUP as a terminal or as nohup leaves it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignoring else signal.SIG_DFL)
    try:
        process = place.start(*words)
    finally:
        signal.signal(signal.SIGHUP, before)
    place.wait(lambda: list(place.folder.glob("runs/*/history.csv")))
    return process


@pytest.mark.slow
@pytest.mark.parametrize("form", ["alone", "a sweep"])
def test_a_closed_terminal_leaves_a_checkpoint_of_that_moment(form: str, place: Place) -> None:
    words = [
        "batch_size=8",
        *LONG,
        "checkpoint.every_n_epochs=null",
        "checkpoint.every_n_minutes=null",
    ]
    process = begun(place, *(["-m", "seed=0,1"] if form == "a sweep" else []), *words)
    for _ in range(2):  # the kernel and the shell send one each
        process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (129, "kd: terminated\n")
    place.wait(lambda: not place.workers(), 60)
    (folder,) = place.runs()
    assert directory.read_status(folder).state == "killed"
    found = Checkpoints(folder).load()
    assert found is not None
    assert found["epoch"] == len(pd.read_csv(folder / "history.csv"))
    if form == "alone":
        assert directory.read_status(folder).reason == "terminated by SIGHUP"
    else:
        (sweep,) = place.folder.glob("multirun/*/*")
        assert pd.read_csv(sweep / "runs.csv")["status"].tolist() == ["killed", "planned"]


@pytest.mark.slow
def test_nohup_holds(place: Place) -> None:
    process = begun(place, "-m", "seed=0,1", *LONG, ignoring=True)
    (folder,) = place.runs()
    process.send_signal(signal.SIGHUP)
    for pid in place.workers():
        os.kill(pid, signal.SIGHUP)
    epochs = len(pd.read_csv(folder / "history.csv"))
    place.wait(lambda: len(pd.read_csv(folder / "history.csv")) > epochs + 2)
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 143


def test_a_terminating_signal_is_answered_once(place: Place) -> None:
    code = """
import os, signal
from kd.core.signals import SignalHandler
try:
    with SignalHandler().installed():
        try:
            os.kill(os.getpid(), signal.SIGHUP)
        finally:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            print("cleaned up")
except KeyboardInterrupt as error:
    print(error, error.code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "cleaned up\nterminated by SIGHUP 129\n")


@pytest.mark.skipif(not Path("/proc/self/comm").exists(), reason="a name is changed there")
def test_a_process_whose_name_is_not_utf8_is_alive() -> None:
    """The kernel cuts a name off after 15 bytes, maybe in the middle of a character."""
    code = """
import os, pathlib
from kd.runs import directory as record
pathlib.Path("/proc/self/comm").write_bytes(b"a) \\xc3")
print(record.process_start_time(os.getpid()) is not None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
