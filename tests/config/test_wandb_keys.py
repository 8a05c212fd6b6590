"""The tracker's keys: what W&B would refuse is refused before any work.

The names that kd makes are valid.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import wandb
from conftest import is_one_line

from kd.config.schema import Config
from kd.core import wandb_names
from kd.core.errors import UserError
from kd.core.wandb_names import RULES, check_name, shorten_name, validate_name
from kd.training import tracking

REFUSED = {
    "tracker.project=''": "tracker.project: should have 1 to 128 characters for W&B, got ''",
    "tracker.project=a/b": "tracker.project: should have none of /\\#?%: for W&B, got '/' in 'a/b'",
    "tracker.project='50%'": "tracker.project: should have none of /\\#?%: for W&B, "
    "got '%' in '50%'",
    f"tracker.project={'x' * 129}": "tracker.project: should have 1 to 128 characters for W&B, "
    "got 'x",
    "tracker.project='a\nb'": "tracker.project: should be printable, "
    "without leading or trailing spaces, for W&B",
    "tracker.project=' kd'": "tracker.project: should be printable, "
    "without leading or trailing spaces, for W&B",
    "tracker.entity='my team'": "tracker.entity: should have none of /\\#?%: or spaces for W&B, "
    "got ' ' in 'my team'",
    "tracker.entity=''": "tracker.entity: should have 1 to 128 characters for W&B",
    f"tracker.group={'x' * 129}": "tracker.group: should have 1 to 128 characters for W&B",
    "tracker.tags=['']": "tracker.tags.0: should have 1 to 64 characters for W&B, got ''",
    f"tracker.tags=[a,{'x' * 65}]": "tracker.tags.1: should have 1 to 64 characters for W&B, "
    "got 'x",
    "tracker.tags=['\udcff']": "tracker.tags.0: should be a valid string",
    "tracker.samples=-1": "tracker.samples: should be greater than or equal to 0, got -1",
    "tracker.samples=257": "tracker.samples: should be less than or equal to 256, got 257",
    "tracker.samples=1.5": "tracker.samples: should be a valid integer, got 1.5",
    "tracker.samples=null": "tracker.samples: should be a valid integer, got None",
    "tracker.artifacts=maybe": "tracker.artifacts: should be a valid boolean, got 'maybe'",
}


@pytest.mark.slow
@pytest.mark.parametrize("word", REFUSED, ids=lambda word: ascii(word)[:40])
def test_what_wandb_refuses_is_refused_first(word: str, kd: Callable) -> None:
    said = kd(
        "data=digits", "method=standard", "student.scale=1", "student.epochs=1", "device=cpu", word
    )
    assert is_one_line(said, REFUSED[word])
    assert list(Path.cwd().iterdir()) == []


def test_a_sweep_refuses_it_before_the_first_job(kd: Callable) -> None:
    said = kd(
        "-m", "data=digits", "method=standard", "student.scale=1", f"tracker.tags=[a],[{'x' * 65}]"
    )
    assert is_one_line(said, "tracker.tags.0: should have 1 to 64 characters for W&B")
    assert "(job 2: " in said.err
    assert not Path("runs").exists()


def test_names_at_the_limits_are_accepted(composed: Callable) -> None:
    words = [
        f"tracker.project={'p' * 128}",
        f"tracker.group='{'g/ü' * 42}'",
        f"tracker.tags=[{'t' * 64},'a: b, c']",
    ]
    settings = composed("method=standard", *words, "tracker.entity=team-1_x.y").tracker
    assert (len(settings.project), len(settings.group), len(settings.tags[0])) == (128, 126, 64)
    wandb.Settings(
        project=settings.project,
        entity=settings.entity,
        run_group=settings.group,
        run_tags=settings.tags,
    )


@pytest.mark.parametrize("name", ["", "a/b", "a\\b", "a#b", "a?b", "a%b", "a:b", "x" * 129])
def test_the_rule_for_projects_is_that_of_the_client(name: str) -> None:
    with pytest.raises(ValueError, match="should have"):
        validate_name("project", name)
    if name:  # which the client takes for none, and the server for wrong
        with pytest.raises(Exception, match="project name"):
            wandb.Settings(project=name)


def test_values_of_the_environment_are_named_by_their_variable() -> None:
    assert check_name("tag", "a", "WANDB_TAGS") == "a"
    with pytest.raises(
        UserError, match=r"^WANDB_PROJECT: should have none of .* got '/' in 'a/b'$"
    ):
        check_name("project", "a/b", "WANDB_PROJECT")


@pytest.mark.parametrize("kind", RULES)
def test_names_that_kd_makes_are_shortened_to_valid_ones(kind: str) -> None:
    longest = RULES[kind].longest
    names = [f"{'sum-' * 100}{end}" for end in ("1a2b", "3c4d")]
    made = [shorten_name(kind, name) for name in names]
    assert [validate_name(kind, name) for name in made] == made
    assert made[0] != made[1], "the end holds what tells them apart"
    assert {len(name) for name in made} == {longest}
    for odd in ("", "  ", "a\nb", "a/b:c#d'e", "\udcff", f"{'a' * longest} ", f"{'ab ' * 100}"):
        assert validate_name(kind, shorten_name(kind, odd))
    assert (
        shorten_name(kind, "standard-cnn-2-s1000-e0609896bc4e")
        == "standard-cnn-2-s1000-e0609896bc4e"
    )


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict]]:
    """What each run was started with; none is."""
    calls: list[dict] = []
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb, "init", lambda **given: calls.append(given))
    return calls


def test_a_run_of_a_long_name_is_started_with_valid_names(
    composed: Callable, started: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed("method=standard", "tracker.mode=offline", "tracker.tags=[mine,standard]")
    monkeypatch.setattr(Config, "run_name", lambda _: f"{'long-' * 40}s0-0123456789ab")
    settings = config.tracker.model_copy(
        update={"group": tracking.group(tmp_path / ("s" * 200) / ("t" * 200))}
    )
    config = config.replace(tracker=settings)
    with tracking.open(config, tmp_path, "student"):
        pass
    (given,) = started
    assert given["name"].endswith("-s0-0123456789ab")
    for kind, name in (
        ("name", given["name"]),
        ("group", given["group"]),
        ("job_type", given["job_type"]),
    ):
        assert validate_name(kind, name) == name
    assert list(given["tags"]) == ["mine", "standard"], "the method's name once"


def test_the_rules_need_no_wandb() -> None:
    code = (
        "import sys, kd.core.wandb_names; "
        "sys.exit('wandb' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert wandb_names.RULES["tag"].longest == 64
