"""Planning thousands of jobs: each thing is composed, checked and read only once.

The result is what Hydra gives.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import is_one_line
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hydra_plugins import _kd_grid, _kd_sweeper
from hydra_plugins._kd_compose import Composer
from kd import cli, models
from kd.config import schema, validate
from kd.core import console
from kd.models import weights
from kd.report.tables import read_plan
from kd.sweep import scheduler
from kd.sweep.directory import SweepDirectory

FILES = {
    "config": """
defaults: [{net: small}, {net@other: small}, {seed: null}, _self_]
seed: 0
rate: 0.1
empty: null
path: ???
text: ${oc.env:HOME,'~/x'}
twice: ${rate}
near: {up: 1, same: '${near.up}', deep: {a: 1, b: [1, 2, {c: 3}]}}
tags: [a, b]
alias: ${near.deep}
quoted: "a ${seed} b"
""",
    "relative": "defaults: [config, _self_]\nnear: {down: '${.up}'}\n",
    "net/small": "name: small\nwidth: 1\nrate: 2\n",
    "net/large": "name: large\ndepth: 3\nwidth: 8\ninner: {width: '${..width}'}\n",
    "net/linked": "name: linked\nwidth: ${seed}\n",
    "seed/one": "# @package _global_\nseed: 1\n",
    "seed/two": "# @package _global_\nseed: 2\nnet: {width: 2}\n",
    "extra/more": "# @package _global_\ndefaults: [{override /net: linked}]\nextra: 1\n",
}
WORDS = [
    "seed=0,1", "seed=one,two", "rate=0.1,1e-3,2", "rate=null", "rate=abc,true",
    "rate='a b','${seed}'", "rate=[1,2],3", "empty=1,x", "path=a,b", "path='???'", "text=x",
    "twice=3", "near.up=2,3", "near.same=5", "near.deep.a=1,[2]", "near.deep.b=1",
    "near.deep.b.0=7", "near.deep={a:2}", "near={up:3}", "++near.deep={z:1}", "+near.deep={z:1}",
    "near.missing=1", "+near.new=1,2", "++near.new=1", "++near.up=9", "+near.up=9", "~near.up",
    "~near.deep.a=1", "~near", "tags=[c]", "tags=x", "tags.0=z", "+tags=[d]", "alias=1",
    "alias.a=2", "quoted=plain", "quoted='$'", "net=small,large,linked", "net=nope",
    "net@other=large", "net@other={name:q}", "net={name:x,width:4}", "~net", "net.width=1,2",
    "net.rate=2,3", "net.name=small", "net.depth=4,5", "net.inner.width=2", "other.width=5,6",
    "+extra=more", "+extra=1", "~seed", "++net.width=3", "near.up=range(1,3)", "net=glob(l*)",
    r"rate=a\,b", "rate=", "near=null", "near.deep=null", "seed=-1,1_000", "rate=inf,nan",
    "other=null", "path=${near.up}",
]  # fmt: skip


@contextmanager
def loaded(folder: Path, name: str = "config") -> Iterator[Any]:
    """What Composer needs of a sweep whose configurations lie in `folder`."""
    with initialize_config_dir(str(folder), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        yield loader, loader.load_configuration(name, [], RunMode.MULTIRUN)


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conf")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.yaml").write_text(text)
    return folder


def grid(loader: Any, words: list[str]) -> list[list[str]]:
    """The overrides of each job of a grid."""
    return _kd_grid.product(_kd_grid.parsed(loader, {}, words))


def result(compose: Callable[[], Any]) -> tuple[str, str]:
    """What a composition gives, or the error that it ends in; as text, in which nan equals nan."""
    try:
        return "values", repr(compose())
    except Exception as error:
        return type(error).__name__, str(error)


GRIDS = int(os.environ.get("KD_GRIDS", "20"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config", "relative"])
def test_each_job_is_what_hydra_composes(name: str, conf: Path) -> None:
    """On random grids: values and their types, the order of keys, and errors."""
    with loaded(conf, name) as (loader, master):

        @settings(
            max_examples=GRIDS if name == "config" else GRIDS // 4,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
        )
        @given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=5))
        def agrees(words: list[str]) -> None:
            try:
                jobs = grid(loader, words)
            except Exception:
                return
            compose = Composer(loader, master, cli.to_container)
            for job in {str(job): job for job in (jobs[0], jobs[-1])}.values():
                slow = result(lambda: cli.to_container(loader.load_sweep_config(master, job)))  # noqa: B023
                assert result(lambda: compose(job, 0)) == slow, job  # noqa: B023

        agrees()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "compositions"),
    [
        (["path=a", "empty=range(30)"], 1),
        (["path=a,b,c", "net.width=range(5)", "net.rate=1,2"], 1),
        (["path=a", "net=small,linked", "net@other=linked,small", "empty=range(4)"], 4),
        (["path=a", "+extra=more", "+near.new=1", "~tags", "empty=range(9)"], 1),
        (["path=a", "near.up=range(3)", "empty=range(4)"], 1 + 3),  # near.same depends on it
        (["path=a", "tags=[a],[b]", "net=glob(s*)", "empty=range(4)"], 2),
    ],
)
def test_hydra_composes_once_for_what_shapes_a_job(
    words: list[str], compositions: int, conf: Path
) -> None:
    with loaded(conf) as (loader, master):
        compose = Composer(loader, master, cli.to_container)
        jobs = grid(loader, words)
        assert len({repr(compose(job, 0)) for job in jobs}) == len(jobs)
        assert compose.compositions == compositions


def test_a_relative_interpolation_is_left_to_hydra(conf: Path) -> None:
    with loaded(conf, "relative") as (loader, master):
        compose = Composer(loader, master, cli.to_container)
        downs = [compose(job, 0)["near"]["down"] for job in grid(loader, ["path=a", "near.up=4,5"])]
        assert downs == [4, 5]


def test_copies_share_nothing(conf: Path) -> None:
    with loaded(conf) as (loader, master):
        compose = Composer(loader, master, cli.to_container)
        first, second = (compose(["path=a", f"rate={rate}"], 0) for rate in (1, 2))
        first["tags"].append("c")
        first["near"]["deep"]["a"] = 5
        assert second["tags"] == compose(["path=a", "rate=3"], 0)["tags"] == ["a", "b"]
        assert second["near"]["deep"]["a"] == 1


# ---- of kd's own configurations

GRID = [
    "data=digits",
    "method=standard,logits,feature",
    "optimizer.lr=0.1,0.2",
    "seed=range(5)",
    "student.scale=1,2",
]


def planned(folder: Path, words: list[str]) -> tuple[list[dict[str, Any]], Any]:
    """(The jobs of a grid, its sweeper), planned in `folder`."""
    with loaded(cli.CONF) as (loader, master):
        sweeper = SimpleNamespace(
            hydra_context=SimpleNamespace(config_loader=loader), config=master
        )
        jobs = grid(loader, [*words, f"paths.runs={folder / 'runs'}"])
        directory = SweepDirectory(folder / "sweep")
        directory.claim()
        configs = (_kd_sweeper.composed(sweeper, job) for job in jobs)
        jobs = scheduler.plan(directory, configs, total=len(jobs))
        directory.release()
        return jobs, sweeper


def test_a_grid_is_checked_once_for_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 jobs of three methods, two students and one teacher."""
    counted = {"_build_meta": 0, "_check_method": 0}

    def count(name: str, real: Callable) -> None:
        def counting(*given: Any) -> Any:
            counted[name] += 1
            return real(*given)

        monkeypatch.setattr(validate, name, counting)

    count("_build_meta", validate._build_meta)
    count("_check_method", validate._check_method)
    jobs, sweeper = planned(tmp_path, GRID)
    assert len(jobs) == len(read_plan(tmp_path / "sweep")) == 60
    assert sweeper.composer.compositions == 3
    assert counted == {"_build_meta": 3, "_check_method": 6}
    assert len({job["id"] for job in jobs}) == 60
    assert [(job["config"]["method"]["name"], job["config"]["seed"]) for job in jobs[1::20]] == [
        ("standard", 0),
        ("logits", 0),
        ("feature", 0),
    ]


def test_the_weights_of_a_teacher_are_read_once(
    tmp_path: Path, composed: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = composed("teacher.scale=2").teacher
    classes = tuple(map(str, range(10)))
    path, half = tmp_path / "teacher.safetensors", torch.full((3,), 0.5)
    weights.save(
        models.build(teacher, 10, 32),
        path,
        weights.build_metadata(teacher.model_dump(), classes, 32, half, half),
    )
    read = []

    def digest(file: Any, name: str, real: Callable = hashlib.file_digest) -> Any:
        read.append(file.name)
        return real(file, name)

    monkeypatch.setattr(hashlib, "file_digest", digest)
    words = [
        "data=digits",
        "teacher.scale=2",
        f"teacher.checkpoint={path}",
        "method=logits",
        "seed=range(10)",
    ]
    jobs, _ = planned(tmp_path, words)
    assert (len({job["id"] for job in jobs}), len(read)) == (10, 1)
    before = schema.file_digest(path)
    path.write_bytes(path.read_bytes() + b" ")
    assert schema.file_digest(path) != before, "another content is read again"


def test_progress_is_a_few_lines_where_there_is_no_terminal(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO", "kd"):
        assert list(console.progress(iter(range(1200)), 1200, "planning")) == list(range(1200))
        assert list(console.progress(iter(range(9)), 9, "planning")) == list(range(9))
    assert caplog.messages == ["planning: 500 of 1200 jobs", "planning: 1000 of 1200 jobs"]


def test_jobs_whose_teachers_are_there_are_compared_with_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is read for 300 jobs of 3 teachers: each teacher's result, once."""
    read = []

    def finished(folder: Path) -> bool:
        read.append(folder.name)
        return True

    monkeypatch.setattr(scheduler.directory, "load_result", finished)
    units = [[{"number": n, "teachers": [f"/none/{n % 3}"]}] for n in range(300)]
    assert [unit[0]["number"] for unit in scheduler.order_by_teacher(units)] == list(range(300))
    assert sorted(read) == ["0", "1", "2"]


def test_a_mistake_in_a_late_job_ends_in_one_line(kd: Callable, tmp_path: Path) -> None:
    done = kd(
        "-m",
        "data=digits",
        "method=logits",
        "method.T=1,2",
        f"seed={','.join(map(str, range(50)))},-1",
    )
    assert is_one_line(done, "seed: should be greater than or equal to 0, got -1 (job 51: ")
    assert list((tmp_path / "cwd").iterdir()) == []
