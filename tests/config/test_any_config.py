"""Whatever is typed for any key runs, or ends in one line and exit code 2 before any work."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

import kd.training.run
from kd import cli
from kd.config.validate import validate_config
from kd.core import registry
from kd.core.settings import flatten
from kd.data.loader import Split
from kd.training import wandb_run

BASE = [
    "data=digits",
    "student.scale=1",
    "teacher.scale=1",
    "student.epochs=1",
    "teacher.epochs=1",
    "device=cpu",
    "precision=fp32",
    "data.augment.crop_padding=1",
    "teacher.cache.max_gb=0.05",
]
METHODS = registry.choices("methods")
GROUPS = {
    "method": METHODS,
    "optimizer": ["sgd", "adam", "adamw", "muon"],
    "optimizer@teacher.optimizer": ["sgd", "adam", "muon"],
    "schedule": ["cosine", "triangle", "step", "constant"],
    "schedule@teacher.schedule": ["cosine", "step"],
    "model@student": ["cnn"],
    "model@teacher": ["cnn"],
    "data": ["digits", "cifar10", "cifar100", "imagefolder"],
    "tracker": ["wandb"],
    "+experiment": ["original", "original_logits", "original_feature"],  # the others are sweeps
}
SENSIBLE = {  # beside the default
    "method.T": ["1", "2.5", "16"],
    "method.alpha": ["0", "0.5"],
    "method.standardize": ["true"],
    "method.warmup_fraction": ["0", "1"],
    "method.generation": ["1", "2"],
    "method.temperatures": ["[1,2]"],
    "method.parts": ["[logits,rkd]", "[{name:dkd,weight:0.5,T:2},vid]", "[ofd,ofd]"],
    "method.n_negatives": ["1", "100"],
    "teacher.ensemble.size": ["1", "2"],
    "teacher.ensemble.average": ["probabilities"],
    "method.power": ["0.001", "10"],
    "method.beta": ["0", "30000"],
    "method.pairs": [
        "last",
        "stages",
        "penultimate",
        "[[pool2,pool2]]",
        "[[pool1,pool1],[hidden,hidden]]",
        "[[conv1,conv2]]",
    ],
    "student.scale": ["1", "2", "3", "100000"],
    "student.activation": ["elu", "gelu", "silu"],
    "data.root": ["../images"],
    "teacher.cache.fill": ["lazy", "whole"],
    "teacher.cache.feature_maps": ["true"],
    "data.val_size": ["0", "1", "1400", "null"],
    "data.augment.padding_mode": ["reflect", "edge"],
    "data.augment.crop_padding": ["0", "2"],
    "data.mean": ["null", "[0.5,0.5,0.5]"],
    "precision": ["auto", "bf16", "fp32"],
    "device": ["auto", "cpu", "cuda", "cuda:7", "mps"],
    "threads": ["1", "2", "null"],
    "compile": ["true", "false"],
    "rerun": ["true"],
    "batch_size": ["2", "7", "64"],
    "tracker.mode": ["online", "offline", "disabled"],
    "checkpoint.every_n_minutes": ["null", "0.001"],
    "test_outputs.max_mb": ["0", "0.001", "1000"],
}
NUMBERS = ["-1", "0", "1", "2", "3.5", "-0.0", "1e-9", "1e9", "1e400", "-1e400", "1e308", "1e-320"]
NUMBERS += ["nan", "inf", "-inf", "1" + "0" * 400, "1" + "0" * 5000]
NUMBERS += ["1_000", "0x10", str(2**31), str(2**63)]
WORDS = ["", "''", "null", "true", "a", "nope", "../x", "漢字 é", "'a b'", "'a\nb'"]
WORDS += ["'\x1b[31mred'", "'\x07\u202e'", "'\udcff'", "x" * 300, "x" * 5000, "???"]
WORDS += ["${seed}", "${nope}", "${oc.env:NO_SUCH}", "${", "~nosuchuser/x", "\\", "'", "a=b", "a,b"]
WORDS += ["1,2", "range(1,5)", "interval(1,2)", "choice(a)", "glob(*)", "int(x)"]
NESTS = ["[]", "[1]", "[a,b]", "[1,2,3]", "[-1,nan,1e400]", "[null]", "{}", "{a: 1}"]
NESTS += ["{name: nope}", "[[1,2]]", "[[]]", "[[a]]", "[[pool2,hidden]]", "[1", "{a"]
NESTS += ["[" * 60 + "]" * 60, "{a: {b: {c: [1]}}}"]
WILD = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(WORDS),
    st.sampled_from(NESTS),
    st.integers().map(str),
    st.floats().map(str),
    st.text(st.characters(exclude_characters="\0"), max_size=20),
)


def _composed(words: list[str]) -> DictConfig:
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        return compose("config", words)


@cache
def _keys(groups: tuple[str, ...] = ()) -> dict[str, str]:
    """Every key with its default: the keys that these choices have or, without any, all keys."""
    found: dict[str, Any] = {}
    each = [groups] if groups else [(f"{g}={c}",) for g in GROUPS if g[0] != "+" for c in GROUPS[g]]
    with suppress(Exception):
        for words in each:
            found |= flatten(OmegaConf.to_container(_base(words)))  # type: ignore[arg-type]
    leaves = {
        k: json.dumps(v).strip('"')
        for k, v in found.items()
        if not (isinstance(v, str) and "$" in v)
    }
    nodes = {key.rpartition(".")[0] for key in found} - {""}
    return (
        {**dict.fromkeys(nodes, "{}"), **dict.fromkeys(found, "here"), **leaves}
        if leaves
        else _keys()
    )


@st.composite
def _words(draw: st.DrawFn) -> list[str]:
    """1 to 6 overrides, of which about half the time all are sensible."""
    wild = draw(st.sampled_from([0, 0, 1, 2, 4]))  # of ten
    chance = st.integers(0, 9)
    words = []
    few = st.lists(st.sampled_from(sorted(GROUPS)), max_size=2, unique=True)
    for group in draw(few) if draw(chance) < 5 else []:  # composing them takes the most time
        foreign = draw(chance) < wild
        words.append(f"{group}={draw(WILD if foreign else st.sampled_from(GROUPS[group]))}")
    known = _keys(tuple(words))
    for _ in range(draw(st.integers(0 if words else 1, 6 - len(words)))):
        key = draw(st.sampled_from(sorted(known if draw(chance) >= wild else _keys())))
        likely = st.sampled_from([known.get(key, "1"), *SENSIBLE.get(key, [])])
        value = draw(WILD if draw(chance) < wild else likely)
        if (
            key.startswith(("paths", "student.scale", "teacher.scale"))
            and len(value) > 3
            and value != "100000"
        ):
            # Nothing is written elsewhere; scale=1024, which is allowed, takes 17 GB.
            value = "here"
        sign = draw(st.sampled_from(["", "", "+", "++", "~"])) if draw(chance) < wild else ""
        words.append(f"{sign}{key}" if sign == "~" else f"{sign}{key}={value}")
    return words


def _one_line(text: str) -> bool:
    return (
        text.startswith("kd: ")
        and text.count("\n") == 1
        and text[:-1].isprintable()
        and len(text) > 8
    )


@cache
def _base(groups: tuple[str, ...]) -> DictConfig:
    return _composed([*BASE, *groups])


def _quickly(words: list[str]) -> DictConfig:
    """As Hydra composes it; what the groups give is kept, as it takes the most time."""
    parsed = OverridesParser.create().parse_overrides(words)
    groups = [
        o for o in parsed if o.get_key_element().lstrip("+") in GROUPS or "@" in o.get_key_element()
    ]
    config = _base(tuple(str(o.input_line) for o in groups)).copy()
    ConfigLoaderImpl._apply_overrides_to_config([o for o in parsed if o not in groups], config)
    return config


def _settings(examples: int) -> settings:
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture
def _beside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`data.root=../images` is an image folder, as it is for the fixture `kd`."""
    (folder.parent / "pure").mkdir()
    monkeypatch.chdir(folder.parent / "pure")


@pytest.mark.slow
@pytest.mark.usefixtures("_beside")
@_settings(300)
@given(words=_words())
def test_any_configuration_is_right_or_refused(words: list[str]) -> None:
    try:
        cli._check_overrides(words)
        config = validate_config(cli.to_container(_quickly(words)))
    except Exception as error:
        code, line = cli._explain(error)
        assert code == 2, words
        assert line is not None
        assert _one_line(f"kd: {cli._printable(line)}\n"), line
        event("refused")
        return
    event("right")
    plain = config.to_dict()
    json.dumps(plain, allow_nan=False, ensure_ascii=False).encode()
    assert len(config.run_name().encode()) < 200
    again = validate_config(plain)
    assert (again, again.identity()) == (config, config.identity())


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every training, of student or teacher, is one real step.

    The fixture is a list that grows by one for each.
    """
    count: list[str] = []
    train = kd.training.run.train

    def first(*args: Any, **keys: Any) -> Iterator[Any]:
        for row in train(*args, **keys):
            yield row
            if row is not None:
                count.append("")
                return

    def refuse(*_: object, **__: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(kd.training.run, "train", first)
    monkeypatch.setattr(Split, "batches", lambda self, batch_size: 1)
    monkeypatch.setattr(wandb_run, "_start", lambda *_: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    return count


@pytest.mark.slow
@_settings(25)
@given(words=_words())
def test_any_command_line_runs_or_ends_in_one_line(
    folder: Path, kd: Callable, trained: list[str], words: list[str]
) -> None:
    trained.clear()
    shutil.rmtree("runs", ignore_errors=True)
    said = kd(*BASE, *words)
    assert "Traceback" not in said.err
    if said.code == 0:
        event(f"{len(trained)} trained")
        return
    diverged = said.code == 1 and "try a smaller" in said.err  # as after teacher.optimizer.lr=1e9
    event("diverged" if diverged else "refused")
    assert _one_line(said.err), said.err
    assert diverged or said.code == 2, said.err


MENDED = {  # words that once ended in a traceback, or were believed: what the line says
    "method=3": f"method: 3 is not a choice; allowed: {', '.join(METHODS)}",
    "method=x" + 5000 * "x": f"is not a choice; allowed: {', '.join(METHODS)}",
    "tracker=null": "tracker: None is not a choice; allowed: wandb",
    "optimizer=[[sgd]]": "optimizer: [['sgd']] is not a choice; allowed: adam, adamw, muon, sgd",
    "seed=1" + 5000 * "0": "seed: Exceeds the limit (4300 digits)",
    "seed=1" + 400 * "0": "seed: should be less than 9223372036854775808, got 100",
    "student.epochs=1"
    + 400 * "0": "student.epochs: should be less than or equal to 1000000, got 100",
    "student.scale=100000": "student.scale: should be less than or equal to 1024, got 100000",
    "threads=100000": "threads: should be less than or equal to 1024, got 100000",
    "method.T=1e300": "method.T: should be less than or equal to 10000, got 1e+300",
    "method.T=1e-300": "method.T: should be greater than or equal to 0.001, got 1e-300",
    "optimizer.weight_decay=1e308": (
        "optimizer.weight_decay: should be less than or equal to 1000, got 1e+308"
    ),
    "data.std=[0.5,-1,1]": "data.std.1: should be greater than or equal to 0.001, got -1",
    "data.mean=[0.5,1e308,1]": "data.mean.1: should be less than or equal to 1, got 1e+308",
    "data.root=~/images": "data.root: quote the value for Hydra and for the shell",
    "paths.runs='~nosuchuser/x'": "paths.runs: unknown user in '~nosuchuser/x'",
    "teacher.checkpoint='~nosuchuser/x'": "teacher.checkpoint: unknown user in '~nosuchuser/x'",
    "tracker.notes='\udcff'": (
        "tracker.notes: should be a valid string, unable to parse raw data as a unicode"
    ),
    "tracker.tags=['\udcff']": (
        "tracker.tags.0: should be a valid string, unable to parse raw data as a unicode"
    ),
    "hydra.verbose=3": "Hydra rejected the configuration (",
    "hydra.job_logging.root.level=NOPE": "Hydra rejected the configuration (Unknown level: 'NOPE')",
    "hydra=3": (
        "Hydra rejected the configuration "
        "(Config group override must be a string or a list. Got int)"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "word", MENDED, ids=lambda word: word[:40].encode("unicode_escape").decode()
)
def test_what_was_found_and_mended(word: str, kd: Callable) -> None:
    said = kd(*BASE, "method=logits", word)
    assert (said.code, said.out) == (2, "")
    assert _one_line(said.err), said.err
    assert MENDED[word] in said.err
    assert len(said.err) < 6000
