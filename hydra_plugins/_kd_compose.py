"""Compose the configurations of many jobs, once for each set of overrides that shapes them.

Hydra needs about a tenth of a second to compose a configuration. Most jobs of a grid differ from
others only in plain values, such as `method.T=4 seed=1`. Hydra applies those last, one by one, so
they can be set in a configuration that was composed without them. Where it is not certain that the
result is the same as Hydra's, Hydra composes the job.
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
# Text whose interpolations refer only to other keys or to environment variables.
TEXT = re.compile(rf"(?:[^$\\]|\${{(?:{KEY}|oc\.env:[^${{}}\\]*)}})*")


@dataclass
class BaseComposition:
    """A composed configuration in which plain values can be replaced."""

    config: DictConfig  # without Hydra's node, with interpolations not resolved
    values: ParsedValue  # with interpolations resolved
    missing: set[str]  # the keys of mandatory values that are missing
    fixed: set[str]  # the keys on which other values, or the base's own overrides, depend


class Composer:
    """Composes the plain configurations of a sweep's jobs, each from its overrides.

    Args:
        loader: Hydra's configuration loader.
        config: The configuration of the sweep.
        resolve: Converts a composed configuration to plain values.

    Attributes:
        compositions: Number of configurations that Hydra has composed.
    """

    def __init__(
        self, loader: ConfigLoader, config: DictConfig, resolve: Callable[..., ParsedValue]
    ) -> None:
        self.loader = loader
        self.config = config
        self.resolve = resolve
        self.parser = OverridesParser.create()
        self.parsed: dict[str, Override] = {}
        self.keys: dict[tuple[Any, ...], set[str]] = {}
        self.bases: dict[tuple[str, ...], BaseComposition | None] = {}
        self.compositions = 0

    def __call__(self, overrides: Sequence[str], number: int) -> ParsedValue:
        """Return the plain configuration that Hydra composes for a job.

        Args:
            overrides: All overrides of the job.
            number: Number of the job.

        Raises:
            HydraException: Hydra cannot compose it; OmegaConf's errors are also raised.
        """
        return self._replaced(list(overrides)) or self.resolve(self._compose(overrides, number))

    def _compose(self, overrides: Sequence[str], number: int = 0) -> DictConfig:
        self.compositions += 1
        config = self.loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            # for values such as ${hydra:job.num}
            config.hydra.job.id = config.hydra.job.num = number
        return config

    def _replaced(self, overrides: list[str]) -> ParsedValue | None:
        """Make the configuration by replacing values; return None if Hydra has to compose it."""
        try:
            parsed = {text: self._parse(text) for text in overrides}
            value_keys = self._value_keys(overrides)
        except Exception:  # Hydra's composition will raise it again, for the user
            return None
        replacements = {
            text: override
            for text, override in parsed.items()
            if is_value(override) and override.key_or_group in value_keys
        }
        while replacements:
            shaping = [text for text in overrides if text not in replacements]
            base = self._base(shaping, value_keys)
            if base is None:
                return None
            safe = {
                text: override
                for text, override in replacements.items()
                if is_replaceable(base, override.key_or_group)
            }
            if len(safe) == len(replacements):
                return with_value(base, replacements)
            replacements = safe
        return None

    def _parse(self, override: str) -> Override:
        if override not in self.parsed:
            self.parsed[override] = self.parser.parse_override(override)
        return self.parsed[override]

    def _value_keys(self, overrides: Sequence[str]) -> set[str]:
        """Return the keys of those overrides that set values instead of choosing from groups."""
        parsed = [self._parse(text) for text in overrides]
        cache_key = tuple(
            (override.get_key_element(), isinstance(override.value(), dict)) for override in parsed
        )
        if cache_key not in self.keys:
            hydra = self.config.hydra
            all_overrides = [*map(str, hydra.overrides.hydra), *overrides]
            defaults = self.loader.compute_defaults_list(
                hydra.job.config_name, all_overrides, RunMode.RUN
            )
            self.keys[cache_key] = {override.key_or_group for override in defaults.config_overrides}
        return self.keys[cache_key]

    def _base(self, overrides: list[str], value_keys: set[str]) -> BaseComposition | None:
        """Return the composition of these overrides, or None if its values must not be replaced."""
        if tuple(overrides) not in self.bases:
            keys = {self._parse(text).key_or_group for text in overrides}
            self.bases[tuple(overrides)] = self._new_base(overrides, keys & value_keys)
        return self.bases[tuple(overrides)]

    def _new_base(self, overrides: list[str], overridden: set[str]) -> BaseComposition | None:
        try:
            config = self._compose(overrides).copy()
            OmegaConf.set_struct(config, False)
            config.pop("hydra")
            raw = dict(leaves(OmegaConf.to_container(config, resolve=False)))
            values = self.resolve(config, throw_on_missing=False)
        except Exception:  # for example, a missing value that one of the replacements sets
            return None
        texts = [text for text in raw.values() if isinstance(text, str) and "${" in text]
        if not all(TEXT.fullmatch(text) for text in texts):
            return None
        referenced: set[str] = set()
        for text in texts:
            referenced.update(re.findall(rf"\${{({KEY})}}", text))
        missing = {key for key, value in leaves(values) if value == "???"}
        return BaseComposition(config, values, missing, referenced | overridden)


def is_value(override: Override) -> bool:
    """Return whether an override sets an existing key to one plain value.

    Nothing in the value may be interpreted by Hydra.
    """
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
    """Return whether a key has an untyped value on which nothing else depends."""
    if any(
        key == fixed or key.startswith(f"{fixed}.") or re.match(rf"{key}[.\[]", fixed)
        for fixed in base.fixed
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
    """Return a copy of the base with these values, or None if a mandatory one is still missing."""
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
    """Yield the dotted key and the value of everything in a container that is not a container."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
