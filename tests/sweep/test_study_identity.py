"""A study knows what it searches.

The same search resumes it, whatever words it is typed in; another is refused.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import SMALL, is_one_line

from kd.runs.optuna_storage import absolute, open_storage
from kd.sweep import optuna_study
from kd.sweep.optuna_study import SEARCH, Study, description

BASE = [*SMALL, "hydra/sweeper=optuna", "method=logits", "hydra.sweeper.n_trials=2"]
NAMED = ["hydra.sweeper.study=mine"]
FLOAT, LOG, CHOICE = (
    "method.T=interval(1.0,8.0)",
    "method.T=tag(log,interval(1.0,8.0))",
    "method.T=1,2,4",
)


def storage(name: str = "sqlite:///runs/search.db") -> Any:
    return open_storage(absolute(name))


def stored(name: str = "mine", where: str = "sqlite:///runs/search.db") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=storage(where))


def content(name: str = "mine", where: str = "sqlite:///runs/search.db") -> Any:
    found = stored(name, where)
    return json.dumps(
        [found.user_attrs, [(t.number, t.state.name, t.params, t.value) for t in found.trials]]
    )


@pytest.mark.slow
def test_a_study_keeps_what_it_searches(kd: Callable, launched: list) -> None:
    assert kd(*BASE, *NAMED, LOG, "method.alpha=0.2,0.4", "seeds=[3,4]").code == 0
    search = stored().user_attrs[SEARCH]
    assert search["space"] == {
        "method.T": {"kind": "float", "low": 1.0, "high": 8.0, "log": True},
        "method.alpha": {"kind": "choice", "choices": ["0.2", "0.4"]},
    }
    assert (search["objective"], search["direction"], search["seeds"]) == (
        "val_accuracy",
        "maximize",
        [3, 4],
    )
    fixed = search["fixed"]
    assert {
        "student.scale": 1,
        "teacher.scale": 2,
        "teacher.epochs": 1,
        "method.name": "logits",
    }.items() <= fixed.items()
    assert not {
        "method.T",
        "method.alpha",
        "seed",
        "device",
        "tracker.mode",
        "paths.runs",
        "rerun",
    } & set(fixed)


OTHERS: dict[str, tuple[list[str], dict[str, str]]] = {
    "float": (
        [FLOAT],
        {
            f"{FLOAT} method.alpha=0.2": "method.alpha is 0.1 in the study and 0.2 here",
            "method.T=interval(1.0,4.0)": "method.T is interval(1.0,8.0) in the study "
            "and interval(1.0,4.0) here",
            LOG: "method.T is interval(1.0,8.0) in the study and tag(log,interval(1.0,8.0)) here",
            CHOICE: "method.T is interval(1.0,8.0) in the study and choice(1,2,4) here",
            f"{FLOAT} method.alpha=0.2,0.4": "method.alpha is not searched in the study "
            "and choice(0.2,0.4) here",
            "method.alpha=0.2,0.4": "method.T is interval(1.0,8.0) in the study "
            "and not searched here",
            f"{FLOAT} hydra.sweeper.objective=val_nll": "objective is val_accuracy in the study "
            "and val_nll here",
            f"{FLOAT} seed=1": "seeds is [0] in the study and [1] here",
            f"{FLOAT} seeds=[0,1,2]": "seeds is [0] in the study and [0, 1, 2] here",
            f"{FLOAT} teacher.epochs=2": "teacher.epochs is 1 in the study and 2 here",
            f"{FLOAT} teacher.ensemble.size=2": (
                "teacher.ensemble.average is not set in the study and logits here"
            ),
            f"{FLOAT} method=nkd": "method.alpha is 0.1 in the study and 1.0 here (and ",
            f"{FLOAT} data.val_size=100": "data.val_size is 200 in the study and 100 here",
        },
    ),
    "choice": (
        [CHOICE, "hydra.sweeper.objective=val_ece"],
        {
            "method.T=1,2,8 hydra.sweeper.objective=val_ece": "method.T is choice(1,2,4) "
            "in the study and choice(1,2,8) here",
            f"{CHOICE} hydra.sweeper.objective=val_nll": "objective is val_ece in the study "
            "and val_nll here",
        },
    ),
    "group": (
        ["method=logits,dkd", "method.T=2"],
        {
            "method=logits,dkd method.T=4": "method.T is 2.0 in the study and 4.0 here",
            "method=logits,dkd method.T=2 optimizer=adam": "optimizer.",
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("first", "others"), OTHERS.values(), ids=OTHERS)
def test_another_search_is_refused(
    first: list[str], others: dict[str, str], kd: Callable, launched: list
) -> None:
    words = ["-m", *BASE, *NAMED, "hydra.sweeper.n_trials=1"]
    assert kd(*words, *first).code == 0
    before = content()
    for second, difference in others.items():
        said = kd(*words, *second.split())
        assert is_one_line(said, "hydra.sweeper.study: mine in sqlite:///"), said.err
        assert difference in said.err
        assert "; choose another hydra.sweeper.study, or delete that one" in said.err
    assert (content(), len(launched)) == (before, 1)
    assert len(list(Path("multirun").glob("*/*"))) == 1, "nothing is left of the others"


SAME = [
    "checkpoint.every_n_minutes=1", "rerun=false", "cpu_kernels=torch", "tracker.project=other",
    "tracker.tags=[a]", "device=auto", "threads=2", "student.epochs=1", "method.alpha=0.1",
    "hydra.launcher.slots=2", "hydra.sweeper.sampler=random", "hydra.sweeper.pruner=none",
    "hydra.sweeper.seed=5", "seeds=[0]", "paths.cache=elsewhere",
    "hydra.sweep.dir=elsewhere", "teacher.cache.max_gb=1", "compile=false",
    "test_outputs.max_mb=0",
]  # fmt: skip


OTHER_SAME = ["seed=0", "threads=1", "device=cpu"]


@pytest.mark.slow
def test_the_same_search_goes_on_however_it_is_typed(
    kd: Callable, launched: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KD_CACHE", str(Path("cache").absolute()))
    assert kd("-m", *BASE, FLOAT, "hydra.sweep.dir=first").code == 0
    name = json.loads(Path("first/study.json").read_text())["study"]
    before = content(name)
    for words in (SAME, OTHER_SAME):
        said = kd("-m", *BASE, FLOAT, *words)
        assert said.code == 0, said.err
    assert len(optuna.get_all_study_names(storage())) == 1
    assert (content(name), len(launched)) == (before, 2)
    assert kd("-m", FLOAT, *reversed(BASE), "hydra.sweeper.n_trials=3").code == 0
    assert len(launched) == 3, "a study may grow"


@pytest.mark.slow
def test_an_unnamed_study_is_its_search(kd: Callable, launched: list) -> None:
    for number, more in enumerate(
        [[], ["method.alpha=0.2"], ["hydra.sweeper.objective=val_nll"], ["seeds=[0,1]"]], 1
    ):
        assert kd("-m", *BASE, FLOAT, *more).code == 0
        assert len(optuna.get_all_study_names(storage())) == number


@pytest.mark.slow
def test_a_journal_knows_it_too(kd: Callable, launched: list) -> None:
    words = ["-m", *BASE, *NAMED, "hydra.sweeper.storage=deep/search.journal"]
    assert kd(*words, FLOAT).code == 0
    before = content(where="deep/search.journal")
    said = kd(*words, LOG)
    assert is_one_line(said, "hydra.sweeper.study: mine in /")
    assert kd(*words, FLOAT).code == 0
    assert (content(where="deep/search.journal"), len(launched)) == (before, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ({"direction": "minimize"}, "minimizes, but val_accuracy must be maximized"),
        ({"directions": ["maximize", "minimize"]}, "has 2 objectives, but a search has only one"),
        (
            {"direction": "maximize"},
            "does not record what it searches, so this version of kd did not create it",
        ),
    ],
    ids=["direction", "objectives", "trials"],
)
def test_a_study_of_another_tool_is_refused(
    made: dict, reason: str, kd: Callable, launched: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna_study, "UNSIGNED", 0.0)
    monkeypatch.setattr(optuna_study, "SETTLED", 0.0)
    Path("runs").mkdir()
    other = optuna.create_study(storage=storage(), study_name="mine", **made)
    if reason.startswith("does"):
        other.add_trial(optuna.trial.create_trial(value=0.5))
    said = kd("-m", *BASE, *NAMED, FLOAT)
    assert is_one_line(said, "hydra.sweeper.study: mine in sqlite:///"), said.err
    assert reason in said.err
    assert launched == []
    assert len(stored().trials) == reason.startswith("does")


@pytest.mark.slow
def test_an_empty_study_whose_maker_died_is_taken_over(
    kd: Callable, launched: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna_study, "UNSIGNED", 0.0)
    monkeypatch.setattr(optuna_study, "SETTLED", 0.0)
    Path("runs").mkdir()
    optuna.create_study(storage=storage(), study_name="mine", direction="maximize")
    assert kd("-m", *BASE, *NAMED, FLOAT).code == 0
    assert len(stored().trials) == 2
    assert is_one_line(kd("-m", *BASE, *NAMED, LOG), "hydra.sweeper.study: ")


OPEN = """
import sys
import optuna
from kd.core.errors import UserError
from kd.sweep.optuna_study import Study, description
where, objective = sys.argv[1:]
search = description(objective, [0], {}, {"": {}})
print("ready", flush=True)
sys.stdin.readline()
try:
    Study(where, "mine", 1, search, "tpe", "none", 0)
except UserError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["search.db", "search.journal"])
def test_processes_that_make_a_study_at_one_moment_agree(name: str, tmp_path: Path) -> None:
    where = f"sqlite:///{tmp_path}/{name}" if name.endswith("db") else f"{tmp_path}/{name}"
    objectives = ["val_nll", "val_ece", "val_nll", "val_ece"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN, where, one],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for one in objectives
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    got = list(zip(objectives, said, strict=True))
    winner = stored(where=where).user_attrs[SEARCH]["objective"]
    assert sorted(objective for objective, error in got if not error) == [winner, winner], got
    assert all(
        "belongs to another search: objective is" in error
        for objective, error in got
        if objective != winner
    ), got


@pytest.mark.slow
def test_a_trial_that_another_process_has_failed_is_not_failed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several processes that find an orphan, one is first, even between look and write."""
    search = description("val_nll", [0], {}, {"": {}})
    first, second = (
        Study(f"sqlite:///{tmp_path}/search.db", "mine", 3, search, "tpe", "none", 0)
        for _ in range(2)
    )
    trial = first.ask_trial()
    assert trial is not None
    seen = second.study.get_trials()
    first._fail_orphaned_trial(trial.number)
    monkeypatch.setattr(second.study, "get_trials", lambda **_: seen)
    second._fail_orphaned_trial(trial.number)
    second.begin_trial(trial, [{"number": 0}])
    second.refuse(trial, "no allowed configuration")
    second._finish_in_storage(trial, 0.5, "COMPLETE")
    assert second.next_job() is None
    states = [
        (t.state.name, t.user_attrs.get("lost"), t.user_attrs.get("again"))
        for t in first.study.get_trials()
    ]
    assert states == [("FAIL", True, None), ("WAITING", None, 0)], "lost once, and tried again once"


@pytest.mark.slow
@pytest.mark.parametrize("choices", ["range(3,0)", "glob(nothing*)"])
def test_choices_of_no_value_are_refused(choices: str, kd: Callable, launched: list) -> None:
    said = kd("-m", *BASE, f"method.T={choices}", "method.alpha=interval(0.1,0.9)")
    assert is_one_line(said, "method.T: "), said.err
    assert not Path("runs").exists()


@pytest.mark.slow
def test_shuffled_choices_are_the_same_search(kd: Callable, launched: list) -> None:
    for _ in range(3):
        assert kd("-m", *BASE, "method.T=shuffle(1,2,4,8,16,32)").code == 0
    (found,) = optuna.get_all_study_summaries(storage())
    assert found.n_trials == 2


@pytest.mark.slow
def test_what_determines_a_result_is_what_its_identity_hashes(composed: Callable) -> None:
    """Two configurations have the same determinants if and only if they have the same identity."""
    variants = [
        "seed=0", "seed=1", "batch_size=32", "method=standard", "method=dkd", "method.T=2",
        "method=born_again", "teacher.epochs=2", "teacher.seed=5", "teacher.ensemble.size=2",
        "teacher.ensemble.average=probabilities", "precision=bf16", "teacher.outputs=misaligned",
        "student.label_fraction=0.5", "data.val_size=100", "optimizer.lr=0.01",
        "teacher.optimizer.lr=0.01", "schedule.warmup_fraction=0", "rerun=true", "device=auto",
        "tracker.project=x", "threads=2",
        "checkpoint.every_n_minutes=1", "cpu_kernels=torch", "seeds=[0,1]",
        "teacher.cache.feature_maps=true",
        "student.dropout=0.3", "teacher.dropout=0.3",
    ]  # fmt: skip
    several = [
        ["teacher.ensemble.size=2", "teacher.ensemble.average=probabilities"],
        ["method=standard", "teacher.epochs=2"],
    ]
    configs = [
        composed("method=logits", *words) for words in ([], *([v] for v in variants), *several)
    ]
    for one in configs:
        for other in configs:
            assert (one.identity() == other.identity()) == (
                one.determinants() == other.determinants()
            )
