"""What Hydra's users type by habit works, or one line says why not and what to type."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import is_one_line, write

from hydra_plugins._kd_optuna import search_integers
from kd.config.overrides import parse, split_arguments
from kd.config.validate import takes_integers
from kd.core.errors import UserError
from kd.training.run import TrainingRun

TOY = [
    "data=digits",
    "student.epochs=1",
    "teacher.epochs=1",
    "student.scale=1",
    "teacher.scale=1",
    "device=cpu",
]
TOY += ["threads=1", "tracker.mode=disabled"]
Planned = Callable[..., list[dict[str, Any]]]


def nothing_made() -> bool:
    return not [path for path in Path().iterdir() if path.name != "own"]


# ---- paths are relative to where the command is typed


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", "basic"])
def test_a_job_in_its_own_directory_uses_the_usual_paths(launcher: str, kd: Callable) -> None:
    """Two students and one teacher, whose weights come from a run that was typed before.

    The report finds them all.
    """
    write("own/method/logits.yaml", "name: logits\nalpha: 0.5\nT: 9.0\n")
    slots = ["hydra.launcher.slots=1"] if launcher == "local" else []
    words = [
        "-m",
        "--config-dir",
        "own",
        *TOY,
        f"hydra/launcher={launcher}",
        *slots,
        "hydra.job.chdir=true",
    ]
    said = kd(*words, "method=logits", "seed=0,1", "paths.cache=cache")
    assert said.code == 0, said.err
    results = sorted(path.parent for path in Path().glob("**/result.json"))
    assert [path.parent for path in results] == [Path("runs")] * 3, (
        "two students and one teacher, none nested"
    )
    students = [path for path in results if path.name.startswith("logits-")]
    assert {
        json.loads((path / "result.json").read_text())["config"]["method"]["T"] for path in students
    } == {9.0}
    assert Path("cache").is_dir()
    (sweep,) = Path().glob("multirun/*/*")
    assert pd.read_csv(sweep / "runs.csv")["status"].tolist() == ["done", "done"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["hydra.job.chdir=true"], ["hydra.job.chdir=true", "hydra.run.dir=out"]]
)
def test_a_single_run_in_its_own_directory(words: list[str], kd: Callable) -> None:
    assert kd(*TOY, "method=standard", *words).code == 0
    (run,) = [path.parent for path in Path().glob("**/result.json")]
    assert run.parent == Path("runs")
    weights = f"teacher.checkpoint={run}/student.safetensors"
    said = kd(*TOY, "method=logits", "model@teacher=cnn4", weights, *words)
    assert said.code == 0, said.err
    assert len(list(Path("runs").glob("*/result.json"))) == 2
    assert len(list(Path().glob("**/result.json"))) == 2


@pytest.mark.slow
def test_a_multirun_does_not_use_the_directory_of_single_runs(kd: Callable) -> None:
    assert (
        kd("-m", *TOY, "method=standard", "hydra.run.dir=out", "hydra.launcher.slots=1").code == 0
    )
    assert not Path("out").exists()
    (run,) = Path().glob("runs/standard-*")
    assert (run / ".hydra" / "overrides.yaml").exists()
    assert (run / "kd.log").exists()


# ---- a launcher or a sweeper needs a multirun


@pytest.mark.parametrize(
    "word",
    [
        "hydra/launcher=basic",
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.slots=2",
        "++hydra.launcher.jobs_per_worker=2",
        "hydra/sweeper=optuna",
        "hydra.sweeper.max_batch_size=2",
        "+hydra.sweeper.params.seed=1",
    ],
)
def test_a_launcher_or_a_sweeper_without_a_multirun(word: str, kd: Callable) -> None:
    key = word.lstrip("+").partition("=")[0]
    assert is_one_line(kd(*TOY, "method=standard", word), f"{key}: only used in a multirun; add -m")
    assert nothing_made()


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("hydra: {sweeper: {params: {seed: '0,1'}}}", "hydra.sweeper.params"),
        ("hydra: {launcher: {slots: 3}}", "hydra.launcher.slots"),
        ("defaults: [override /hydra/launcher: submitit_slurm]", "hydra/launcher"),
    ],
)
def test_an_experiment_that_needs_a_multirun(text: str, key: str, kd: Callable) -> None:
    write("own/experiment/mine.yaml", f"# @package _global_\n{text}\n")
    words = ["--config-dir=own", *TOY, "method=standard", "+experiment=mine"]
    assert is_one_line(
        kd(*words), f"{key}: set by an experiment, but only used in a multirun; add -m"
    )
    assert nothing_made()


def test_a_single_run_of_an_experiment_that_is_a_sweep(
    kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    monkeypatch.setattr(TrainingRun, "execute", lambda self: ran.append(self.config.seed))
    monkeypatch.setattr("kd.training.finalize.summary_lines", lambda *_: [])
    assert kd(*TOY, "+experiment=compare", "hydra.mode=RUN", "seed=4").code == 0
    assert ran == [4]


def test_hydras_basic_sweeper_is_the_grid(planned: Planned) -> None:
    jobs = planned(
        "-m", "hydra/sweeper=basic", "hydra/launcher=basic", "method=standard", "seed=0,1"
    )
    assert [job["config"]["seed"] for job in jobs] == [0, 1]


# ---- a user's own files


@pytest.mark.parametrize(
    "where", ["--config-dir=own", "hydra.searchpath=[own]", "hydra.searchpath=[file://own]"]
)
def test_a_users_file_wins_over_kds_of_the_same_name(where: str, kd: Callable) -> None:
    write("own/method/logits.yaml", "name: logits\nalpha: 0.3\nT: 9.0\n")
    write("own/model/cnn4.yaml", "name: cnn\nscale: 5\nactivation: elu\ndropout: 0.0\n")
    write("own/optimizer/sgd.yaml", "defaults: [adamw]\nlr: 0.5\n")
    write("own/experiment/original.yaml", "# @package _global_\nseed: 77\n")
    write("own/config.yaml", "another: application\n")
    said = kd(
        where, "method=logits", "data=digits", "+experiment=original", "--cfg", "job", "--resolve"
    )
    assert said.code == 0, said.err
    assert "\n  T: 9.0\n" in said.out
    assert "\n  scale: 5\n" in said.out
    assert "\n  lr: 0.5\n" in said.out
    assert "\nseed: 77\n" in said.out
    assert "another" not in said.out, "the primary configuration is kd's"
    assert "\n  T: 4.0\n" in kd("method=logits", "--cfg", "job").out, "and kd's own without them"


BROKEN = {
    "a bracket": (
        "name: logits\nT: [4.0\nbeta: 3\n",
        "line 3, column 5: expected ',' or ']', but got ':'",
    ),
    "a tab": (
        "name: logits\n\talpha: 0.3\n",
        "line 2, column 1: found character '\\t' that cannot start any token",
    ),
    "a key twice": ("name: logits\nT: 3\nT: 4\n", "line 3, column 1: found duplicate key T"),
    "a list": ("# mine\n- logits\n", "line 2, column 1: expected keys with values, got a list"),
    "text": ("logits\n", "line 1, column 1: expected keys with values, got text"),
    "another encoding": (
        b"name: logits\n# caf\xe9\n",
        "line 2, column 6: byte 0xe9 is not UTF-8; save the file",
    ),
    "UTF-16": (
        "name: logits\n".encode("utf-16"),
        "line 1, column 1: byte 0xff is not UTF-8; save the file as UTF-8",
    ),
    "a control character": (
        "name: log\x01its\n",
        "character 10: special characters are not allowed",
    ),
    "an alias in its anchor": (
        "name: logits\nT: &a\n  b: *a\n",
        "line 2, column 4: an alias refers to an anchor that contains",
    ),
    "two documents": ("name: logits\n---\nT: 4\n", "line 2, column 1: but found another document"),
    "an object": (
        "name: !!python/name:os.system\n",
        "line 1, column 7: could not determine a constructor for",
    ),
    "an interpolation": ("name: logits\nT: ${method.alpha\n", "no viable alternative at input"),
    "a header": ("# @package\nname: logits\n", "Expected header format"),
}


@pytest.mark.parametrize(("text", "problem"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("where", ["--config-dir=own", "hydra.searchpath=[file://own]"])
def test_a_broken_file_of_the_users(where: str, text: Any, problem: str, kd: Callable) -> None:
    write("own/method/mine.yaml", text)
    said = kd(where, *TOY, "method=mine")
    assert is_one_line(said, f"{Path('own/method/mine.yaml').absolute()}"), said.err
    assert problem in said.err
    assert nothing_made()


def test_a_file_that_includes_itself(kd: Callable) -> None:
    write("own/method/logits.yaml", "defaults: [logits]\nT: 3\n")
    assert is_one_line(
        kd("--config-dir=own", *TOY, "method=logits"),
        "method/logits: its defaults list leads back to",
    )


def test_a_file_with_a_byte_order_mark(kd: Callable) -> None:
    write("own/experiment/mine.yaml", b"\xef\xbb\xbf# @package _global_\nseed: 31\n")
    assert "\nseed: 31\n" in kd("--config-dir=own", "+experiment=mine", "--cfg", "job").out


@pytest.mark.parametrize(
    "flag", ["--config-dir=none", "hydra.searchpath=[none]", "hydra.searchpath=[file://none]"]
)
def test_a_directory_that_is_not_there(flag: str, kd: Callable) -> None:
    key = flag.partition("=")[0]
    assert is_one_line(kd(*TOY, flag), f"{key}: there is no directory {Path('none').absolute()}")


# ---- values


UNQUOTED = ["a=b", "https://x.y/z?a=b&c=d", "(a", "{a", "[a", "=3", "#1", "it is #1", "é", "~/x"]
UNQUOTED += ["a'b=c", 'a"b=c', "$x=`y`", "a\\b=c", "a!b", "x=\\", "a;b"]


@pytest.mark.parametrize("value", UNQUOTED)
def test_the_remedy_for_a_value_is_right(value: str) -> None:
    """What the line says to type is read, by the shell and by Hydra, as what was meant."""
    with pytest.raises(UserError) as raised:
        split_arguments([f"teacher.checkpoint={value}"])
    line, remedy = str(raised.value).split("quote the value for Hydra and for the shell: ")
    key = line.partition(": ")[0]
    (word,) = shlex.split(remedy)
    override = parse(word)
    assert (override.key_or_group, override.value()) == (key, value)


@pytest.mark.parametrize(
    ("word", "line"),
    {
        "teacher.checkpoint=a=b": (
            "teacher.checkpoint: quote the value for Hydra and for the shell: "
        ),
        "seed": "seed: the value is missing; write seed=...",
        "=3": "'=3': the key is missing; write key=value",
        "seed = 3": "seed: a key cannot contain spaces; write seed=3",
        "seed=choice()": "seed: 'choice()': empty choice is not legal",
        "--cfg=nope": "argument --cfg/-c: invalid choice: 'nope'",
        "-x": "unrecognized arguments: -x",
    }.items(),
)
def test_words_that_cannot_be_read(word: str, line: str, kd: Callable) -> None:
    assert is_one_line(kd(*TOY, word), line)
    assert nothing_made()


def test_two_choices_of_which_one_would_be_lost(kd: Callable) -> None:
    said = kd("-m", *TOY, "+experiment=original", "+experiment=fair")
    assert is_one_line(said, "experiment: given 2 times; use +experiment=a,b to sweep over both")
    assert is_one_line(
        kd("--config-dir=.", "--config-dir", "."), "--config-dir: given more than once"
    )


def test_flags_and_overrides_come_in_any_order(kd: Callable) -> None:
    for words in (
        ["~pair", "--cfg", "job", "seed=3"],
        ["--cfg", "job", "~pair", "seed=3"],
        ["seed=3", "-c=job"],
    ):
        said = kd(*words)
        assert "\nseed: 3\n" in said.out, said.err


@pytest.mark.parametrize(
    "word", ["seed=range(3,0)", "method=glob(zzz*)", "method=glob(*,exclude=*)", "seed=range(0)"]
)
def test_a_sweep_over_nothing(word: str, kd: Callable) -> None:
    said = kd("-m", *TOY, word)
    assert is_one_line(
        said, f"{word.partition('=')[0]}: {word.partition('=')[2]} expands to no values"
    ), said.err
    assert nothing_made()


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("seed=range(0,3,0)", "seed: range() arg 3 must not be zero"),
        ("seed=glob(*)", "seed: glob(*) expands to no values"),
        (
            "hydra.sweeper.max_batch_size=0",
            "hydra.sweeper.max_batch_size: should be 1 or more, got 0",
        ),
    ],
)
def test_a_sweep_that_cannot_be(word: str, line: str, kd: Callable) -> None:
    assert is_one_line(kd("-m", *TOY, word), line)
    assert nothing_made()


@pytest.mark.slow
def test_values_of_hydras_in_a_sweep(planned: Planned) -> None:
    """${hydra:job.num} counts the jobs, on the command line and in YAML."""
    write(
        "own/experiment/mine.yaml",
        "# @package _global_\ntracker: {notes: 'job ${hydra:job.num}'}\n",
    )
    words = ["--config-dir=own", "+experiment=mine", "hydra/launcher=basic", "method=standard"]
    jobs = [
        job["config"]
        for job in planned("-m", *words, "student.dropout=0.1,0.2", "seed=${hydra:job.num}")
    ]
    assert [job["seed"] for job in jobs] == [0, 1]
    assert [job["tracker"]["notes"] for job in jobs] == ["job 0", "job 1"]


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_values_of_hydras_in_a_worker(packed: bool, kd: Callable) -> None:
    pack = ["hydra.launcher.jobs_per_worker=2"] if packed else []
    words = [
        "method=standard",
        "seed=0,1",
        "tracker.notes='job ${hydra:job.num}'",
        "hydra.launcher.slots=1",
        *pack,
    ]
    said = kd("-m", *TOY, *words)
    assert said.code == 0, said.err
    notes = [
        json.loads(path.read_text())["config"]["tracker"]["notes"]
        for path in Path().glob("runs/*/result.json")
    ]
    assert sorted(notes) == ["job 0", "job 1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "key", "pairs"),
    [
        (
            "student={scale:1,epochs:2},{scale:2,epochs:3}",
            "student",
            [{"scale": 1, "epochs": 2}, {"scale": 2, "epochs": 3}],
        ),
        (
            "method={T:1,alpha:0.5},{T:2,alpha:0.1}",
            "method",
            [{"T": 1.0, "alpha": 0.5}, {"T": 2.0, "alpha": 0.1}],
        ),
    ],
)
def test_pairs_of_values_instead_of_a_product(
    word: str, key: str, pairs: Any, planned: Planned
) -> None:
    jobs = planned(
        "-m", "hydra/launcher=basic", "+experiment=temperature", "seed=0", "method.T=3", word
    )
    assert [{name: job["config"][key][name] for name in pairs[0]} for job in jobs] == pairs


# ---- intervals


COMPOSED = {
    "method": {"name": "logits"},
    "student": {"name": "cnn"},
    "teacher": {"name": "cnn"},
    "data": {"name": "digits"},
}


@pytest.mark.parametrize(
    ("key", "integers"),
    {
        "student.epochs": True,
        "student.scale": True,
        "teacher.epochs": True,
        "batch_size": True,
        "threads": True,
        "data.augment.crop_padding": True,
        "checkpoint.every_n_epochs": True,
        "method.T": False,
        "method.alpha": False,
        "student.dropout": False,
        "student.label_fraction": False,
        "optimizer.lr": False,
        "teacher.optimizer.momentum": False,
        "schedule.warmup_fraction": False,
        "checkpoint.every_n_minutes": False,
        "teacher.cache.max_gb": False,
        "nowhere": False,
        "method.nowhere": False,
        "no.where": False,
    }.items(),
)
def test_which_keys_take_integers(key: str, integers: bool) -> None:
    assert takes_integers(COMPOSED, key) is integers


@pytest.mark.parametrize(
    ("word", "ends"),
    {
        "student.epochs=interval(1,4)": (1, 4),
        "student.scale=tag(log,interval(1,64))": (1, 64),
        "method.T=interval(1,4)": (1.0, 4.0),
        "method.T=int(interval(1,4))": (1, 4),
        "student.epochs=interval(1.0,4)": (1, 4),
    }.items(),
)
def test_an_interval_has_the_type_of_its_key(word: str, ends: tuple[Any, Any]) -> None:
    override = parse(word)
    search_integers({override.key_or_group: override}, COMPOSED)
    interval = override.value()
    assert [interval.start, interval.end] == list(ends)
    assert type(interval.start) is type(ends[0])


def test_an_interval_of_integers_with_a_broken_end() -> None:
    override = parse("student.epochs=interval(1.5,4)")
    with pytest.raises(
        UserError,
        match=re.escape(
            "student.epochs: takes integers, so both ends of its interval must be integers"
        ),
    ):
        search_integers({"student.epochs": override}, COMPOSED)
