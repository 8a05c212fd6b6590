"""The tree of the configuration, with the names of conf/config.yaml, and the identity of a run.

`kd.config.validate` makes a `Config` from what Hydra composed. Neither module depends on Hydra.
"""

import hashlib
import json
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, create_model

from kd import methods
from kd.core.errors import UserError
from kd.core.execution import Count, ExecutionSettings, TeacherExecutionSettings
from kd.core.settings import PathText, Seed, Settings, flatten, is_under, result_values
from kd.data import Description
from kd.models.ensemble import Average
from kd.optim import Optimizer, Schedule

# Increase it when the same configuration would train to other numbers. It renames every run and
# teacher.
IDENTITY_VERSION = 3

BatchSize = Annotated[int, Field(ge=2, le=1_000_000)]


class NetworkNode(Settings):
    """The node of a network in the configuration: the keys of its model and of its training.

    A node is an instance of a class that `node_class` makes, which has the fields of both.
    """

    network_class: ClassVar[type[Settings]]

    @property
    def network(self) -> Settings:
        """The settings of the model alone."""
        keys = self.network_class.model_fields
        return self.network_class.model_construct(**{key: getattr(self, key) for key in keys})

    @property
    def training(self) -> dict[str, Any]:
        """The values of the keys that are not the model's."""
        keys = [
            key for key in type(self).model_fields if key not in self.network_class.model_fields
        ]
        return {key: getattr(self, key) for key in keys}


class StudentSettings(NetworkNode):
    """The student's keys, besides those of its model."""

    epochs: Count
    label_fraction: Annotated[float, Field(gt=0, le=1)]


class EnsembleSettings(Settings):
    """Several teachers: how many, and what is averaged over them."""

    size: Annotated[int, Field(ge=1, le=100)]
    average: Average


class TeacherSettings(TeacherExecutionSettings, NetworkNode):
    """The teacher's keys, besides those of its model: how to train it, or where its weights are."""

    epochs: Count
    batch_size: BatchSize
    seed: Seed
    checkpoint: PathText | None
    ensemble: EnsembleSettings
    outputs: Literal["aligned", "misaligned"]
    optimizer: Optimizer
    schedule: Schedule


@cache
def node_class(training: type[NetworkNode], model: type[Settings]) -> type[NetworkNode]:
    """Return the class of a node with the fields of a model and of its training."""
    name = f"{model.__name__}{training.__name__}"
    combined: Any = create_model(name, __base__=(training, model))
    combined.network_class = model
    return cast(type[NetworkNode], combined)


def combine(training: type[NetworkNode], model: Settings, keys: dict[str, Any]) -> Any:
    """Return a node from checked settings of a model and checked keys of its training."""
    values = {key: getattr(model, key) for key in type(model).model_fields}
    return node_class(training, type(model)).model_construct(**values, **keys)


class ResultSettings(Settings):
    """The keys of the top level that can change a result.

    The keys of the first four nodes depend on a choice. The module of the choice types them.
    """

    method: Any
    student: Any
    teacher: Any
    data: Any
    optimizer: Optimizer
    schedule: Schedule
    batch_size: BatchSize
    seed: Seed
    precision: Literal["auto", "fp32", "bf16"]


class Config(ExecutionSettings, ResultSettings):
    """A checked configuration. See conf/config.yaml for the meaning of each key.

    Attributes:
        description: What is known of the data set before any pixel is read.
        sweep: The directory of the sweep, if the run is a job of one.
    """

    description: Annotated[Description, Field(exclude=True)]
    sweep: Annotated[Path | None, Field(exclude=True)] = None

    def replace(self, **changes: Any) -> "Config":
        """Return a copy with other values of some fields, which are not checked again."""
        values = {key: getattr(self, key) for key in type(self).model_fields}
        return self.model_construct(**{**values, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain values, in the form in which it was composed."""
        return self.model_dump()

    @property
    def method_class(self) -> Any:
        """The class of the chosen method, a subclass of `kd.methods.Method`."""
        return methods.find(self.method.name)

    @property
    def needs_teacher(self) -> bool:
        """Whether the chosen method needs a teacher."""
        return bool(self.method_class.needs_teacher)

    @property
    def chooses_teacher(self) -> bool:
        """Whether the node `teacher` determines the teacher, rather than a self-taught method."""
        return self.needs_teacher and not self.method_class.self_taught

    @property
    def misaligned(self) -> bool:
        """Whether the student deliberately learns from teacher outputs for other images."""
        return self.needs_teacher and self.teacher.outputs == "misaligned"

    @property
    def teacher_name(self) -> str:
        """The teacher's name for people: its model, and the number of members of an ensemble."""
        name = model_name(self.teacher)
        return name if self.teacher.ensemble.size == 1 else f"{self.teacher.ensemble.size} x {name}"

    def run_name(self) -> str:
        """Return the name of the run's directory: method, student and seed, then the identity."""
        method = f"{self.method.name}-misaligned" if self.misaligned else self.method.name
        return f"{method}-{model_name(self.student)}-s{self.seed}-{self.identity()}"

    # ---- identity

    def identity(self) -> str:
        """Return 12 hex digits that identify everything that can change the result.

        Keys that are annotated with an `Effect`, and the teacher if the method needs none, cannot
        change it and are left out.

        Raises:
            UserError: If the weights at `teacher.checkpoint` cannot be read.
        """
        return self._identity

    @cached_property
    def _identity(self) -> str:
        content = json.dumps(self.determinants(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def determinants(self) -> dict[str, Any]:
        """Return everything that `identity` hashes, by the dotted key of the configuration.

        Raises:
            UserError: If the weights at `teacher.checkpoint` cannot be read.
        """
        values = result_values(self)
        del values["teacher"]
        data = {**result_values(self.data), "content": self.description.fingerprint}
        keys = flatten({"version": IDENTITY_VERSION, **values, "data": data})
        if self.needs_teacher:
            keys |= {f"teacher.{key}": value for key, value in self._teacher_determinants().items()}
        return keys

    def _teacher_determinants(self) -> dict[str, Any]:
        teacher = self.teacher
        if teacher.checkpoint is not None:
            keys: dict[str, Any] = {"checkpoint": file_digest(Path(teacher.checkpoint))}
        else:
            shared = ("version", "precision", "data")  # equal to the student's
            keys = {
                key.removeprefix("student."): value
                for key, value in self.as_teacher().determinants().items()
                if not is_under(key, shared)
            }
        if teacher.ensemble.size > 1:
            keys |= flatten({"ensemble": teacher.ensemble.model_dump()})
        if self.misaligned:
            keys["outputs"] = teacher.outputs
        return keys

    # ---- the runs that this run depends on

    def as_standard(self) -> "Config":
        """Return the configuration of the same student, trained the same way without a teacher."""
        method = methods.find("standard").Config.model_validate({"name": "standard"})
        return self.replace(method=method, rerun=False)

    def as_teachers(self) -> "list[Config]":
        """Return the runs that train the teacher: one per member, each with its own seed."""
        first = self.as_teacher()
        return [first.replace(seed=first.seed + n) for n in range(self.teacher.ensemble.size)]

    def trained_teachers(self) -> "list[Config]":
        """Return the teachers that this run needs, and trains if they do not exist."""
        is_trained = self.needs_teacher and self.teacher.checkpoint is None
        return self.as_teachers() if is_trained else []

    def as_teacher(self) -> "Config":
        """Return the run that trains the teacher, or the first member of an ensemble.

        It is a `standard` run of the teacher's model with the teacher's recipe, or the previous
        generation of a self-taught student.
        """
        teacher = self.teacher
        previous_generation = self.method_class.previous_generation_config
        if (method := previous_generation(self.method)) is not None:
            generations = 0
            earlier = method
            while earlier is not None:
                generations += 1
                earlier = previous_generation(earlier)
            return self.replace(method=method, seed=teacher.seed + generations, rerun=False)
        training = {"epochs": teacher.epochs, "label_fraction": 1.0}
        return self.as_standard().replace(
            student=combine(StudentSettings, teacher.network, training),
            batch_size=teacher.batch_size,
            seed=teacher.seed,
            optimizer=teacher.optimizer,
            schedule=teacher.schedule,
        )


def run_dir(config: Config) -> Path:
    """Return the absolute directory of the run with this configuration."""
    return absolute(config.paths.runs) / config.run_name()


def absolute(path: str) -> Path:
    """Return `path` as an absolute path, with ~ expanded."""
    return Path(path).expanduser().absolute()


def model_name(model: Settings) -> str:
    """Return a model's name for people, such as cnn-16, or the `title` of its settings if any."""
    keys = model.model_dump()
    return getattr(model, "title", None) or "-".join(
        str(keys[k]) for k in ("name", "depth", "scale", "width") if k in keys
    )


def file_digest(path: Path) -> str:
    """Return the first 16 hex digits of the SHA-256 of a file of weights.

    Raises:
        UserError: If the file cannot be read.
    """
    try:
        status = path.expanduser().stat()
        return _digest(path.expanduser(), status.st_ino, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise UserError(f"teacher: cannot read weights from {path} ({error.strerror})") from error


@lru_cache(maxsize=64)
def _digest(path: Path, *version: int) -> str:
    """Read each version of a file only once: the jobs of a sweep share their teacher's weights."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
