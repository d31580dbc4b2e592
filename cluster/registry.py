"""Model versions and their aliases, in a directory or under any fsspec URL.

    ROOT/<name>/manifest.json, model.safetensors     one version each
    ROOT/aliases.json                                which of them is served; see cluster.versions

Whoever promotes a version writes ``aliases.json``; replicas follow it.  Finds, lists and
verifies without torch; loading is ``core_model.checkpoint``.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError, ConfigurationError, UnknownModelError
from cluster.names import is_name
from cluster.versions import Aliases

ALIASES_FILE = "aliases.json"
MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One model version.

    Args:
        name: Its directory's name.
        version: As its manifest states.
        tasks: Names of the tasks it serves.
        sha256: Expected digest of the weights file, hexadecimal.
        path: Its directory, local.
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


@dataclass(frozen=True, slots=True)
class Registry:
    """A collection of model versions.

    Args:
        root: Directory, or URL that fsspec understands, such as ``"s3://bucket/models"``.
        cache: Where versions of a URL are kept on this machine; None takes the temporary folder.
    """

    root: str
    cache: Path | None = None

    @property
    def is_remote(self) -> bool:
        """Whether the root is a URL."""
        return "://" in self.root

    def models(self) -> Sequence[ModelEntry]:
        """Return all versions, by name; of a URL only their manifests are fetched.

        Raises:
            CheckpointError: A manifest cannot be read.
            ConfigurationError: There is no such directory.
        """
        root = self._local_root()
        if self.is_remote:
            for path in self._remote_files(MANIFEST_FILE):
                self._fetch(f"{path.rsplit('/', 2)[-2]}/{MANIFEST_FILE}")
        if not root.is_dir():
            message = f"models: expected a directory, got {self.root}; pass --models"
            raise ConfigurationError(message)
        return [_read_entry(path.parent) for path in sorted(root.glob(f"*/{MANIFEST_FILE}"))]

    def find(self, name: str | None = None) -> ModelEntry:
        """Return the model of that name or version; without one, the only model there is.

        Raises:
            UnknownModelError: No such model.
            ConfigurationError: No name given and not exactly one model.
        """
        if name is not None and not is_name(name):
            message = (
                f"model: expected letters, digits, '_', '-' and single dots, got {name[:100]!r}"
            )
            raise UnknownModelError(message)
        if self.is_remote and name is not None and (entry := self._find_remote(name)):
            return entry  # a web server may hold files without listing them
        entries = self.models()
        names = [entry.name for entry in entries]
        if name is None and len(entries) != 1:
            message = f"{self.root}: expected one model, got {names}; name the one to use"
            raise ConfigurationError(message)
        for entry in entries:
            if name in (None, entry.name, entry.version):
                return entry
        message = f"{self.root}: expected a model among {names}, got {name!r}"
        raise UnknownModelError(message)

    def fetch(self, name: str | None = None) -> ModelEntry:
        """Return a version whose weights are on this machine and are the stated ones.

        Raises:
            CheckpointError: The weights are missing or altered.
            UnknownModelError, ConfigurationError: See ``find``.
        """
        entry = self.find(name)
        if self.is_remote:
            try:
                entry.verify()
            except CheckpointError:  # not here yet, or of an older version of that name
                self._fetch(f"{entry.name}/{WEIGHTS_FILE}")
        entry.verify()
        return entry

    def aliases(self) -> Aliases:
        """Return what is to be served; without a file, the only model there is.

        Raises:
            ConfigurationError: The file cannot be read, or there is none and several models.
        """
        text = self._read(ALIASES_FILE)
        if text is None:
            return Aliases(stable=self.find().version)
        try:
            return Aliases(**json.loads(text))
        except (ValueError, TypeError) as error:
            message = f"{self.root}/{ALIASES_FILE}: expected aliases, got {error!r:.120}"
            raise ConfigurationError(message) from error

    def set_aliases(self, aliases: Aliases) -> None:
        """Make it so: replicas that follow this registry load what is new and swap.

        Raises:
            UnknownModelError: A version that the registry does not hold.
        """
        known = {entry.version for entry in self.models()}
        unknown = [version for version in aliases.versions if version not in known]
        if unknown:
            message = f"{self.root}: expected versions among {sorted(known)}, got {unknown}"
            raise UnknownModelError(message)
        text = json.dumps(aliases.to_dict(), indent=2) + "\n"
        if self.is_remote:
            self._file_system().pipe_file(self._remote_path(ALIASES_FILE), text.encode())
            return
        path = Path(self.root) / ALIASES_FILE
        partial = path.with_name(f".{ALIASES_FILE}.partial")
        partial.write_text(text, "utf-8")
        partial.replace(path)  # a reader sees the old file or the new one

    def _local_root(self) -> Path:
        if not self.is_remote:
            return Path(self.root)
        base = self.cache or Path(tempfile.gettempdir()) / "trimoe-models"
        return base / hashlib.sha256(self.root.encode()).hexdigest()[:16]

    def _file_system(self) -> Any:  # noqa: ANN401 - fsspec has no types
        import fsspec  # noqa: PLC0415 - only for URLs

        return fsspec.url_to_fs(self.root)[0]

    def _remote_path(self, name: str) -> str:
        return f"{self.root.split('://', 1)[1].rstrip('/')}/{name}"

    def _remote_files(self, name: str) -> list[str]:
        found: list[str] = self._file_system().glob(self._remote_path(f"*/{name}"))
        return found

    def _find_remote(self, name: str) -> ModelEntry | None:
        try:
            self._fetch(f"{name}/{MANIFEST_FILE}")
        except FileNotFoundError:
            return None
        return _read_entry(self._local_root() / name)

    def _fetch(self, name: str) -> None:
        target = self._local_root() / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        self._file_system().get_file(self._remote_path(name), str(partial))
        partial.replace(target)

    def _read(self, name: str) -> str | None:
        try:
            if self.is_remote:
                return str(self._file_system().cat_file(self._remote_path(name)), "utf-8")
            return (Path(self.root) / name).read_text("utf-8")
        except FileNotFoundError:
            return None


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
