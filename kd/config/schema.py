"""The whole configuration, typed and checked, and the identity that it gives a run.

`validate_config` turns the plain dictionary that Hydra composed into a `Config`, or raises one
UserError. It does not depend on Hydra. Everything that can be refused without decoding an image is
refused here, before any work.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import Field, ValidationError, field_validator

from kd import data, methods, models
from kd.config import wandb_env
from kd.config.wandb_names import Entity, Group, Project, Tag
from kd.core.errors import UserError, unknown_key
from kd.core.settings import PathText, Seed, Settings, Text, flatten
from kd.data import Description
from kd.models import weights
from kd.models.ensemble import Ensemble, Mean
from kd.optim import VARIANTS, Optimizer, Schedule

# Increase it when the same configuration would train to other numbers. It renames every run and
# teacher.
IDENTITY_VERSION = 2

Count = Annotated[int, Field(gt=0, le=1_000_000)]
BatchSize = Annotated[int, Field(ge=2, le=1_000_000)]


class StudentSettings(Settings):
    """The student's keys, besides those of its model."""

    epochs: Count
    labels: Annotated[float, Field(gt=0, le=1)]


class TeacherCacheSettings(Settings):
    """The cache of teacher outputs: its maximum size, what it holds and when it is filled."""

    gigabytes: float = Field(ge=0)
    maps: bool
    fill: Literal["auto", "lazy", "whole"]


class TeacherSettings(Settings):
    """The teacher's keys, besides those of its model: how to train it, or where its weights are."""

    epochs: Count
    batch_size: BatchSize
    seed: Seed
    checkpoint: PathText | None
    members: Annotated[int, Field(ge=1, le=100)]
    mean: Mean
    outputs: Literal["aligned", "misaligned"]
    store: TeacherCacheSettings
    optimizer: Optimizer
    schedule: Schedule


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

    epochs: Count | None
    minutes: Annotated[float, Field(gt=0)] | None


class PathSettings(Settings):
    """The directories of runs, and of cached data and downloads."""

    runs: PathText
    cache: PathText


class RootSettings(Settings):
    """The top level of the configuration.

    Nodes whose keys depend on a choice (`dict[str, Any]`) are typed by the module of that choice.
    """

    method: dict[str, Any]
    student: dict[str, Any]
    teacher: dict[str, Any]
    data: dict[str, Any]
    optimizer: Optimizer
    schedule: Schedule
    batch_size: BatchSize
    seed: Seed
    seeds: list[int] | None = None
    device: str
    precision: Literal["auto", "fp32", "bf16"]
    kernels: Literal["auto", "torch"]
    compile: bool
    threads: Annotated[int, Field(gt=0, le=1024)] | None
    checkpoint: CheckpointSettings
    tracker: TrackerSettings
    paths: PathSettings
    rerun: bool

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


@dataclass(frozen=True)
class Config:
    """A checked configuration. See conf/config.yaml for the meaning of each key."""

    root: RootSettings
    method: Any  # the settings class of the chosen method; likewise below
    student: Any
    epochs: int
    labels: float
    teacher: Any
    teacher_settings: TeacherSettings
    data: Any
    description: Description
    sweep: Path | None = None  # the directory of the sweep, if the run is a job of one

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
        return self.needs_teacher and self.teacher_settings.outputs == "misaligned"

    def identity(self) -> str:
        """Return 12 hex digits that identify everything that determines the result.

        Paths, the tracker, the device, threads, and the teacher if the method needs none, do not
        determine it and are left out.

        Raises:
            UserError: If the weights at `teacher.checkpoint` cannot be read.
        """
        return self._identity

    @cached_property
    def _identity(self) -> str:
        teacher: Any = None
        if self.needs_teacher:
            checkpoint = self.teacher_settings.checkpoint
            members = (
                [config.identity() for config in self.as_teachers()]
                if checkpoint is None
                else [file_digest(Path(checkpoint))]
            )
            teacher = (
                members[0]
                if len(members) == 1
                else {"members": members, "mean": self.teacher_settings.mean}
            )
            if self.misaligned:
                teacher = {"misaligned": teacher}
        content = {**self._own_determinants(), "teacher": teacher}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def _own_determinants(self) -> dict[str, Any]:
        """Return everything that determines the result, except the teacher."""
        label_fraction = {} if self.labels == 1 else {"labels": self.labels}
        return {
            "recipe": IDENTITY_VERSION,
            "root": self.root.model_dump(
                include={"optimizer", "schedule", "batch_size", "seed", "precision"}
            ),
            "method": self.method.model_dump(),
            "student": {**self.student.model_dump(), "epochs": self.epochs, **label_fraction},
            "data": {
                **self.data.model_dump(exclude={"root"}),
                "content": self.description.fingerprint,
            },
        }

    def determinants(self) -> dict[str, Any]:
        """Return everything that `identity` hashes, by the dotted key of the configuration.

        Raises:
            UserError: If the weights at `teacher.checkpoint` cannot be read.
        """
        own = self._own_determinants()
        keys = flatten(
            {**own.pop("root"), **own, "student": {**own["student"], "labels": self.labels}}
        )
        if not self.needs_teacher:
            return keys
        if self.teacher_settings.checkpoint is not None:
            teacher: dict[str, Any] = {
                "checkpoint": file_digest(Path(self.teacher_settings.checkpoint))
            }
        else:
            shared = ("recipe", "precision", "data.")  # equal to the student's
            first = self.as_teachers()[0].determinants()
            teacher = {
                k.removeprefix("student."): v for k, v in first.items() if not k.startswith(shared)
            }
        if self.teacher_settings.members > 1:
            teacher |= {
                "members": self.teacher_settings.members,
                "mean": self.teacher_settings.mean,
            }
        if self.misaligned:
            teacher["outputs"] = "misaligned"
        return keys | {f"teacher.{key}": value for key, value in teacher.items()}

    def run_name(self) -> str:
        """Return the name of the run's directory: method, student and seed, then the identity."""
        method = f"{self.method.name}-misaligned" if self.misaligned else self.method.name
        return f"{method}-{model_name(self.student)}-s{self.root.seed}-{self.identity()}"

    def as_standard(self) -> "Config":
        """Return the configuration of the same student, trained the same way without a teacher."""
        method = methods.find("standard").Config.model_validate({"name": "standard"})
        return replace(self, method=method, root=self.root.model_copy(update={"rerun": False}))

    @property
    def teacher_name(self) -> str:
        """The teacher's name for people: its model, and the number of members of an ensemble."""
        name = model_name(self.teacher)
        return (
            name
            if self.teacher_settings.members == 1
            else f"{self.teacher_settings.members} x {name}"
        )

    def as_teachers(self) -> "list[Config]":
        """Return the runs that train the teacher: one per member, each with its own seed."""
        first = self.as_teacher()
        seeds = (first.root.seed + n for n in range(self.teacher_settings.members))
        return [replace(first, root=first.root.model_copy(update={"seed": seed})) for seed in seeds]

    def trained_teachers(self) -> "list[Config]":
        """Return the teachers that this run needs, and trains if they do not exist."""
        return (
            self.as_teachers()
            if self.needs_teacher and self.teacher_settings.checkpoint is None
            else []
        )

    def as_teacher(self) -> "Config":
        """Return the run that trains the teacher, or the first member of an ensemble.

        It is a `standard` run of the teacher's model with the teacher's recipe, or the previous
        generation of a self-taught student.
        """
        previous_generation = self.method_class.previous_generation_config
        if (method := previous_generation(self.method)) is not None:
            generations = 0
            earlier = method
            while earlier is not None:
                generations += 1
                earlier = previous_generation(earlier)
            root = self.root.model_copy(
                update={"seed": self.teacher_settings.seed + generations, "rerun": False}
            )
            return replace(self, method=method, root=root)
        recipe = self.teacher_settings.model_dump(include={"batch_size", "seed"})
        recipe |= {
            "optimizer": self.teacher_settings.optimizer,
            "schedule": self.teacher_settings.schedule,
        }
        standard = self.as_standard()
        root = standard.root.model_copy(update=recipe)
        epochs = self.teacher_settings.epochs
        return replace(standard, root=root, student=self.teacher, epochs=epochs, labels=1.0)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain values, in the form in which it was composed."""
        return {
            **self.root.model_dump(),
            "method": self.method.model_dump(),
            "student": {**self.student.model_dump(), "epochs": self.epochs, "labels": self.labels},
            "teacher": {**self.teacher.model_dump(), **self.teacher_settings.model_dump()},
            "data": self.data.model_dump(),
        }


def run_dir(config: Config) -> Path:
    """Return the absolute directory of the run with this configuration."""
    return absolute(config.root.paths.runs) / config.run_name()


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


def validate_config(composed: Mapping[str, Any], memo: dict[Any, Any] | None = None) -> Config:
    """Return the typed and checked configuration.

    Args:
        composed: The composed configuration, as plain data.
        memo: Remembers what has been checked about files and networks. Pass the same dictionary
            when validating many configurations, to check each only once.

    Raises:
        UserError: If anything is invalid; one line that names the key and what is allowed.
    """
    memo = {} if memo is None else memo
    root = parse_settings(RootSettings, composed, "")
    root = root.model_copy(
        update={"tracker": wandb_env.apply_environment(root.tracker, root.tracker.mode)}
    )
    method = parse_settings(methods.find(root.method.get("name")).Config, root.method, "method")
    student, student_settings = _parse_model(root.student, StudentSettings, "student")
    teacher, teacher_settings = _parse_model(root.teacher, TeacherSettings, "teacher")
    dataset = parse_settings(data.find(root.data.get("name")).Config, root.data, "data")
    description = _memoize(memo, dataset.model_dump_json(), lambda: data.describe(dataset))
    if methods.find(method.name).self_taught:
        if teacher_settings.checkpoint is not None or teacher_settings.members != 1:
            key, allowed = (
                ("members", "1") if teacher_settings.checkpoint is None else ("checkpoint", "null")
            )
            raise UserError(
                f"teacher.{key}: {method.name} is taught only by its own previous generation; "
                f"allowed: {allowed}"
            )
        recipe = {
            "epochs": student_settings.epochs,
            **{k: getattr(root, k) for k in ("batch_size", "optimizer", "schedule")},
        }
        teacher = student
        teacher_settings = teacher_settings.model_copy(update=recipe)
    config = Config(
        root,
        method,
        student,
        student_settings.epochs,
        student_settings.labels,
        teacher,
        teacher_settings,
        dataset,
        description,
    )

    if description.val >= description.train and not description.own_val:
        limit = description.train - 1
        raise UserError(
            f"data.val_size: {description.val} leaves nothing to train on; allowed: 0 to {limit}"
        )
    _check_labels(config)
    nets: dict[str, Any] = {}
    shapes: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    for side, model in (("student", student), ("teacher", teacher)):
        versions[side] = model.model_dump_json(), len(description.classes), description.size
        build = partial(_build_meta, model, description, side)
        nets[side], shapes[side] = _memoize(memo, ("net", *versions[side]), build)
    if config.misaligned and (config.method_class.mixed or config.method_class.self_taught):
        reason = (
            "blends images"
            if config.method_class.mixed
            else "is taught by its own previous generation"
        )
        raise UserError(
            f"teacher.outputs: {method.name} {reason} and cannot be misaligned; allowed: aligned"
        )
    if teacher_settings.members > 1 and teacher_settings.checkpoint is not None:
        raise UserError(
            "teacher.members: teacher.checkpoint holds a single teacher, "
            f"not {teacher_settings.members}; allowed: 1"
        )
    if config.needs_teacher and teacher_settings.checkpoint is not None:
        path = Path(teacher_settings.checkpoint).expanduser()
        expected = description.classes, description.size
        _memoize(
            memo,
            (path, teacher.model_dump_json(), expected),
            lambda: weights.validate_weights(path, nets["teacher"], *expected),
        )
    if teacher_settings.members > 1:
        nets["teacher"] = Ensemble([nets["teacher"]], teacher_settings.mean)
        shapes["teacher"] = nets["teacher"].shapes_of(shapes["teacher"])
    content = (
        method.model_dump_json(),
        *versions.values(),
        teacher_settings.members,
        description.train,
        student_settings.epochs,
    )
    _memoize(memo, ("method", *content), lambda: _check_method(config, nets, shapes))
    return config


def _check_method(config: Config, nets: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    """Refuse a method that does not fit these networks."""
    description = config.description
    members = config.teacher_settings.members
    context = methods.MethodContext(
        shapes["student"],
        shapes["teacher"],
        len(description.classes),
        description.train,
        nets["student"],
        nets["teacher"],
        config.epochs,
    )
    try:
        config.method_class.check(config.method, context)
    except ValueError as error:
        hint = f" (teacher.members={members}: an ensemble has only logits)" if members > 1 else ""
        raise UserError(f"method.{error}{hint}") from error


def takes_integers(composed: Mapping[str, Any], key: str) -> bool:
    """Return whether a dotted key takes integers only, under the choices in `composed`."""
    group, *path = key.split(".")
    schemas: list[type[Settings]] = [RootSettings]
    if path:
        name = composed[group].get("name") if isinstance(composed.get(group), Mapping) else None
        chosen: dict[str, Callable[[], list[type[Settings]]]] = {
            "method": lambda: [methods.find(name).Config],
            "student": lambda: [models.find(name, "student").Config, StudentSettings],
            "teacher": lambda: [models.find(name, "teacher").Config, TeacherSettings],
            "data": lambda: [data.find(name).Config],
        }
        schemas = chosen[group]() if group in chosen else _inner_models(schemas, group)
    for inner in path[:-1]:
        schemas = _inner_models(schemas, inner)
    types = _types_of(schemas, path[-1] if path else group)
    return int in types and float not in types


def _inner_models(schemas: list[type[Settings]], field: str) -> list[type[Settings]]:
    """Return the settings classes among the types of a field."""
    return [
        annotation
        for annotation in _types_of(schemas, field)
        if isinstance(annotation, type) and issubclass(annotation, Settings)
    ]


def _types_of(schemas: list[type[Settings]], field: str) -> list[Any]:
    """Return the types of a field, with unions and annotations taken apart."""
    pending = [
        schema.model_fields[field].annotation for schema in schemas if field in schema.model_fields
    ]
    types = []
    while pending:
        annotation = pending.pop()
        types.append(annotation)
        pending += get_args(annotation)
    return types


def _check_labels(config: Config) -> None:
    """Refuse a fraction of the labels that leaves too few, or that the method cannot train with."""
    fraction = config.labels
    description = config.description
    images = description.train - (0 if description.own_val else description.val)
    classes = len(description.classes)
    labelled = round(fraction * images)
    if fraction < 1 and labelled < classes:
        raise UserError(
            f"student.labels: {fraction:g} of {images:,} images leaves {labelled:,} labelled; "
            f"at least {classes:,} are needed (one per class)"
        )
    if fraction < 1 and config.method_class.self_taught:
        # The seed chooses which labels are given, and each generation has another seed
        raise UserError(
            f"student.labels: each generation of {config.method.name} would get other labelled "
            "images; allowed: 1"
        )
    if fraction < 1 and config.method_class.needs_labels(config.method):
        raise UserError(
            f"student.labels: {config.method.name} needs the label of every image; allowed: 1"
        )


def _memoize(memo: dict[Any, Any], key: Any, compute: Callable[[], Any]) -> Any:
    if key not in memo:
        memo[key] = compute()
    return memo[key]


def _parse_model(node: dict[str, Any], training: type[Settings], side: str) -> tuple[Any, Any]:
    """Split a network's node into the settings of its model and those of its training."""
    schema = models.find(node.get("name"), side).Config
    training_keys = {k: v for k, v in node.items() if k in training.model_fields}
    model_keys = {k: v for k, v in node.items() if k not in training_keys}
    model = parse_settings(schema, model_keys, side, list(training.model_fields))
    return model, parse_settings(training, training_keys, side)


def _build_meta(
    model: Settings, description: Description, side: str
) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """Return the network without weights, and the shapes of its taps."""
    try:
        with torch.device("meta"):
            net = models.build(model, len(description.classes), description.size)
        return net, net.shapes(description.size)
    except UserError as error:  # its message begins with a key of the model
        raise UserError(f"{side}.{error}") from error
    except RuntimeError as error:
        name = model_name(model)
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{side}.name: {name} cannot take images of {description.size} pixels ({reason})"
        ) from error


def parse_settings(
    settings: type[Settings], node: Mapping[str, Any], where: str, also: list[str] | None = None
) -> Any:
    """Return `settings` filled from a node of the configuration.

    Args:
        settings: The class to fill.
        node: The keys and values.
        where: The dotted path of the node, for error messages.
        also: Other keys that are valid at this path, for error messages.

    Raises:
        UserError: If a key or value is invalid; the message names the first by its dotted path.
    """
    try:
        return settings.model_validate(dict(node))
    except ValidationError as error:
        raise UserError(_error_line(settings, error, where, also or [])) from None


def _error_line(
    settings: type[Settings], error: ValidationError, where: str, also: list[str]
) -> str:
    """Describe the first validation error in one line; an unknown key counts as the first."""
    first = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")[0]
    kind = first["type"]
    value = first["input"]
    inner = settings
    location: list[str] = []
    for name in map(str, first["loc"]):
        if name in VARIANTS:  # pydantic puts the tag of the chosen variant into the path
            inner = VARIANTS[name]
            continue
        location.append(name)
        field = inner.model_fields[name].annotation if name in inner.model_fields else None
        inner = field if isinstance(field, type) and issubclass(field, Settings) else inner
    path = ".".join([where, *location]).strip(".")
    if kind == "missing":
        return f"{path}: this key is missing"
    if kind == "extra_forbidden":
        return unknown_key(path, [*inner.model_fields, *also])
    if kind == "value_error":
        return f"{path}: {first['msg'].removeprefix('Value error, ')}"
    if kind == "union_tag_invalid":
        return f"{path}.name: {value.get('name')!r} is not known; allowed: {', '.join(VARIANTS)}"
    message = (
        "should be a finite number"
        if kind == "finite_number"
        else first["msg"].removeprefix("Input ")
    )
    got = repr(value)
    return f"{path}: {message}, got {got if len(got) < 200 else f'{got[:150]} ...'}"
