"""Two slots for a model, and a pointer that is moved in one step.

    slots/a, slots/b   a bundle each: packed (the base of a delta) and its files
    active.json        what ``Pointer`` holds

Rules:
    1. A slot the pointer names is never written to.  A bundle is written beside the spare slot
       and takes its place by a rename.
    2. The pointer names a slot only after the bundle in it has proven itself.
    3. Until its health watch has ended well, the slot before it stays: ``good``.
    4. A start with an unconfirmed slot is counted before the slot is loaded; a model that takes
       the process down with it is given up after ``MAX_STARTS``.

Knows: files.  Does not know: where bundles come from, what a healthy model is.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from apps.maintenance.edge.bundle import INFO, BundleInfo, unpack, write_bundle
from apps.maintenance.edge.durable import sync_directory, write_whole
from apps.maintenance.sync.outcomes import MODEL_FAULTS, Outcome, RefusedError
from cluster.errors import ConfigurationError

SLOTS = ("a", "b")
PACKED = "bundle.tar"
MAX_STARTS = 3  # of an unconfirmed slot
MAX_FAILED = 64  # versions that are remembered as bad
_POINTER = "active.json"


@dataclass(frozen=True, slots=True)
class Pointer:
    """What serves, and what served before.

    Args:
        active: The slot that serves; empty before the first bundle.
        good: The slot to go back to; empty if there is none.
        digests: sha256 of the packed bundle of each slot.
        versions: Of each slot.
        is_confirmed: Whether the watch of the active slot has ended well.
        starts: Of the process, since the switch.
        floor: The highest version that was ever confirmed.
        failed: sha256 of bundles that proved bad, and how; oldest first.
    """

    active: str = ""
    good: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, int] = field(default_factory=dict)
    is_confirmed: bool = True
    starts: int = 0
    floor: int = 0
    failed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Return what the file says.

        Raises:
            ConfigurationError: It is not such a file.
        """
        try:
            record: dict[str, Any] = json.loads(data)
            return cls(**record)
        except (TypeError, ValueError) as error:
            message = f"{_POINTER}: expected a pointer to a slot, got {data[:60]!r}"
            raise ConfigurationError(message) from error

    @property
    def version(self) -> int:
        """What serves; 0 if nothing does."""
        return self.versions.get(self.active, 0)

    @property
    def digest(self) -> str:
        """Of what serves; empty if nothing does."""
        return self.digests.get(self.active, "")


class Slots:
    """The slots of one box; one process and one writer at a time.

    Args:
        root: Their folder; made if there is none.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = root / "slots"
        self._folder.mkdir(parents=True, exist_ok=True)
        self.was_damaged = False
        try:
            self.pointer = Pointer.from_json((root / _POINTER).read_bytes())
        except FileNotFoundError:
            self.pointer = Pointer()
        except ConfigurationError:
            self.was_damaged = True
            self._move_surely(self._found_pointer())

    def folder(self, slot: str) -> Path:
        """Return where the files of a slot lie."""
        return self._folder / slot

    @property
    def spare(self) -> str:
        """The slot that may be written to."""
        return next(slot for slot in SLOTS if slot != self.pointer.active)

    def base(self, digest: str) -> bytes | None:
        """Return the packed bundle with a digest, if a slot holds it undamaged."""
        for slot, held in self.pointer.digests.items():
            path = self.folder(slot) / PACKED
            if held == digest and path.exists():
                data = path.read_bytes()
                return data if _digest_of(data) == digest else None
        return None

    def stage(self, packed: bytes) -> BundleInfo:
        """Write a bundle into the spare slot; what serves does not change.

        Raises:
            RefusedError: It is no bundle, or the disk is full.
            ConfigurationError: The active slot is still watched.
        """
        if not self.pointer.is_confirmed:
            message = "slots: expected the watch of the active slot to have ended; wait for it"
            raise ConfigurationError(message)
        draft, slot = self._folder / "draft", self.spare
        shutil.rmtree(draft, ignore_errors=True)
        try:
            draft.mkdir()
            info = write_bundle(draft, packed)
            write_whole(draft / PACKED, packed)
            self._move(replace(self.pointer, good="", **self._without(slot)))
            shutil.rmtree(self.folder(slot), ignore_errors=True)
            draft.rename(self.folder(slot))
            sync_directory(self._folder)
        except ConfigurationError as error:
            raise RefusedError(Outcome.BUNDLE_INVALID, str(error)) from error
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            message = f"expected room for {len(packed)} bytes, got {error.strerror}"
            raise RefusedError(Outcome.DISK_FULL, message) from error
        return info

    def switch(self, packed: bytes, info: BundleInfo) -> None:
        """Serve the staged bundle; the slot before it stays as the good one.

        Raises:
            RefusedError: The disk is full; what served still does.
        """
        slot = self.spare
        moved = replace(
            self.pointer,
            active=slot,
            good=self.pointer.active,
            digests={**self.pointer.digests, slot: _digest_of(packed)},
            versions={**self.pointer.versions, slot: info.version},
            is_confirmed=False,
            starts=1,
        )
        try:
            self._move(moved)
        except OSError as error:
            message = f"expected room for the pointer, got {error.strerror}"
            raise RefusedError(Outcome.DISK_FULL, message) from error

    def confirm(self) -> None:
        """End the watch well."""
        floor = max(self.pointer.floor, self.pointer.version)
        self._move_surely(replace(self.pointer, is_confirmed=True, floor=floor))

    def count_start(self) -> None:
        """Count a start of the process, before an unconfirmed slot is loaded."""
        self._move_surely(replace(self.pointer, starts=self.pointer.starts + 1))

    def condemn(self, digest: str, outcome: Outcome) -> None:
        """Remember that a bundle proved bad."""
        self._move_surely(replace(self.pointer, failed=self._failed(digest, outcome)))

    def roll_back(self, outcome: Outcome) -> None:
        """Serve the good slot again; remember the active one as bad if the model is to blame."""
        bad = self.pointer.active
        is_model = outcome in MODEL_FAULTS
        moved = replace(
            self.pointer,
            active=self.pointer.good,
            good="",
            is_confirmed=True,
            starts=0,
            **self._without(bad),
        )
        failed = self._failed(self.pointer.digest, outcome) if is_model else self.pointer.failed
        self._move_surely(replace(moved, failed=failed))

    def is_whole(self, slot: str) -> bool:
        """Whether a slot holds what the pointer says, file by file."""
        folder = self.folder(slot)
        try:
            packed = (folder / PACKED).read_bytes()
            if _digest_of(packed) != self.pointer.digests.get(slot):
                return False
            return _matches(folder, packed)
        except (OSError, ConfigurationError):
            return False

    def repair(self, slot: str) -> None:
        """Write the files of a slot anew from its packed bundle, if that is undamaged.

        Raises:
            RefusedError: It is damaged too, or the disk is full.
        """
        packed = self.base(self.pointer.digests.get(slot, ""))
        if packed is None:
            raise RefusedError(Outcome.SLOT_DAMAGED, f"slot {slot}: expected its bundle, whole")
        try:
            write_bundle(self.folder(slot), packed)
        except OSError as error:
            raise RefusedError(Outcome.DISK_FULL, f"slot {slot}: {error.strerror}") from error

    def _found_pointer(self) -> Pointer:
        """Return a pointer to what lies in the slots: the newest, to be watched anew."""
        digests, versions = {}, {}
        for slot in SLOTS:
            try:
                packed = (self.folder(slot) / PACKED).read_bytes()
                versions[slot] = BundleInfo.from_json(unpack(packed)[INFO]).version
                digests[slot] = _digest_of(packed)
            except (OSError, ConfigurationError):
                continue
        ranked = sorted(versions, key=lambda slot: versions[slot], reverse=True)
        active, good = (*ranked, "", "")[:2]
        return Pointer(
            active=active,
            good=good,
            digests=digests,
            versions=versions,
            is_confirmed=not active,
            floor=versions.get(good or active, 0),
        )

    def _without(self, slot: str) -> dict[str, Any]:
        """Return digests and versions without those of a slot."""
        return {
            "digests": {key: held for key, held in self.pointer.digests.items() if key != slot},
            "versions": {key: held for key, held in self.pointer.versions.items() if key != slot},
        }

    def _failed(self, digest: str, outcome: Outcome) -> Mapping[str, str]:
        failed = {**self.pointer.failed, digest: str(outcome)}
        return dict(list(failed.items())[-MAX_FAILED:])

    def _move(self, pointer: Pointer) -> None:
        write_whole(self._root / _POINTER, json.dumps(asdict(pointer)).encode())
        self.pointer = pointer

    def _move_surely(self, pointer: Pointer) -> None:
        """Move the pointer at least for this process: on a full disk a restart watches anew."""
        try:
            self._move(pointer)
        except OSError:
            self.pointer = pointer


def _digest_of(packed: bytes) -> str:
    return hashlib.sha256(packed).hexdigest()


def _matches(folder: Path, packed: bytes) -> bool:
    return all((folder / name).read_bytes() == data for name, data in unpack(packed).items())
