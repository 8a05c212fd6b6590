"""Search the user's configuration directories before kd's own.

For example, the user's method/logits.yaml is then used instead of kd's. Hydra puts `--config-dir`
and `hydra.searchpath` behind the application's own directory, where a file of the same name is
never read. This module acts only when kd's command line is the application.
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

# Environment variable that kd.cli sets while Hydra runs: a JSON list of directories.
DIRECTORIES = "KD_CONFIG_DIRECTORIES"


class UserSource(FileConfigSource):
    """A configuration directory of the user.

    A file that cannot be read is reported in one line with the position of the error.
    """

    @staticmethod
    def scheme() -> str:
        """Return the URL scheme of these directories on Hydra's search path."""
        return "kd-user"

    def is_config(self, config_path: str) -> bool:
        """Return whether this directory has the file, ignoring kd's own primary configurations.

        Only files in groups replace kd's. The primary configuration is the application's, or is
        selected by --config-name.
        """
        from kd.core.registry import CONF

        top_level = "/" not in config_path.strip("/")
        if top_level and (CONF / self._normalize_file_name(config_path)).is_file():
            return False
        return super().is_config(config_path)

    def load_config(self, config_path: str) -> ConfigResult:
        """Load a configuration file; raise UserError if it is invalid or cannot be read."""
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
        except Exception as error:  # by Hydra for the header, by OmegaConf for an interpolation
            raise UserError(f"{path}: {first_line(error)}") from error
        return ConfigResult(
            provider=self.provider, path=self.full_path(), config=config, header=header
        )


class UserDirectoriesFirst(SearchPathPlugin):
    """Puts the directories that kd.cli passes on before kd's own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Prepend the user's directories to Hydra's search path."""
        for directory in json.loads(os.environ.get(DIRECTORIES, "[]")):
            search_path.prepend("user", f"{UserSource.scheme()}://{directory}", "main")


def decode(content: bytes) -> str:
    """Decode UTF-8, with or without a byte order mark.

    Raises:
        yaml.MarkedYAMLError: Some bytes are not UTF-8; the error gives the position of the first.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8"
        line = content.count(b"\n", 0, error.start)
        column = error.start - content.rfind(b"\n", 0, error.start) - 1
        mark = yaml.Mark("", error.start, line, column, None, 0)
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark) from error


def check_mapping(text: str) -> None:
    """Check that a text is YAML for a mapping, or empty, without circular aliases.

    Raises:
        yaml.YAMLError: It is not.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None and not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else "text"
        raise yaml.MarkedYAMLError(
            problem=f"expected keys with values, got {kind}", problem_mark=root.start_mark
        )
    _check_aliases(root, set(), set())


def _check_aliases(node: Any, ancestors: set[int], checked: set[int]) -> None:
    if id(node) in ancestors:
        raise yaml.MarkedYAMLError(
            problem="an alias refers to an anchor that contains it", problem_mark=node.start_mark
        )
    if not isinstance(node, yaml.CollectionNode) or id(node) in checked:
        return
    for entry in node.value:
        for child in entry if isinstance(entry, tuple) else (entry,):
            _check_aliases(child, ancestors | {id(node)}, checked)
    checked.add(id(node))


def describe(error: yaml.YAMLError) -> str:
    """Return position and problem: ", line 3, column 5: found duplicate key name"."""
    if isinstance(error, yaml.reader.ReaderError):  # a control character
        return f": character {error.position + 1}: {error.reason}"
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    position = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{position}: {getattr(error, 'problem', None) or error}"
