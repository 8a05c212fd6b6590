"""The user's own directories come first: their method/logits.yaml is used instead of kd's.

Hydra puts `--config-dir` and `hydra.searchpath` behind the application's own directory, where a file of the same name
is never read. This module acts only when kd's command line is the application.
"""

import io
import json
import os
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

DIRECTORIES = (
    "KD_CONFIG_DIRECTORIES"  # an environment variable, a JSON list, set by kd.cli while Hydra runs
)


class UserSource(FileConfigSource):
    """A directory of the user's. A file that cannot be read is refused in one line with its position."""

    @staticmethod
    def scheme() -> str:
        return "kd-user"

    def is_config(self, config_path: str) -> bool:
        """Groups only: the primary configuration is the application's, or chosen by --config-name."""
        from kd.core.registry import CONF

        top_level = "/" not in config_path.strip("/")
        if top_level and (CONF / self._normalize_file_name(config_path)).is_file():
            return False
        return super().is_config(config_path)

    def load_config(self, config_path: str) -> ConfigResult:
        from kd.core.errors import UserError, first_line

        path = Path(self.path) / self._normalize_file_name(config_path)
        try:
            text = decode(path.read_bytes())
            check_mapping(text)
            header = self._get_header_dict(text[:512])
            config = OmegaConf.load(io.StringIO(text))
        except yaml.YAMLError as error:
            raise UserError(f"{path}{describe(error)}") from error
        except RecursionError as error:
            raise UserError(f"{path}: nested too deeply") from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        except Exception as error:  # Hydra's of the header, OmegaConf's of an interpolation
            raise UserError(f"{path}: {first_line(error)}") from error
        return ConfigResult(
            provider=self.provider, path=self.full_path(), config=config, header=header
        )


class UserDirectoriesFirst(SearchPathPlugin):
    """Put the directories that kd.cli names before kd's own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for directory in json.loads(os.environ.get(DIRECTORIES, "[]")):
            search_path.prepend("user", f"{UserSource.scheme()}://{directory}", "main")


def decode(content: bytes) -> str:
    """**Raises:** yaml.MarkedYAMLError with the line of what is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8"
        line, column = (
            content.count(b"\n", 0, error.start),
            error.start - content.rfind(b"\n", 0, error.start) - 1,
        )
        mark = yaml.Mark("", error.start, line, column, None, 0)
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark) from error


def check_mapping(text: str) -> None:
    """**Raises:** yaml.YAMLError, also where the top is no mapping, or an alias stands inside its own anchor."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None and not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else "text"
        raise yaml.MarkedYAMLError(
            problem=f"should hold keys with values, not {kind}", problem_mark=root.start_mark
        )
    _check_aliases(root, set(), set())


def _check_aliases(node: Any, above: set[int], checked: set[int]) -> None:
    if id(node) in above:
        raise yaml.MarkedYAMLError(
            problem="an alias stands inside its own anchor", problem_mark=node.start_mark
        )
    if not isinstance(node, yaml.CollectionNode) or id(node) in checked:
        return
    for child in node.value:
        for one in child if isinstance(child, tuple) else (child,):
            _check_aliases(one, above | {id(node)}, checked)
    checked.add(id(node))


def describe(error: yaml.YAMLError) -> str:
    """Where and what: ', line 3, column 5: found duplicate key name'."""
    if isinstance(error, yaml.reader.ReaderError):  # a control character
        return f": character {error.position + 1}: {error.reason}"
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{where}: {getattr(error, 'problem', None) or error}"
