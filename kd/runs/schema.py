"""Schemas of the files of runs and sweeps, and their validation.

A damaged file is reported, but never ends a report.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    RootModel,
    ValidationError,
    WrapValidator,
)
from pydantic_core import from_json, to_json

from kd.core.errors import first_line
from kd.runs.status import RunState

LARGEST = 1e30  # limit of numbers that are aggregated, so that their sums are finite

Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
JobRecord = dict[str, Any]  # the fields of a `Job`, by name
PathString = Annotated[str, Field(pattern=r"^[^\x00]+$")]
Bins = Annotated[list[Annotated[Number, Field(ge=0)]], Field(min_length=15, max_length=15)]


def _metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Check that the test accuracy is present, and that accuracies are fractions."""
    if "test_accuracy" not in metrics:
        raise ValueError("test_accuracy is missing")
    for name, value in metrics.items():
        if name.endswith("accuracy") and not 0 <= value <= 1:
            raise ValueError(f"{name} should be between 0 and 1")
    return metrics


Metrics = Annotated[dict[str, Number], AfterValidator(_metrics)]


class Required(BaseModel):
    """The fields of a file that the tables need; it may have more."""

    model_config = ConfigDict(strict=True)


class Named(Required):
    """A node that has a name."""

    name: str


class Trained(Required):
    """The training length of a student."""

    epochs: Count


class Config(Required):
    """The configuration of a run, in its result or config.yaml."""

    method: Named
    student: Trained
    batch_size: Count
    seed: Count


def _validate_and_keep(value: Any, validate: Callable[[Any], Any]) -> Any:
    validate(value)
    return value


# Checks the keys that the tables need, and keeps the whole configuration in its order
WholeConfig = Annotated[
    Config, WrapValidator(_validate_and_keep), PlainSerializer(lambda value: value)
]


class JobLocation(Required):
    """The directory of a planned job."""

    folder: PathString


class Job(JobLocation):
    """A planned job of a sweep, as it is written and read.

    Attributes:
        number: From 0. It names the job in logs, where it is counted from 1.
        taught: Whether the configuration chooses a teacher.
        baseline: The directory of the same student's run without a teacher.
        teachers: The directories of the runs that train its teachers.
        content: The fingerprint of the data set.
    """

    number: Count = 0
    config: WholeConfig
    overrides: list[str]
    taught: bool
    id: str | None = None
    baseline: PathString | None = None
    teachers: list[PathString] = []
    content: str | None = None


class Plan(RootModel[list[Any]]):
    """The jobs of a sweep; each is validated separately as a `Job`."""


class Study(Required):
    """The Optuna study of a sweep: its name, its storage, and the metric that it optimizes."""

    study: str
    storage: str
    objective: str = "val_accuracy"


class SweepCommand(Required):
    """How a sweep was started."""

    command: list[str]
    directory: str
    started: str
    environment: dict[str, Any] = {}


class StatusRecord(Required):
    """The contents of status.json."""

    state: Annotated[RunState, Field(strict=False)]
    reason: str = ""
    pid: Annotated[int, Field(gt=0, lt=2**31)] | None = None


class ModelSize(Required):
    """The parameters and multiply-accumulate operations of a model."""

    params: Count
    macs: Count


class Size(ModelSize):
    """The size of a student, and the number of parameters of the method itself."""

    method_params: Count


class Teacher(ModelSize):
    """The teacher of a run, with its own metrics.

    Attributes:
        source: The file of its weights, or one for each member of an ensemble.
        chosen: Whether the configuration chose it, rather than a self-taught method.
    """

    name: str
    metrics: Metrics
    source: str | list[str] = ""
    chosen: bool = True


class Samples(Required):
    """The number of samples."""

    train: Count
    val: Count = 0
    test: Count = 0


class Time(Required):
    """The training time and throughput.

    Attributes:
        packed: The number of interleaved runs that shared the time.
        resumed: How often the run was resumed.
        teacher_read: The fraction of images for which the teacher did not have to run.
    """

    train_seconds: Number
    images_per_second: Number
    packed: Count = 1
    resumed: Count = 0
    epoch_seconds: list[Number] = []
    teacher_read: Number | None = None


class Reliability(Required):
    """Per confidence bin: number of images, sum of their confidence, number of right ones."""

    images: Bins
    confidence: Bins
    right: Bins


class RunResult(Required):
    """The contents of result.json, as it is written and read.

    The fields with a default are missing from the results of earlier versions.
    """

    id: str
    method: str = ""
    student: str
    seed: Count = 0
    epochs: Count = 0
    metrics: Metrics
    teacher: Teacher | None
    reliability: Reliability | None = None
    size: Size
    time: Time
    content: str | None = None
    samples: Samples
    environment: Any = None  # shown, where it can be, and never needed
    config: WholeConfig | None = None


def read_record(kind: type[BaseModel], path: Path) -> tuple[Any, str]:
    """Read and validate a JSON or YAML file.

    Returns:
        (contents, "") if the file has all that `kind` requires, (None, problem) if it does not, and
        (None, "") if there is no such file.
    """
    try:
        content = path.read_bytes()
        value = (
            from_json(content)
            if path.suffix == ".json"
            else from_json(to_json(yaml.load(content, _YAML)))
        )
        if not (problem := find_error(kind, value)):
            return value, ""
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        problem = str(error.strerror)
    except Exception as error:  # PyYAML also raises errors that are not its own
        problem = first_line(error)
    return None, f"{path.name} is damaged: {problem}"


_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C loader is ten times as fast


def find_error(kind: type[BaseModel], value: Any) -> str:
    """Return the first validation error of a value on one line, or an empty text if it is valid."""
    try:
        kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            return f"{key} is missing"
        message = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    return ""
