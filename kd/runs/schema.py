"""What the files of runs and sweeps must say to be used, and how they are read: a damaged one never ends a report."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, RootModel, ValidationError
from pydantic_core import from_json, to_json

from kd.core.errors import first_line

LARGEST = 1e30  # of numbers that are counted: their sums are finite

Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
PathString = Annotated[str, Field(pattern=r"^[^\x00]+$")]
Bins = Annotated[list[Annotated[Number, Field(ge=0)]], Field(min_length=15, max_length=15)]


def _metrics(found: dict[str, float]) -> dict[str, float]:
    if "test_accuracy" not in found:
        raise ValueError("test_accuracy is missing")
    for name, value in found.items():
        if name.endswith("accuracy") and not 0 <= value <= 1:
            raise ValueError(f"{name} should be 0 to 1")
    return found


Metrics = Annotated[dict[str, Number], AfterValidator(_metrics)]


class Required(BaseModel):
    """What the tables need of a file. More may be in it."""

    model_config = ConfigDict(strict=True)


class Named(Required):
    name: str


class Trained(Required):
    epochs: Count


class Config(Required):
    method: Named
    student: Trained
    batch_size: Count
    seed: Count


class JobLocation(Required):
    folder: PathString


class Job(JobLocation):
    config: Config
    overrides: list[str]
    taught: bool
    id: str | None = None
    baseline: PathString | None = None
    teachers: list[PathString] = []
    content: str | None = None


class Plan(RootModel[list[Any]]):
    """Each `Job` for itself."""


class Study(Required):
    study: str
    storage: str


class SweepCommand(Required):
    """How a sweep was started."""

    command: list[str]
    directory: str
    started: str
    environment: dict[str, Any] = {}


class StatusRecord(Required):
    """What `status` reads."""

    state: Literal["planned", "running", "done", "failed", "diverged", "pruned", "killed"]
    reason: str = ""
    pid: Annotated[int, Field(gt=0, lt=2**31)] | None = None


class ModelSize(Required):
    params: Count
    macs: Count


class Size(ModelSize):
    method_params: Count


class Teacher(ModelSize):
    name: str
    metrics: Metrics


class Samples(Required):
    train: Count


class Time(Required):
    train_seconds: Number
    images_per_second: Number


class Reliability(Required):
    images: Bins
    confidence: Bins
    right: Bins


class Result(Required):
    id: str
    student: str
    metrics: Metrics
    teacher: Teacher | None
    size: Size
    time: Time
    samples: Samples
    reliability: Reliability | None = None
    content: str | None = None
    config: Config | None = None


def read_record(kind: type[BaseModel], path: Path) -> tuple[Any, str]:
    """(What a JSON or YAML file says, "") if all that `kind` needs is there; (None, what is wrong with it) if not;
    (None, "") without the file."""
    try:
        said = path.read_bytes()
        value = (
            from_json(said)
            if path.suffix == ".json"
            else from_json(to_json(yaml.load(said, _YAML)))
        )
        if not (wrong := find_error(kind, value)):
            return value, ""
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        wrong = str(error.strerror)
    except Exception as error:  # PyYAML raises whatever it comes upon
        wrong = first_line(error)
    return None, f"{path.name} is damaged: {wrong}"


_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C reads ten times as fast


def find_error(kind: type[BaseModel], value: Any) -> str:
    """What `kind` needs and this is not, or an empty text."""
    try:
        kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            return f"{key} is missing"
        what = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
        return f"{key}: {what}" if key else what
    return ""
