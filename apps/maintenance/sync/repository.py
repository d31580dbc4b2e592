"""The signed repository: a folder of TUF metadata and targets that any web server can serve.

    metadata/  N.root.json, N.targets.json, N.snapshot.json, timestamp.json
    targets/   <sha256>.<name>

Rules:
    1. A role signs with every key at hand that is its own, and must reach its threshold.
    2. What a client reads first is written last: targets, then their metadata, then the
       snapshot, then the timestamp.  A half-done change is seen by nobody.
    3. A new root is signed by the keys of the old one as well.
    4. The timestamp says when it was signed: a box without a good clock learns from it that
       time has passed.

Source: TUF specification 1.0.33, sections 3, 4 and 6.
"""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from apps.maintenance.edge.durable import write_whole
from apps.maintenance.sync.signing import LIFETIMES, check_keys, check_signed, first_root, sign
from apps.maintenance.sync.trust import SIGNED_AT
from cluster.errors import ConfigurationError

_Role = TypeVar("_Role", Root, Targets, Snapshot, Timestamp)
_HASH = "sha256"
_SERIALIZER = JSONSerializer(compact=False)


@dataclass(frozen=True, slots=True)
class File:
    """A target to add.

    Args:
        data: Its bytes.
        custom: What the signature says of it beside length and hash.
    """

    data: bytes
    custom: Mapping[str, Any]


def _now() -> datetime:
    return datetime.now(UTC)


class Repository:
    """A repository that exists.

    Args:
        folder: Holds metadata and targets.
        signers: Keys at hand.
        now: Returns the time at which it signs.

    Raises:
        FileNotFoundError: There is none.
    """

    def __init__(
        self, folder: Path, signers: Sequence[CryptoSigner], now: Callable[[], datetime] = _now
    ) -> None:
        self.metadata = folder / "metadata"
        self.targets_folder = folder / "targets"
        self._signers = signers
        self._now = now
        if not (self.metadata / "1.root.json").exists():
            message = f"{folder.name}: expected a repository; make one with sync publish --init"
            raise FileNotFoundError(message)

    @classmethod
    def create(
        cls,
        folder: Path,
        signers: Mapping[str, Sequence[CryptoSigner]],
        thresholds: Mapping[str, int],
        now: Callable[[], datetime] = _now,
    ) -> "Repository":
        """Make an empty repository.

        Args:
            folder: Where; must hold none.
            signers: Keys of each role.
            thresholds: How many of them must sign.
            now: Returns the time at which it signs.

        Raises:
            ConfigurationError: There is one, or a role has fewer keys than it needs.
        """
        metadata = folder / "metadata"
        if (metadata / "1.root.json").exists():
            message = f"{folder.name}: expected no repository, got one"
            raise ConfigurationError(message)
        for sub in (metadata, folder / "targets"):
            sub.mkdir(parents=True, exist_ok=True)
        root = first_root(signers, thresholds, now() + LIFETIMES[Root.type])
        all_signers = [signer for role in sorted(signers) for signer in signers[role]]
        _write(metadata / "1.root.json", sign(Metadata(root), [root], all_signers))
        repository = cls(folder, all_signers, now)
        repository._write_targets(Targets())
        return repository

    @property
    def root(self) -> Root:
        """The newest root."""
        newest = max(self.metadata.glob("*.root.json"), key=_version_of)
        return self._read(Root, newest.name)

    @property
    def targets(self) -> Targets:
        """The newest targets, as served."""
        meta = self.snapshot.meta["targets.json"]
        return self._read(Targets, f"{meta.version}.targets.json")

    @property
    def snapshot(self) -> Snapshot:
        """The newest snapshot, as served."""
        version = self.timestamp.snapshot_meta.version
        return self._read(Snapshot, f"{version}.snapshot.json")

    @property
    def timestamp(self) -> Timestamp:
        """The newest timestamp."""
        return self._read(Timestamp, "timestamp.json")

    def publish(self, files: Mapping[str, File], remove: Collection[str] = ()) -> None:
        """Add targets, replacing those of the same name, and remove others.

        Raises:
            ConfigurationError: Too few of the keys that must sign are at hand.
        """
        targets = self.targets
        check_keys(self.root, self._signers, (Targets.type, Snapshot.type, Timestamp.type))
        for name, file in files.items():
            entry = TargetFile.from_data(name, file.data, [_HASH])
            entry.unrecognized_fields["custom"] = dict(file.custom)
            path = self.path_of(entry)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, file.data)
            targets.targets[name] = entry
        for name in remove:
            targets.targets.pop(name, None)
        targets.version += 1
        self._write_targets(targets)

    def path_of(self, target: TargetFile) -> Path:
        """Return where the bytes of a target lie."""
        folder, _, name = target.path.rpartition("/")
        return self.targets_folder / folder / f"{target.hashes[_HASH]}.{name}"

    def read(self, name: str) -> bytes:
        """Return the bytes of a target.

        Raises:
            ConfigurationError: There is none of that name.
        """
        target = self.targets.targets.get(name)
        if target is None:
            message = f"{name}: expected a signed target, got none"
            raise ConfigurationError(message)
        return self.path_of(target).read_bytes()

    def refresh(self) -> None:
        """Sign snapshot and timestamp anew, so that they do not expire."""
        snapshot = self.snapshot
        snapshot.version += 1
        self._write_snapshot(snapshot)

    def rotate(
        self, role: str, signers: Sequence[CryptoSigner], *, threshold: int | None = None
    ) -> None:
        """Replace the keys of a role, and sign anew what they sign.

        A client that sees a root with other keys for snapshot or timestamp forgets the old
        ones, so this also ends a fast-forward attack.

        Raises:
            ConfigurationError: Too few keys of the present root are at hand.
        """
        old = self.root
        new = copy.deepcopy(old)
        for key_id in list(new.roles[role].keyids):
            new.revoke_key(key_id, role)
        for signer in signers:
            new.add_key(signer.public_key, role)
        new.roles[role].threshold = threshold or old.roles[role].threshold
        new.version += 1
        new.expires = self._expires(Root.type)
        self._signers = [*self._signers, *signers]
        metadata = sign(Metadata(new), [old, new], self._signers)
        check_signed(metadata, old)
        _write(self.metadata / f"{new.version}.root.json", metadata)
        targets = self.targets
        targets.version += 1
        self._write_targets(targets)

    def _write_targets(self, targets: Targets) -> None:
        targets.expires = self._expires(Targets.type)
        data = self._write_signed(f"{targets.version}.targets.json", Metadata(targets))
        try:
            snapshot = self.snapshot
            snapshot.version += 1
        except FileNotFoundError:
            snapshot = Snapshot()
        snapshot.meta["targets.json"] = MetaFile.from_data(targets.version, data, [_HASH])
        self._write_snapshot(snapshot)

    def _write_snapshot(self, snapshot: Snapshot) -> None:
        snapshot.expires = self._expires(Snapshot.type)
        data = self._write_signed(f"{snapshot.version}.snapshot.json", Metadata(snapshot))
        try:
            timestamp = self.timestamp
            timestamp.version += 1
        except FileNotFoundError:
            timestamp = Timestamp()
        timestamp.snapshot_meta = MetaFile.from_data(snapshot.version, data, [_HASH])
        timestamp.expires = self._expires(Timestamp.type)
        timestamp.unrecognized_fields[SIGNED_AT] = self._now().replace(microsecond=0).isoformat()
        self._write_signed("timestamp.json", Metadata(timestamp))

    def _write_signed(self, name: str, metadata: Metadata[Any]) -> bytes:
        signed = sign(metadata, [self.root], self._signers)
        check_signed(signed, self.root)
        return _write(self.metadata / name, signed)

    def _read(self, kind: type[_Role], name: str) -> _Role:
        signed = Metadata[Any].from_bytes((self.metadata / name).read_bytes()).signed
        if not isinstance(signed, kind):
            message = f"{name}: expected {kind.type} metadata, got {signed.type}"
            raise ConfigurationError(message)
        return signed

    def _expires(self, role: str) -> datetime:
        return (self._now() + LIFETIMES[role]).replace(microsecond=0)


def _write(path: Path, metadata: Metadata[Any]) -> bytes:
    data = metadata.to_bytes(_SERIALIZER)
    write_whole(path, data)
    return data


def _version_of(path: Path) -> int:
    return int(path.name.partition(".")[0])
