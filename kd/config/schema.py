"""The whole configuration, typed and checked, and the identity that it gives a run.

`check` turns the plain dictionary that Hydra composed into a `Config`, or raises one UserError. It knows nothing of
Hydra. Everything that can be refused without decoding an image is refused here, before any work.
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
from kd.models import weights as store
from kd.models.ensemble import Ensemble, Mean
from kd.optim import VARIANTS, Optimizer, Schedule

IDENTITY_VERSION = 2  # raise it when the same configuration would train to other numbers: it renames every run and teacher

Count = Annotated[int, Field(gt=0, le=1_000_000)]
BatchSize = Annotated[int, Field(ge=2, le=1_000_000)]


class StudentSettings(Settings):
    """What is said of the student beside its model's own keys."""

    epochs: Count
    labels: Annotated[float, Field(gt=0, le=1)]


class TeacherCacheSettings(Settings):
    """Where teacher outputs are kept for later: how much of the disk they may take, and what is kept."""

    gigabytes: float = Field(ge=0)
    maps: bool
    fill: Literal["auto", "lazy", "whole"]


class TeacherSettings(Settings):
    """What is said of the teacher beside its model's own keys: its recipe, or where its weights are."""

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
    """Weights & Biases: a mirror of what the run's own files say."""

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
    """How often a run writes down where it is, to go on from there."""

    epochs: Count | None
    minutes: Annotated[float, Field(gt=0)] | None


class PathSettings(Settings):
    runs: PathText
    cache: PathText


class RootSettings(Settings):
    """The top of the configuration. Nodes whose keys depend on a choice (`Any`) are typed by that choice's module."""

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
    """Return `seeds` if it is null or a list of distinct seeds. **Raises:** ValueError."""
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
    """A checked configuration. See conf/config.yaml for what each key means."""

    root: RootSettings
    method: Any  # the settings class of the chosen method; likewise below
    student: Any
    epochs: int
    labels: float
    teacher: Any
    teacher_settings: TeacherSettings
    data: Any
    description: Description
    sweep: Path | None = None  # the directory of the sweep that the run is a job of

    @property
    def method_class(self) -> Any:
        return methods.find(self.method.name)

    @property
    def needs_teacher(self) -> bool:
        return self.method_class.needs_teacher

    @property
    def chooses_teacher(self) -> bool:
        """Is the teacher that `teacher` says the one that teaches?"""
        return self.needs_teacher and not self.method_class.self_taught

    @property
    def misaligned(self) -> bool:
        """Is the student taught by what the teacher says of other images, on purpose?"""
        return self.needs_teacher and self.teacher_settings.outputs == "misaligned"

    def identity(self) -> str:
        """12 hex digits that name all that determines the result, and nothing that does not (paths, the tracker, the
        device, threads, and the teacher where the method needs none)."""
        return self._identity

    @cached_property
    def _identity(self) -> str:
        taught_by: Any = None
        if self.needs_teacher:
            checkpoint = self.teacher_settings.checkpoint
            each = (
                [one.identity() for one in self.as_teachers()]
                if checkpoint is None
                else [file_digest(Path(checkpoint))]
            )
            taught_by = (
                each[0] if len(each) == 1 else {"members": each, "mean": self.teacher_settings.mean}
            )
            if self.misaligned:
                taught_by = {"misaligned": taught_by}
        said = {**self._own(), "teacher": taught_by}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]

    def _own(self) -> dict[str, Any]:
        """What determines the result beside the teacher."""
        few = {} if self.labels == 1 else {"labels": self.labels}
        return {
            "recipe": IDENTITY_VERSION,
            "root": self.root.model_dump(
                include={"optimizer", "schedule", "batch_size", "seed", "precision"}
            ),
            "method": self.method.model_dump(),
            "student": {**self.student.model_dump(), "epochs": self.epochs, **few},
            "data": {
                **self.data.model_dump(exclude={"root"}),
                "content": self.description.fingerprint,
            },
        }

    def determinants(self) -> dict[str, Any]:
        """All that `identity` hashes, by the dotted key of the configuration that determines it."""
        own = self._own()
        keys = flatten(
            {**own.pop("root"), **own, "student": {**own["student"], "labels": self.labels}}
        )
        if not self.needs_teacher:
            return keys
        if self.teacher_settings.checkpoint is not None:
            taught_by: dict[str, Any] = {
                "checkpoint": file_digest(Path(self.teacher_settings.checkpoint))
            }
        else:
            shared = ("recipe", "precision", "data.")  # equal to the student's
            first = self.as_teachers()[0].determinants()
            taught_by = {
                k.removeprefix("student."): v for k, v in first.items() if not k.startswith(shared)
            }
        if self.teacher_settings.members > 1:
            taught_by |= {
                "members": self.teacher_settings.members,
                "mean": self.teacher_settings.mean,
            }
        if self.misaligned:
            taught_by["outputs"] = "misaligned"
        return keys | {f"teacher.{key}": value for key, value in taught_by.items()}

    def run_name(self) -> str:
        """The name of the run's directory: for people first, then the identity."""
        method = f"{self.method.name}-misaligned" if self.misaligned else self.method.name
        return f"{method}-{model_name(self.student)}-s{self.root.seed}-{self.identity()}"

    def as_standard(self) -> "Config":
        """The same student, trained the same way, without a teacher."""
        method = methods.find("standard").Config.model_validate({"name": "standard"})
        return replace(self, method=method, root=self.root.model_copy(update={"rerun": False}))

    @property
    def teacher_name(self) -> str:
        """For people: the model, and how many of it."""
        name = model_name(self.teacher)
        return (
            name
            if self.teacher_settings.members == 1
            else f"{self.teacher_settings.members} x {name}"
        )

    def as_teachers(self) -> "list[Config]":
        """The runs that train the teacher: one, or for an ensemble as many as it has members, each with its seed."""
        first = self.as_teacher()
        seeds = (first.root.seed + n for n in range(self.teacher_settings.members))
        return [replace(first, root=first.root.model_copy(update={"seed": seed})) for seed in seeds]

    def trained_teachers(self) -> "list[Config]":
        """Those of them that this run needs, and trains if they are not there."""
        return (
            self.as_teachers()
            if self.needs_teacher and self.teacher_settings.checkpoint is None
            else []
        )

    def as_teacher(self) -> "Config":
        """The run that trains the teacher: a `standard` run of the teacher's model by the teacher's recipe, or the
        generation before a self-taught student."""
        before = self.method_class.previous_generation_config
        if (method := before(self.method)) is not None:
            generations, earlier = 0, method
            while earlier is not None:
                generations, earlier = generations + 1, before(earlier)
            root = self.root.model_copy(
                update={"seed": self.teacher_settings.seed + generations, "rerun": False}
            )
            return replace(self, method=method, root=root)
        recipe = self.teacher_settings.model_dump(include={"batch_size", "seed"})
        recipe |= {
            "optimizer": self.teacher_settings.optimizer,
            "schedule": self.teacher_settings.schedule,
        }
        plain = self.as_standard()
        root = plain.root.model_copy(update=recipe)
        return replace(
            plain, root=root, student=self.teacher, epochs=self.teacher_settings.epochs, labels=1.0
        )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values, in the form in which it was composed."""
        return {
            **self.root.model_dump(),
            "method": self.method.model_dump(),
            "student": {**self.student.model_dump(), "epochs": self.epochs, "labels": self.labels},
            "teacher": {**self.teacher.model_dump(), **self.teacher_settings.model_dump()},
            "data": self.data.model_dump(),
        }


def run_dir(config: Config) -> Path:
    """Where a run with this configuration is kept."""
    return absolute(config.root.paths.runs) / config.run_name()


def absolute(path: str) -> Path:
    """`path` from the root, with ~ replaced."""
    return Path(path).expanduser().absolute()


def model_name(model: Settings) -> str:
    """For people: the architecture and its numbers, e.g. cnn-16, or the `title` that its settings give it."""
    keys = model.model_dump()
    return getattr(model, "title", None) or "-".join(
        str(keys[k]) for k in ("name", "depth", "scale", "width") if k in keys
    )


def file_digest(path: Path) -> str:
    """16 hex digits of the content of a file of weights. **Raises:** UserError."""
    try:
        status = path.expanduser().stat()
        return _digest(path.expanduser(), status.st_ino, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise UserError(f"teacher: cannot read its weights in {path} ({error.strerror})") from error


@lru_cache(maxsize=64)
def _digest(path: Path, *version: int) -> str:
    """Read a file once for each version of it: the jobs of a sweep share their teacher's weights."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def validate_config(composed: Mapping[str, Any], known: dict[Any, Any] | None = None) -> Config:
    """The typed configuration. `known`, given with each of many, remembers what was found out about files.

    **Raises:** UserError, one line naming the key and what is allowed.
    """
    known = {} if known is None else known
    root = parse_settings(RootSettings, composed, "")
    root = root.model_copy(
        update={"tracker": wandb_env.apply_environment(root.tracker, root.tracker.mode)}
    )
    method = parse_settings(methods.find(root.method.get("name")).Config, root.method, "method")
    student, own = _parse_model(root.student, StudentSettings, "student")
    teacher, teaching = _parse_model(root.teacher, TeacherSettings, "teacher")
    dataset = parse_settings(data.find(root.data.get("name")).Config, root.data, "data")
    described = _memoize(known, dataset.model_dump_json(), lambda: data.describe(dataset))
    if methods.find(method.name).self_taught:
        if teaching.checkpoint is not None or teaching.members != 1:
            key = "members" if teaching.checkpoint is None else "checkpoint"
            raise UserError(
                f"teacher.{key}: {method.name} is taught by its own earlier generation, and by nothing else"
            )
        recipe = {
            "epochs": own.epochs,
            **{k: getattr(root, k) for k in ("batch_size", "optimizer", "schedule")},
        }
        teacher, teaching = student, teaching.model_copy(update=recipe)
    config = Config(
        root, method, student, own.epochs, own.labels, teacher, teaching, dataset, described
    )

    if described.val >= described.train and not described.own_val:
        limit = described.train - 1
        raise UserError(
            f"data.val_size: {described.val} leaves nothing to train on; allowed: 0 to {limit}"
        )
    _check_labels(config)
    nets, shapes, versions = {}, {}, {}
    for side, model in (("student", student), ("teacher", teacher)):
        versions[side] = model.model_dump_json(), len(described.classes), described.size
        build = partial(_build_meta, model, described, side)
        nets[side], shapes[side] = _memoize(known, ("net", *versions[side]), build)
    if config.misaligned and (config.method_class.mixed or config.method_class.self_taught):
        how = (
            "blends images"
            if config.method_class.mixed
            else "is taught by its own earlier generation"
        )
        raise UserError(
            f"teacher.outputs: {method.name} {how} and cannot be misaligned; allowed: aligned"
        )
    if teaching.members > 1 and teaching.checkpoint is not None:
        raise UserError(
            f"teacher.members: one file of weights is one teacher, not {teaching.members}"
        )
    if config.needs_teacher and teaching.checkpoint is not None:
        given, fits = Path(teaching.checkpoint).expanduser(), (described.classes, described.size)
        _memoize(
            known,
            (given, teacher.model_dump_json(), fits),
            lambda: store.validate_weights(given, nets["teacher"], *fits),
        )
    if teaching.members > 1:
        nets["teacher"] = Ensemble([nets["teacher"]], teaching.mean)
        shapes["teacher"] = nets["teacher"].shapes_of(shapes["teacher"])
    content = (
        method.model_dump_json(),
        *versions.values(),
        teaching.members,
        described.train,
        own.epochs,
    )
    _memoize(known, ("method", *content), lambda: _check_method(config, nets, shapes))
    return config


def _check_method(config: Config, nets: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    """Refuse a method that does not fit these networks."""
    described, members = config.description, config.teacher_settings.members
    spec = methods.MethodContext(
        shapes["student"],
        shapes["teacher"],
        len(described.classes),
        described.train,
        nets["student"],
        nets["teacher"],
        config.epochs,
    )
    try:
        config.method_class.check(config.method, spec)
    except ValueError as error:
        hint = f" (teacher.members={members}: an ensemble has only logits)" if members > 1 else ""
        raise UserError(f"method.{error}{hint}") from error


def takes_integers(composed: Mapping[str, Any], key: str) -> bool:
    """Does this dotted key take integers only, by the settings that are chosen here?"""
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
    return [
        one
        for one in _types_of(schemas, field)
        if isinstance(one, type) and issubclass(one, Settings)
    ]


def _types_of(schemas: list[type[Settings]], field: str) -> list[Any]:
    """The types that a field may have, out of unions and annotations."""
    pending = [
        schema.model_fields[field].annotation for schema in schemas if field in schema.model_fields
    ]
    found = []
    while pending:
        one = pending.pop()
        found.append(one)
        pending += get_args(one)
    return found


def _check_labels(config: Config) -> None:
    """Refuse a part of the labels that holds too few, or with which the method can do nothing."""
    described, part = config.description, config.labels
    images, classes = (
        described.train - (0 if described.own_val else described.val),
        len(described.classes),
    )
    if part < 1 and round(part * images) < classes:
        raise UserError(
            f"student.labels: {part:g} of {images:,} images is less than one of each of {classes} classes"
        )
    if (
        part < 1 and config.method_class.self_taught
    ):  # whose generations, having seeds, would be given others
        raise UserError(
            f"student.labels: {config.method.name} learns from itself, with all labels; allowed: 1"
        )
    if part < 1 and config.method_class.needs_labels(config.method):
        raise UserError(
            f"student.labels: {config.method.name} needs the label of every image; allowed: 1"
        )


def _memoize(known: dict[Any, Any], key: Any, find: Callable[[], Any]) -> Any:
    if key not in known:
        known[key] = find()
    return known[key]


def _parse_model(node: dict[str, Any], training: type[Settings], side: str) -> tuple[Any, Any]:
    """Split a network's node into its architecture's settings and those of its training."""
    settings = models.find(node.get("name"), side).Config
    own = {k: v for k, v in node.items() if k in training.model_fields}
    rest = {k: v for k, v in node.items() if k not in own}
    return parse_settings(settings, rest, side, list(training.model_fields)), parse_settings(
        training, own, side
    )


def _build_meta(
    model: Settings, described: Description, side: str
) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """The network without weights, and the shapes of its taps."""
    try:
        with torch.device("meta"):
            net = models.build(model, len(described.classes), described.size)
        return net, net.shapes(described.size)
    except UserError as error:  # a key of the model's own, as the model says it
        raise UserError(f"{side}.{error}") from error
    except RuntimeError as error:
        name, what = model_name(model), str(error).splitlines()[0]
        raise UserError(
            f"{side}.name: {name} cannot take images of {described.size} pixels ({what})"
        ) from error


def parse_settings(
    settings: type[Settings], node: Mapping[str, Any], where: str, also: list[str] | None = None
) -> Any:
    """`settings` filled from `node`. **Raises:** UserError that names the first wrong key by its dotted path."""
    try:
        return settings.model_validate(dict(node))
    except ValidationError as error:
        raise UserError(_error_line(settings, error, where, also or [])) from None


def _error_line(
    settings: type[Settings], error: ValidationError, where: str, also: list[str]
) -> str:
    first = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")[0]
    kind, said, tags = first["type"], first["input"], first["loc"]
    inner, location = settings, []
    for name in map(str, tags):
        if name in VARIANTS:  # pydantic puts the tag of the chosen variant into the path
            inner = VARIANTS[name]
            continue
        location.append(name)
        found = inner.model_fields[name].annotation if name in inner.model_fields else None
        inner = found if isinstance(found, type) and issubclass(found, Settings) else inner
    path = ".".join([where, *location]).strip(".")
    if kind == "missing":
        return f"{path}: this key is missing"
    if kind == "extra_forbidden":
        return unknown_key(path, [*inner.model_fields, *also])
    if kind == "value_error":
        return f"{path}: {first['msg'].removeprefix('Value error, ')}"
    if kind == "union_tag_invalid":
        return f"{path}.name: {said.get('name')!r} is not known; allowed: {', '.join(VARIANTS)}"
    message = (
        "should be a finite number"
        if kind == "finite_number"
        else first["msg"].removeprefix("Input ")
    )
    got = repr(said)
    return f"{path}: {message}, got {got if len(got) < 200 else f'{got[:150]} ...'}"
