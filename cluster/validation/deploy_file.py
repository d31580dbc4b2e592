"""A deploy file as read: its text, and what it parses to.

Stricter than YAML and JSON are: a key that is given twice is an error, not the last one.
"""

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from cluster.errors import ConfigurationError
from cluster.validation.finding import Finding

DATA_SUFFIXES: Final = (".yaml", ".yml", ".json")


@dataclass(frozen=True, slots=True)
class DeployFile:
    """One file.

    Args:
        name: Relative to the deploy folder, with slashes.
        path: On disk.
        text: Its content.
        documents: What it parses to; empty if it is neither YAML nor JSON.
    """

    name: str
    path: Path
    text: str
    documents: tuple[Any, ...] = ()

    @property
    def document(self) -> Any:  # noqa: ANN401 - whatever the file holds
        """The first document, None if there is none."""
        return self.documents[0] if self.documents else None


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                mark = key_node.start_mark
                raise yaml.MarkedYAMLError(None, None, f"key {key!r} given twice", mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> tuple[Any, ...]:
    """Return the documents of a YAML text.

    Raises:
        ValueError: Not YAML, or a key given twice; one line.
    """
    try:
        return tuple(yaml.load_all(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        message = f"{error.problem}{line}"
        raise ValueError(message) from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            message = f"key {key!r} given twice"
            raise ValueError(message)
    return dict(pairs)


def parse(name: str, path: Path, text: str) -> DeployFile | Finding:
    """Return the file of that text, or why it is not what its name says.

    Args:
        name: Relative to the deploy folder.
        path: On disk.
        text: Its content.
    """
    try:
        if path.suffix == ".json":
            return DeployFile(name, path, text, (json.loads(text, object_pairs_hook=_unique),))
        if path.suffix in DATA_SUFFIXES:
            return DeployFile(name, path, text, parse_yaml(text))
    except ValueError as error:
        return Finding(name, "", f"valid {path.suffix[1:].upper()}", str(error))
    return DeployFile(name, path, text)


def read(path: Path, name: str) -> DeployFile | Finding:
    """Return the file, or why it is not what its name says.

    Args:
        path: On disk.
        name: Relative to the deploy folder.

    Raises:
        ConfigurationError: No such file, or not UTF-8.
    """
    try:
        return parse(name, path, path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        message = f"{path}: expected a text file, got {error}"
        raise ConfigurationError(message) from error
