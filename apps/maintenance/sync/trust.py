"""What a box believes of a repository: TUF's client workflow, with every refusal named.

Rules:
    1. python-tuf verifies; this module adds to it and never takes away.
    2. It works on a copy.  The copy takes the place of what was trusted in one step, and only
       if all roles were verified, none has expired and no version leaps.
    3. Expiry is judged by the later of the local clock and the newest signed time that was
       ever verified.  A clock that is behind gains an attacker nothing; a clock that is ahead
       stops updates, with a message that says so, until it is right again, and harms nothing.

Knows: metadata.  Does not know: HTTP (``fetcher``), what targets mean (``offers``).
"""

import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
    SlowRetrievalError,
    UnsignedMetadataError,
)
from tuf.api.metadata import Metadata, TargetFile, Targets
from tuf.ngclient import Updater, UpdaterConfig

from apps.maintenance.edge.durable import sync_directory, sync_tree
from apps.maintenance.sync.fetcher import Fetcher, TruncatedError
from apps.maintenance.sync.outcomes import Outcome, RefusedError

SIGNED_AT: Final = "x-trimoe-signed-at"  # as ``repository`` writes it
MAX_LEAP = 100_000  # versions at once; one a minute is that many in ten weeks
_ROLES = ("root", "timestamp", "snapshot", "targets")
_BOUNDS = UpdaterConfig(
    max_root_rotations=64,
    root_max_length=256 * 1024,
    timestamp_max_length=16 * 1024,
    snapshot_max_length=256 * 1024,
    targets_max_length=4 * 2**20,
)
_MIXED = re.compile(r"Expected (snapshot version|\w+ v)\d+")
_SIGNED_BY = re.compile(r"signed by (\d+)/(\d+) keys")
_FORGET = {Outcome.TARGET_ALTERED, Outcome.ENDLESS_DATA}  # parts that are of no use


@dataclass(frozen=True, slots=True)
class Mirror:
    """Where a repository is read.

    Args:
        url: Its root: ``metadata/`` and ``targets/`` lie below.
        fetcher: Of this one attempt.
    """

    url: str
    fetcher: Fetcher


class Trusted:
    """A verified state of a repository.

    Args:
        updater: Refreshed.
        targets: All targets by name.
        fetcher: Brings targets.
        folder: For files on their way.
    """

    def __init__(
        self,
        updater: Updater,
        targets: Mapping[str, TargetFile],
        fetcher: Fetcher,
        folder: Path,
    ) -> None:
        self.targets = targets
        self._updater = updater
        self._fetcher = fetcher
        self._folder = folder

    def download(self, name: str) -> bytes:
        """Return the bytes of a target, verified.

        Raises:
            RefusedError: They did not come, or are not those that were signed.
        """
        info = self.targets.get(name)
        if info is None:
            raise RefusedError(Outcome.TARGET_MISSING, f"{name}: expected in the signed targets")
        path = self._folder / "arriving"
        try:
            self._updater.download_target(info, str(path))
            data = path.read_bytes()
        except LengthOrHashMismatchError as error:
            self._fetcher.forget_parts()
            raise RefusedError(Outcome.TARGET_ALTERED, f"{name}: {error}") from error
        except (DownloadError, RepositoryError, OSError) as error:
            refusal = _refusal_of(error)
            if refusal.outcome in _FORGET:
                self._fetcher.forget_parts()
            raise refusal from error
        finally:
            path.unlink(missing_ok=True)
        self._fetcher.forget_parts()
        return data


class TrustStore:
    """The metadata a box has verified, on disk.

    Args:
        folder: Its own.
        bootstrap: The root the box was set up with.
        now: Returns the time of the local clock.
    """

    def __init__(
        self, folder: Path, bootstrap: bytes, now: Callable[[], datetime] | None = None
    ) -> None:
        self._folder = folder
        self._bootstrap = bootstrap
        self._now = now or _local_time
        self._link = folder / "trusted"
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def signed_at(self) -> datetime | None:
        """The newest signed time that was verified; None before the first."""
        return _signed_at(_read_roles(self._link).get("timestamp"))

    def refresh(self, mirror: Mirror) -> Trusted:
        """Verify what a mirror has, and trust it from now on.

        Raises:
            RefusedError: It was not verified; what was trusted before still is.
        """
        before = _read_roles(self._link)
        draft = self._folder / f"draft-{secrets.token_hex(4)}"
        try:
            self._clear()
            if self._link.exists():
                shutil.copytree(self._link, draft, symlinks=True)
            else:
                draft.mkdir()
            updater = Updater(
                str(draft),
                f"{mirror.url}/metadata/",
                target_base_url=f"{mirror.url}/targets/",
                fetcher=mirror.fetcher,
                config=_BOUNDS,
                bootstrap=self._bootstrap,
            )
            updater.refresh()
            after = _read_roles(draft)
            self._judge(before, after)
            self._adopt(draft)
        except (DownloadError, RepositoryError, OSError) as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise self._explain(error, before, mirror) from error
        except RefusedError:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        targets: Targets = after["targets"]
        return Trusted(updater, targets.targets, mirror.fetcher, self._folder)

    def _judge(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Refuse what python-tuf accepts and we do not."""
        for role in _ROLES:
            old, new = before.get(role), after[role]
            if old is not None and new.version - old.version > MAX_LEAP:
                detail = f"{role}: expected a version near {old.version}, got {new.version}"
                raise RefusedError(Outcome.METADATA_FAST_FORWARD, detail)
        times = [self._now(), _signed_at(before.get("timestamp")), _signed_at(after["timestamp"])]
        reference = max(each for each in times if each is not None)
        for role in _ROLES:
            if after[role].is_expired(reference):
                detail = f"{role}.json is expired since {after[role].expires:%Y-%m-%d %H:%M} UTC"
                raise self._expired(detail, before, after["timestamp"])

    def _adopt(self, draft: Path) -> None:
        sync_tree(draft)
        link = self._folder / f"link-{secrets.token_hex(4)}"
        link.symlink_to(draft.name)
        link.replace(self._link)
        sync_directory(self._folder)

    def _clear(self) -> None:
        """Remove what killed attempts and earlier states left."""
        held = self._link.readlink().name if self._link.is_symlink() else ""
        for path in self._folder.iterdir():
            if path.name.startswith("draft-") and path.name != held:
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.startswith(("link-", "arriving")):
                path.unlink()

    def _explain(self, error: Exception, before: Mapping[str, Any], mirror: Mirror) -> RefusedError:
        if not isinstance(error, ExpiredMetadataError):
            return _refusal_of(error)
        try:
            offered = Metadata[Any].from_bytes(mirror.fetcher.last["timestamp.json"]).signed
        except (KeyError, RepositoryError):
            offered = None
        return self._expired(str(error), before, offered)

    def _expired(self, detail: str, before: Mapping[str, Any], offered: Any) -> RefusedError:  # noqa: ANN401 - Timestamp
        """Return the refusal of what has expired; frozen if it is what was seen before."""
        held = before.get("timestamp")
        signed_at = _signed_at(held)
        if signed_at is not None and (days := (self._now() - signed_at).days) > 0:
            detail += f"; the local clock is {days} days past the newest signed time, is it right?"
        is_same = held is not None and offered is not None and held.version == offered.version
        outcome = Outcome.METADATA_FROZEN if is_same else Outcome.METADATA_EXPIRED
        return RefusedError(outcome, detail)


def _refusal_of(error: Exception) -> RefusedError:
    """Return the refusal that an error of python-tuf or the disk amounts to."""
    return RefusedError(_outcome_of(error), str(error) or repr(error))


def _outcome_of(error: Exception) -> Outcome:
    if isinstance(error, UnsignedMetadataError):
        found = _SIGNED_BY.search(str(error))
        is_partly = found is not None and int(found[1]) > 0
        return Outcome.THRESHOLD_NOT_MET if is_partly else Outcome.WRONG_KEY
    if isinstance(error, BadVersionNumberError):
        is_mixed = _MIXED.match(str(error)) is not None
        return Outcome.METADATA_MIXED if is_mixed else Outcome.METADATA_ROLLBACK
    for kind, outcome in _OUTCOMES:
        if isinstance(error, kind):
            return outcome
    return Outcome.METADATA_INVALID


_OUTCOMES: tuple[tuple[type[Exception], Outcome], ...] = (  # first match
    (LengthOrHashMismatchError, Outcome.METADATA_MIXED),
    (RepositoryError, Outcome.METADATA_INVALID),
    (DownloadLengthMismatchError, Outcome.ENDLESS_DATA),
    (SlowRetrievalError, Outcome.SLOW_RETRIEVAL),
    (TruncatedError, Outcome.TRUNCATED),
    (DownloadHTTPError, Outcome.HTTP_ERROR),
    (DownloadError, Outcome.UNREACHABLE),
    (OSError, Outcome.DISK_FULL),
)


def _read_roles(folder: Path) -> Mapping[str, Any]:
    """Return the signed parts of the roles that lie in a folder."""
    found = {}
    for role in _ROLES:
        path = folder / f"{role}.json"
        try:
            found[role] = Metadata[Any].from_bytes(path.read_bytes()).signed
        except (OSError, RepositoryError):
            continue  # damaged or not there: python-tuf fetches it anew
    return found


def _signed_at(timestamp: Any | None) -> datetime | None:  # noqa: ANN401 - Timestamp
    if timestamp is None:
        return None
    try:
        return datetime.fromisoformat(timestamp.unrecognized_fields[SIGNED_AT])
    except (KeyError, TypeError, ValueError):
        return None


def _local_time() -> datetime:
    return datetime.now(UTC)
