"""Words on the command line are never run as code."""

import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Trap, is_one_line

CANARY = (
    "import pathlib\npathlib.Path('ran').touch()\n"
    "class Run:\n    def __init__(self, *a, **k): pass\n"
)
CODE = [
    "hydra.sweeper._target_=canary.Run",
    "hydra.launcher._target_=canary.Run",
    "hydra.sweeper._target_=os.system,canary.Run",
    "hydra.launcher._target_=hydra.utils.instantiate",
    "+hydra.callbacks.x._target_=canary.Run",
    "++hydra.callbacks.x._target_='canary.Run'",
    "+hydra.callbacks={x: {_target_: os.system, command: touch ran}}",
    '+hydra.callbacks={x: {_target_: "canary.Run"}}',
    "+hydra.callbacks.x={_target_: hydra.utils.get_object, path: canary.Run}",
    "+hydra.callbacks.x={_target_: kd.runs.directory.subprocess.Popen, args: [touch, ran]}",
    (
        "+hydra.callbacks.x={_target_: hydra.experimental.callbacks.LogJobReturnCallback, "
        "y: [{_target_: canary.Run}]}"
    ),
    "+hydra={callbacks: {x: {_target_: canary.Run}}}",
    "hydra.sweeper._target_=${oc.env:EVIL}",
    "+hydra.callbacks.x='${oc.decode:${oc.env:EVILS}}'",
    "+hydra.callbacks='${oc.decode:${oc.env:EVILS}}'",
    "hydra.launcher='${oc.create:{_target_: canary.Run}}'",
    "+hydra.sweeper.params={hydra.callbacks.x._target_: canary.Run}",
    "+hydra.sweeper.params={+hydra.callbacks: '{x: {_target_: canary.Run}}'}",
    "hydra.job_logging.handlers.terminal.class=canary.Run",
    "hydra.job_logging.handlers.terminal.class=logging.os.system",
    "+hydra.job_logging.handlers.x={\\(\\): canary.Run}",
    "+hydra.hydra_logging.formatters.x={class: canary.Run}",
    "+hydra.job_logging.handlers.x={class: logging.StreamHandler, stream: ext://canary.Run}",
    "hydra.searchpath=[pkg://canary]",
    "--experimental-rerun=canary.pickle",
    "--exp=canary.pickle",
]


@pytest.mark.parametrize("sweep", [False, True], ids=["run", "sweep"])
@pytest.mark.parametrize("word", CODE)
def test_words_are_never_run(
    word: str, sweep: bool, kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("canary.py").write_text(CANARY)
    Path("canary.pickle").write_bytes(pickle.dumps(Trap()))
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.setenv("EVIL", "canary.Run")
    monkeypatch.setenv("EVILS", "{_target_: canary.Run}")
    before = sorted(Path().iterdir())
    try:
        said = kd("data=digits", "method=standard", word, *(["-m"] if sweep else []))
    finally:
        sys.modules.pop("canary", None)
    assert is_one_line(said, "--experimental-rerun: " if word.startswith("--") else "hydra."), (
        said.err
    )
    assert "code" in said.err
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    "word",
    [
        "student._target_=os.system",
        "+student._target_=os.system",
        "+student={_target_: os.system}",
        "method._target_=os.system",
        "++method._target_=os.system",
        "data._target_=os.system",
        "+optimizer._target_=os.system",
        "+teacher.schedule={_target_: os.system}",
    ],
)
def test_a_target_elsewhere_is_no_key(word: str, kd: Callable) -> None:
    node = word.strip("+").split("=")[0].removesuffix("._target_")
    assert is_one_line(kd("data=digits", word), f"{node}._target_: unknown key; valid: ")
    assert is_one_line(
        kd("data=digits", "+method={_target_: os.system}"),
        "method: {'_target_': 'os.system'} is not a ",
    )


@pytest.mark.parametrize(
    "word",
    [
        "hydra.job_logging.root.level=DEBUG",
        "hydra/job_logging=disabled",
        "hydra/launcher=submitit_local",
        "hydra/sweeper=optuna",
        "hydra.launcher.slots=2",
        "hydra.sweeper._target_=hydra_plugins._kd_sweeper.GridSweeper",
        "+hydra.callbacks.x._target_=hydra.experimental.callbacks.LogJobReturnCallback",
        "hydra.job_logging.handlers.terminal.class=logging.StreamHandler",
        "hydra.job_logging.handlers.file.filename=${hydra.runtime.output_dir}/other.log",
        "hydra.sweep.dir=${paths.runs}",
        "+hydra.sweeper.params={method: 'standard,logits', seed: '1,2'}",
        "+hydra.job.env_set={A: '${seed}'}",
    ],
)
def test_other_words_for_hydra_go_through(word: str, kd: Callable) -> None:
    said = kd("data=digits", word, "--cfg", "job")
    assert (said.code, said.err) == (0, "")
