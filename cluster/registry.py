"""Model versions on disk: ``models/<name>/manifest.json`` beside ``model.safetensors``.

Finds, lists and verifies without torch; loading is ``core_model.checkpoint``.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError, ConfigurationError, UnknownModelError

MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One model version on disk.

    Args:
        name: Its directory's name.
        version: As its manifest states.
        tasks: Names of the tasks it serves.
        sha256: Expected digest of the weights file, hexadecimal.
        path: Its directory.
        manifest: Everything the manifest says.
    """

    name: str
    version: str
    tasks: tuple[str, ...]
    sha256: str
    path: Path
    manifest: Mapping[str, Any]

    def verify(self) -> None:
        """Compare the weights file with the manifest.

        Raises:
            CheckpointError: The file is missing or altered.
        """
        weights = self.path / WEIGHTS_FILE
        if not weights.is_file():
            message = f"{weights}: expected the weights of {self.version}, the file is missing"
            raise CheckpointError(message)
        with weights.open("rb") as stream:
            came = hashlib.file_digest(stream, "sha256").hexdigest()
        if came != self.sha256:
            message = (
                f"{weights}: expected sha256 {self.sha256[:16]}..., got {came[:16]}...; "
                "the file was altered, restore it"
            )
            raise CheckpointError(message)


def list_models(models_dir: Path) -> Sequence[ModelEntry]:
    """Return all models of a directory, by name.

    Raises:
        CheckpointError: A manifest cannot be read.
        ConfigurationError: The directory does not exist.
    """
    if not models_dir.is_dir():
        message = f"models: expected a directory, got {models_dir}; pass --models"
        raise ConfigurationError(message)
    return [_read_entry(path.parent) for path in sorted(models_dir.glob(f"*/{MANIFEST_FILE}"))]


def find_model(models_dir: Path, name: str | None = None) -> ModelEntry:
    """Return the model of that name or version; without one, the only model there is.

    Raises:
        UnknownModelError: No such model.
        ConfigurationError: No name given and not exactly one model.
    """
    entries = list_models(models_dir)
    names = [entry.name for entry in entries]
    if name is None and len(entries) != 1:
        message = f"{models_dir}: expected one model, got {names}; name the one to use"
        raise ConfigurationError(message)
    for entry in entries:
        if name in (None, entry.name, entry.version):
            return entry
    message = f"{models_dir}: expected a model among {names}, got {name!r}"
    raise UnknownModelError(message)


def _read_entry(path: Path) -> ModelEntry:
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text("utf-8"))
        return ModelEntry(
            name=path.name,
            version=str(manifest["version"]),
            tasks=tuple(manifest["tasks"]),
            sha256=str(manifest["sha256"]),
            path=path,
            manifest=manifest,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{path / MANIFEST_FILE}: expected version, tasks and sha256, got {error!r:.120}"
        raise CheckpointError(message) from error
