"""The configurations of many jobs, composed once for each set of overrides that shapes them.

Hydra needs about a tenth of a second for a configuration. Most jobs of a grid differ from others only in plain values,
as `method.T=4 seed=1`. Hydra applies those last, one by one, so they can be put into a configuration that was composed
without them. Where it is not certain that this gives what Hydra gives, Hydra composes the job.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.types import RunMode
from omegaconf import AnyNode, DictConfig, OmegaConf, open_dict

ParsedValue = dict[str, Any]

KEY = r"[A-Za-z]\w*(?:\.[A-Za-z]\w*)*"
# text whose interpolations are of other keys, or of environment variables
TEXT = re.compile(rf"(?:[^$\\]|\${{(?:{KEY}|oc\.env:[^${{}}\\]*)}})*")


@dataclass
class BaseComposition:
    """A composed configuration in which plain values can be replaced."""

    config: DictConfig  # without Hydra's node, interpolations as they are
    values: ParsedValue  # interpolations resolved
    missing: set[str]  # the keys whose values are mandatory and missing
    fixed: set[str]  # keys that other values, or the remaining overrides, depend on


class Composer:
    """Compose the plain configurations of a sweep's jobs, each from its overrides.

    `compositions` counts those that Hydra made.
    """

    def __init__(
        self, loader: ConfigLoader, config: DictConfig, resolve: Callable[..., ParsedValue]
    ) -> None:
        self.loader, self.config, self.resolve = loader, config, resolve
        self.parser = OverridesParser.create()
        self.parsed: dict[str, Override] = {}
        self.keys: dict[tuple[Any, ...], set[str]] = {}
        self.bases: dict[tuple[str, ...], BaseComposition | None] = {}
        self.compositions = 0

    def __call__(self, words: Sequence[str], number: int) -> ParsedValue:
        """The plain configuration that Hydra composes for the job of this number.

        **Raises:** the errors of Hydra and OmegaConf.
        """
        return self._replaced(list(words)) or self.resolve(self._compose(words, number))

    def _compose(self, words: Sequence[str], number: int = 0) -> DictConfig:
        self.compositions += 1
        config = self.loader.load_sweep_config(self.config, list(words))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = (
                number  # for values such as ${hydra:job.num}
            )
        return config

    def _replaced(self, words: list[str]) -> ParsedValue | None:
        """The configuration made by replacing values, or None where only Hydra can tell."""
        try:
            overrides = {word: self._parse(word) for word in words}
            value_keys = self._value_keys(words)
        except Exception:  # Hydra's composition raises it again, for the user
            return None
        values = {
            word: o for word, o in overrides.items() if is_value(o) and o.key_or_group in value_keys
        }
        while values:
            base = self._base([word for word in words if word not in values], value_keys)
            if base is None:
                return None
            safe = {word: o for word, o in values.items() if is_replaceable(base, o.key_or_group)}
            if len(safe) == len(values):
                return with_value(base, values)
            values = safe
        return None

    def _parse(self, word: str) -> Override:
        if word not in self.parsed:
            self.parsed[word] = self.parser.parse_override(word)
        return self.parsed[word]

    def _value_keys(self, words: Sequence[str]) -> set[str]:
        """The keys among these overrides that change values, and choose from no group."""
        overrides = [self._parse(word) for word in words]
        alike = tuple(
            (override.get_key_element(), isinstance(override.value(), dict))
            for override in overrides
        )
        if alike not in self.keys:
            hydra = self.config.hydra
            every = [*map(str, hydra.overrides.hydra), *words]
            defaults = self.loader.compute_defaults_list(hydra.job.config_name, every, RunMode.RUN)
            self.keys[alike] = {override.key_or_group for override in defaults.config_overrides}
        return self.keys[alike]

    def _base(self, words: list[str], value_keys: set[str]) -> BaseComposition | None:
        """What these overrides alone compose, or None where values must not be replaced in it."""
        if tuple(words) not in self.bases:
            own = {self._parse(word).key_or_group for word in words}
            self.bases[tuple(words)] = self._new_base(words, own & value_keys)
        return self.bases[tuple(words)]

    def _new_base(self, words: list[str], own: set[str]) -> BaseComposition | None:
        try:
            config = self._compose(words).copy()
            OmegaConf.set_struct(config, False)
            config.pop("hydra")
            raw = dict(leaves(OmegaConf.to_container(config, resolve=False)))
            values = self.resolve(config, throw_on_missing=False)
        except Exception:  # as where a value is missing that is given by an override
            return None
        texts = [text for text in raw.values() if isinstance(text, str) and "${" in text]
        if not all(TEXT.fullmatch(text) for text in texts):
            return None
        referenced = {key for text in texts for key in re.findall(rf"\${{({KEY})}}", text)}
        missing = {key for key, text in leaves(values) if text == "???"}
        return BaseComposition(config, values, missing, referenced | own)


def is_value(override: Override) -> bool:
    """Whether it sets an existing key to one plain value, which nothing in it makes Hydra interpret."""
    if (
        override.type != OverrideType.CHANGE
        or override.package is not None
        or override.is_sweep_override()
    ):
        return False
    value = override.value()
    if isinstance(value, str):
        return (
            "$" not in value
            and value != "???"
            and re.fullmatch(KEY, override.key_or_group) is not None
        )
    return (value is None or type(value) in (bool, int, float)) and bool(
        re.fullmatch(KEY, override.key_or_group)
    )


def is_replaceable(base: BaseComposition, key: str) -> bool:
    """Whether this key holds an untyped value on which nothing else depends."""
    if any(
        key == one or key.startswith(f"{one}.") or re.match(rf"{key}[.\[]", one)
        for one in base.fixed
    ):
        return False
    node: Any = base.config
    values: Any = base.values
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
        if (
            not isinstance(node, DictConfig)
            or node._is_none()
            or node._is_missing()
            or node._is_interpolation()
        ):
            return False
        if node._get_flag("readonly"):
            return False
        node = node._get_node(part, validate_access=False)
    return type(node) is AnyNode and not node._get_flag("readonly")


def with_value(base: BaseComposition, overrides: dict[str, Override]) -> ParsedValue | None:
    """A copy of the base with these values; None where a mandatory one is still missing."""
    if base.missing - {override.key_or_group for override in overrides.values()}:
        return None
    values = deepcopy(base.values)
    for override in overrides.values():
        *path, last = override.key_or_group.split(".")
        node = values
        for part in path:
            node = node[part]
        node[last] = override.value()
    return values


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted key and the value of everything in a container that is none itself."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
