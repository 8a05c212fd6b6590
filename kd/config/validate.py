"""The checks of a configuration: each mistake ends in one line that names its key.

Everything that can be refused without decoding an image is refused here, before any work.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import ValidationError

from kd import data, methods, models
from kd.config import wandb_env
from kd.config.schema import (
    Config,
    NetworkNode,
    ResultSettings,
    StudentSettings,
    TeacherSettings,
    combine,
    model_name,
    node_class,
)
from kd.core.errors import UserError, unknown_key
from kd.core.execution import ExecutionSettings
from kd.core.settings import Settings
from kd.data import Description
from kd.models import weights
from kd.models.ensemble import Ensemble
from kd.optim import VARIANTS


class ComposedSettings(ExecutionSettings, ResultSettings):
    """The top level as it is composed; the module of each choice checks the node of that choice."""

    method: dict[str, Any]
    student: dict[str, Any]
    teacher: dict[str, Any]
    data: dict[str, Any]


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
    config = _parse(composed, memo)
    if config.method_class.self_taught:
        config = _teach_itself(config)
    _check_validation_images(config)
    _check_labels(config)
    nets: dict[str, Any] = {}
    shapes: dict[str, Any] = {}
    keys: dict[str, Any] = {}  # what each network depends on
    for side, node in (("student", config.student), ("teacher", config.teacher)):
        network = node.network
        description = config.description
        keys[side] = network.model_dump_json(), len(description.classes), description.size
        build = partial(_build_meta, network, description, side)
        nets[side], shapes[side] = _memoize(memo, ("net", *keys[side]), build)
    _check_misalignment(config)
    _check_teacher(config, nets["teacher"], memo)
    if config.teacher.ensemble.size > 1:
        nets["teacher"] = Ensemble([nets["teacher"]], config.teacher.ensemble.average)
        shapes["teacher"] = nets["teacher"].shapes_of(shapes["teacher"])
    method_key = (
        "method",
        config.method.model_dump_json(),
        *keys["student"],
        *keys["teacher"],
        config.teacher.ensemble.size,
        config.description.train,
        config.student.epochs,
    )
    _memoize(memo, method_key, lambda: _check_method(config, nets, shapes))
    return config


def _parse(composed: Mapping[str, Any], memo: dict[Any, Any]) -> Config:
    """Return the configuration with each value checked by itself."""
    root = parse_settings(ComposedSettings, composed, "")
    tracker = wandb_env.apply_environment(root.tracker, root.tracker.mode)
    method = parse_settings(methods.find(root.method.get("name")).Config, root.method, "method")
    student = _parse_node(StudentSettings, root.student, "student")
    teacher = _parse_node(TeacherSettings, root.teacher, "teacher")
    dataset = parse_settings(data.find(root.data.get("name")).Config, root.data, "data")
    description = _memoize(memo, dataset.model_dump_json(), lambda: data.describe(dataset))
    values = {key: getattr(root, key) for key in type(root).model_fields}
    nodes = {"method": method, "student": student, "teacher": teacher, "data": dataset}
    return Config.model_construct(
        **{**values, **nodes, "tracker": tracker}, description=description, sweep=None
    )


def _parse_node(training: type[NetworkNode], node: dict[str, Any], side: str) -> Any:
    model = models.find(node.get("name"), side).Config
    return parse_settings(node_class(training, model), node, side)


def _teach_itself(config: Config) -> Config:
    """Return the configuration with the student, and its recipe, as the teacher."""
    teacher = config.teacher
    name = config.method.name
    if teacher.checkpoint is not None or teacher.ensemble.size != 1:
        key, allowed = "ensemble.size", "1"
        if teacher.checkpoint is not None:
            key, allowed = "checkpoint", "null"
        raise UserError(
            f"teacher.{key}: {name} is taught only by its own previous generation; "
            f"allowed: {allowed}"
        )
    recipe = {
        "epochs": config.student.epochs,
        "batch_size": config.batch_size,
        "optimizer": config.optimizer,
        "schedule": config.schedule,
    }
    node = combine(TeacherSettings, config.student.network, {**teacher.training, **recipe})
    return config.replace(teacher=node)


def _check_validation_images(config: Config) -> None:
    description = config.description
    if description.val >= description.train and not description.own_val:
        raise UserError(
            f"data.val_size: {description.val} leaves nothing to train on; "
            f"allowed: 0 to {description.train - 1}"
        )


def _check_labels(config: Config) -> None:
    """Refuse a fraction of the labels that leaves too few, or that the method cannot train with."""
    fraction = config.student.label_fraction
    if fraction == 1:
        return
    description = config.description
    images = description.train - (0 if description.own_val else description.val)
    classes = len(description.classes)
    labelled = round(fraction * images)
    if labelled < classes:
        raise UserError(
            f"student.label_fraction: {fraction:g} of {images:,} images leaves {labelled:,} "
            f"labelled; at least {classes:,} are needed (one per class)"
        )
    if config.method_class.self_taught:
        # The seed chooses which labels are given, and each generation has another seed
        raise UserError(
            f"student.label_fraction: each generation of {config.method.name} would get other "
            "labelled images; allowed: 1"
        )
    if config.method_class.needs_labels(config.method):
        raise UserError(
            f"student.label_fraction: {config.method.name} needs the label of every image; "
            "allowed: 1"
        )


def _check_misalignment(config: Config) -> None:
    if not config.misaligned:
        return
    reason = ""
    if config.method_class.mixed:
        reason = "blends images"
    elif config.method_class.self_taught:
        reason = "is taught by its own previous generation"
    if reason:
        raise UserError(
            f"teacher.outputs: {config.method.name} {reason} and cannot be misaligned; "
            "allowed: aligned"
        )


def _check_teacher(config: Config, net: Any, memo: dict[Any, Any]) -> None:
    """Refuse weights of a teacher that do not fit its network or the data."""
    teacher = config.teacher
    if teacher.checkpoint is None:
        return
    if teacher.ensemble.size > 1:
        raise UserError(
            "teacher.ensemble.size: teacher.checkpoint holds a single teacher, not "
            f"{teacher.ensemble.size}; allowed: 1"
        )
    if config.needs_teacher:
        path = Path(teacher.checkpoint).expanduser()
        expected = config.description.classes, config.description.size
        _memoize(
            memo,
            (path, teacher.network.model_dump_json(), expected),
            lambda: weights.validate_weights(path, net, *expected),
        )


def _check_method(config: Config, nets: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    """Refuse a method that does not fit these networks."""
    description = config.description
    members = config.teacher.ensemble.size
    context = methods.MethodContext(
        shapes["student"],
        shapes["teacher"],
        len(description.classes),
        description.train,
        nets["student"],
        nets["teacher"],
        config.student.epochs,
    )
    try:
        config.method_class.check(config.method, context)
    except ValueError as error:
        hint = (
            f" (teacher.ensemble.size={members}: an ensemble has only logits)"
            if members > 1
            else ""
        )
        raise UserError(f"method.{error}{hint}") from error


def _memoize(memo: dict[Any, Any], key: Any, compute: Callable[[], Any]) -> Any:
    if key not in memo:
        memo[key] = compute()
    return memo[key]


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


# ---- types


def takes_integers(composed: Mapping[str, Any], key: str) -> bool:
    """Return whether a dotted key takes integers only, under the choices in `composed`."""
    group, *path = key.split(".")
    schemas: list[type[Settings]] = [ComposedSettings]
    if path:
        name = composed[group].get("name") if isinstance(composed.get(group), Mapping) else None
        chosen: dict[str, Callable[[], type[Settings]]] = {
            "method": lambda: methods.find(name).Config,
            "student": lambda: node_class(StudentSettings, models.find(name, "student").Config),
            "teacher": lambda: node_class(TeacherSettings, models.find(name, "teacher").Config),
            "data": lambda: data.find(name).Config,
        }
        schemas = [chosen[group]()] if group in chosen else _inner_models(schemas, group)
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


def parse_settings(settings: type[Settings], node: Mapping[str, Any], where: str) -> Any:
    """Return `settings` filled from a node of the configuration.

    Args:
        settings: The class to fill.
        node: The keys and values.
        where: The dotted path of the node, for error messages.

    Raises:
        UserError: If a key or value is invalid; the message names the first by its dotted path.
    """
    try:
        return settings.model_validate(dict(node))
    except ValidationError as error:
        raise UserError(_error_line(settings, error, where)) from None


def _error_line(settings: type[Settings], error: ValidationError, where: str) -> str:
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
    if kind in ("model_type", "dict_type"):
        keys = f" ({', '.join(inner.model_fields)})" if inner is not settings else ""
        return f"{path}: should be a node with keys{keys}, got {value!r}"
    if kind == "extra_forbidden":
        return unknown_key(path, inner.model_fields)
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
