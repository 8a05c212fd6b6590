"""The settings of where and how runs are executed, which do not identify a run.

They are separate from the rest of the configuration because reports need them and do not import
torch: two runs that differ only in these keys count as one setting.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from kd.core.settings import Effect, PathText, Settings, Text, keys_with
from kd.core.wandb_names import Entity, Group, Project, Tag

Count = Annotated[int, Field(gt=0, le=1_000_000)]
MAX_OUTPUTS_MB = 1000.0  # of the outputs for the test images; reports read no larger file


class TrackerSettings(Settings):
    """The settings of Weights & Biases, which mirrors the run's own files."""

    mode: Literal["auto", "online", "offline", "disabled"]
    project: Project | None
    entity: Entity | None
    group: Group | None
    tags: list[Tag] | None
    notes: Text | None
    samples: Annotated[int, Field(ge=0, le=256)]
    artifacts: bool
    timeout: int = Field(ge=1, le=600)


class CheckpointSettings(Settings):
    """How often a run writes a checkpoint from which it can be resumed."""

    every_n_epochs: Count | None
    every_n_minutes: Annotated[float, Field(gt=0)] | None


class OutputSettings(Settings):
    """What is kept of the outputs for the test images: the maximum size of the file in MB (1e6 B).

    Logits that do not fit are left out; with 0 nothing is kept.
    """

    max_mb: float = Field(ge=0, le=MAX_OUTPUTS_MB)


class ReportSettings(Settings):
    """How a report judges: differences of accuracy up to the margin, in points, count as none."""

    margin: Annotated[float, Field(gt=0, le=100)]


class PathSettings(Settings):
    """The directories of runs, and of cached data and downloads."""

    runs: PathText
    cache: PathText


class TeacherCacheSettings(Settings):
    """The cache of teacher outputs: its maximum size, what it holds and when it is filled."""

    max_gb: float = Field(ge=0)
    feature_maps: bool
    fill: Literal["auto", "lazy", "eager"]


class ExecutionSettings(Settings):
    """The keys of the top level that do not identify a run."""

    seeds: Annotated[list[int] | None, Effect.NONE] = None
    device: Annotated[str, Effect.ROUNDING]
    cpu_kernels: Annotated[Literal["auto", "torch"], Effect.ROUNDING]
    compile: Annotated[bool, Effect.ROUNDING]
    threads: Annotated[Annotated[int, Field(gt=0, le=1024)] | None, Effect.ROUNDING]
    checkpoint: Annotated[CheckpointSettings, Effect.NONE]
    test_outputs: Annotated[OutputSettings, Effect.NONE]
    report: Annotated[ReportSettings, Effect.NONE]
    tracker: Annotated[TrackerSettings, Effect.NONE]
    paths: Annotated[PathSettings, Effect.NONE]
    rerun: Annotated[bool, Effect.NONE]

    @field_validator("device")
    @classmethod
    def _known(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
            raise ValueError(
                f"{device!r} is not known; allowed: auto, cpu, mps, cuda, cuda:0, cuda:1, ..."
            )
        return device

    @field_validator("seeds", mode="before")
    @classmethod
    def _distinct(cls, seeds: Any) -> list[int] | None:
        return check_seeds(seeds)


class TeacherExecutionSettings(Settings):
    """The keys of the teacher that do not identify a run."""

    cache: Annotated[TeacherCacheSettings, Effect.NONE]


EXECUTION_KEYS = (
    *keys_with(ExecutionSettings, *Effect),
    *(f"teacher.{key}" for key in keys_with(TeacherExecutionSettings, *Effect)),
)


def check_seeds(seeds: Any) -> list[int] | None:
    """Return `seeds` if it is None or a list of distinct seeds.

    Raises:
        ValueError: If it is anything else.
    """
    if seeds is None:
        return None
    valid = isinstance(seeds, list) and all(
        type(seed) is int and 0 <= seed < 2**63 for seed in seeds
    )
    if not valid or not seeds or len(set(seeds)) < len(seeds):
        got = repr(seeds)
        raise ValueError(
            f"should be a list of distinct seeds such as [0,1,2], or null, got {got[:100]}"
        )
    return list(seeds)
