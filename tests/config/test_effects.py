"""One annotation per field says whether it can change a result; all lists of keys follow it."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from kd.config.validate import validate_config
from kd.core.execution import EXECUTION_KEYS, ExecutionSettings
from kd.core.settings import Effect, flatten, is_under, keys_with
from kd.runs.labels import describe
from kd.runs.locate import _identifying_values
from kd.sweep.scheduler import group_compatible_jobs

OTHER = {  # another valid value, for keys of which it cannot be derived from the present one
    "seeds": [5, 6],
    "device": "cuda:3",
    "cpu_kernels": "torch",
    "threads": 7,
    "precision": "bf16",
    "schedule.name": "cosine",
    "teacher.schedule.name": "cosine",
    "schedule.milestones": [0.25],
    "teacher.schedule.milestones": [0.25],
    "student.activation": "elu",
    "teacher.activation": "elu",
    "teacher.outputs": "misaligned",
    "teacher.cache.fill": "lazy",
    "student.label_fraction": 0.5,
    "data.mean": [0.1, 0.2, 0.3],
    "data.std": [0.1, 0.2, 0.3],
    "data.val_size": 100,
    "data.augment.padding_mode": "reflect",
    "checkpoint.every_n_epochs": None,
    "tracker.mode": "offline",
    "tracker.tags": ["a"],
    "method.alpha": 0.123,
}
# The choices themselves, a file that is not there, and what has no effect without another key
OMITTED = ("method.name", "student.name", "teacher.name", "data.name", "optimizer.name",
           "teacher.optimizer.name", "teacher.checkpoint", "teacher.ensemble.average",
           "schedule.gamma", "teacher.schedule.gamma")  # fmt: skip


def other(key: str, value: Any) -> Any:
    """Return another valid value of a key."""
    if key in OTHER:
        return OTHER[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 if value else 0.5
    return "another"


def changed(config: Mapping[str, Any], key: str, path: str = "") -> dict[str, Any]:
    """Return a configuration with another value of one dotted key."""
    node, _, rest = key.partition(".")
    here = f"{path}{node}"
    inner = changed(config[node], rest, f"{here}.") if rest else other(here, config[node])
    return {**config, node: inner}


def test_each_key_is_either_of_the_identity_or_of_the_execution(composed: Callable) -> None:
    config = composed("method=logits", "data=digits")
    plain = config.to_dict()
    tested = set()
    for key in flatten(plain):
        if key in OMITTED:
            continue
        twin = validate_config(changed(plain, key))
        assert twin.to_dict() != plain, key
        identifies = not is_under(key, EXECUTION_KEYS)
        assert (twin.identity() != config.identity()) == identifies, key
        assert (twin.determinants() != config.determinants()) == identifies, key
        values = _identifying_values(twin.to_dict())
        assert (values != _identifying_values(plain)) == identifies, key
        tested.add(key)
    assert len(tested) > 50


def job(config: dict[str, Any], number: int) -> dict[str, Any]:
    return {"number": number, "folder": str(number), "config": config, "taught": True}


@pytest.mark.parametrize(
    "key",
    [
        "checkpoint.every_n_minutes",
        "test_outputs.max_mb",
        "rerun",
        "cpu_kernels",
        "teacher.cache.feature_maps",
    ],
)
def test_keys_of_the_execution_name_no_setting(key: str, composed: Callable) -> None:
    plain = composed("method=logits", "data=digits").to_dict()
    names = describe([job(plain, 0), job(changed(plain, key), 1)])
    assert names.full == ["logits", "logits"]
    assert not names.swept


def test_jobs_of_one_process_may_differ_in_what_has_no_effect(composed: Callable) -> None:
    plain = composed("method=logits", "data=digits").to_dict()
    for key in flatten(plain):
        if key.split(".")[0] not in ExecutionSettings.model_fields:
            continue
        packs = group_compatible_jobs([job(plain, 0), job(changed(plain, key), 1)], 2)
        assert (len(packs) == 1) == is_under(key, keys_with(ExecutionSettings, Effect.NONE)), key


def test_a_resumed_run_keeps_what_changes_the_last_bits() -> None:
    rounding = keys_with(ExecutionSettings, Effect.ROUNDING)
    assert rounding == ("device", "cpu_kernels", "compile", "threads")
