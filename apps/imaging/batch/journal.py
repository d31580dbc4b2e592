r"""The journal of a batch: an append-only file that processes of several machines share.

    <crc32, 8 hex digits> <JSON>\n           the heading first, then one event per line

Rules:
    1. Whoever appends holds the file's lock, has read everything before, and is through
       ``fsync`` when the lock is free again.  The kernel frees the lock of a dead process.
    2. A line counts once it is whole.  What a killed writer left after the last whole line is
       dropped by the next one that holds the lock; a bad line before good ones is damage.
    3. No event is written that may not follow those before (``claims``).

The lock is ``flock``: exact on one machine, and on NFS 4 as far as its server's locks are.
"""

import fcntl
import json
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from apps.imaging.batch.claims import Claims, Event, FencedError
from apps.imaging.batch.process import Record
from cluster.errors import ConfigurationError, UnavailableError

LOCK_PATIENCE_S = 60.0  # others hold it for milliseconds
_LOCK_LOOK_S = 0.005
_CRC_DIGITS = 8
_CHUNK_BYTES = 2**20
_FORMAT = "trimoe-imaging-journal/1"


@dataclass(frozen=True, slots=True)
class Heading:
    """What a batch is: the first line of its journal.

    Args:
        input: Where the cases lie; absolute.
        sources: Digest of all their ids, labels and series.
        settings: What else decides over the results.
        case_ids: All cases, in order.
    """

    input: str
    sources: str
    settings: Record
    case_ids: tuple[str, ...]

    @classmethod
    def from_record(cls, record: Record) -> Self:
        """Return what the first line holds.

        Raises:
            ConfigurationError: It is not the heading of such a journal.
        """
        if record.get("format") != _FORMAT:
            message = f"journal: expected format {_FORMAT}, got {record.get('format')!r:.60}"
            raise ConfigurationError(message)
        fields = {name: record[name] for name in ("input", "sources", "settings")}
        return cls(**fields, case_ids=tuple(record["case_ids"]))


def encode_line(record: Record) -> bytes:
    """Return a line.

    Raises:
        ValueError, TypeError: The record is not of JSON; NaN is not either.
    """
    text = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def decode_lines(data: bytes) -> tuple[Sequence[Record], int]:
    """Return the records of the whole lines at the start, and the bytes that these take."""
    records, end = [], 0
    for line in data.splitlines(keepends=True):
        record = _decode_line(line)
        if record is None:
            break
        records.append(record)
        end += len(line)
    return records, end


def _decode_line(line: bytes) -> Record | None:
    head, _, text = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or len(head) != _CRC_DIGITS or head != b"%08x" % zlib.crc32(text):
        return None
    record: Record = json.loads(text)
    return record


def read_heading(path: Path) -> Heading | None:
    """Return the heading of a journal without opening it for more; None if there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        records, _ = decode_lines(file.readline())
    return Heading.from_record(records[0]) if records else None


class Journal:
    """An open journal and the state its events add up to; one thread at a time.

    Args:
        path: The file; made if there is none.
        patience_s: How long to wait for the lock.

    Raises:
        FileNotFoundError, PermissionError: Its directory is missing or closed to us.
    """

    def __init__(self, path: Path, *, patience_s: float = LOCK_PATIENCE_S) -> None:
        self._path = path
        self._patience_s = patience_s
        self._end = 0
        self._heading: Heading | None = None
        self._claims = Claims(())
        self._is_locked = False
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    @property
    def heading(self) -> Heading | None:
        """What was last read of the first line; None if there is none yet."""
        return self._heading

    @property
    def claims(self) -> Claims:
        """The state as it was last read."""
        return self._claims

    def refresh(self) -> None:
        """Read what others have appended since.

        Raises:
            ConfigurationError: The file is damaged.
        """
        self._take(*decode_lines(self._read_on()))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock while the block runs, everything being read.

        Raises:
            UnavailableError: Another process holds it for too long.
            ConfigurationError: The file is damaged, or its file system has no locks.
        """
        self._lock()
        try:
            data = self._read_on()
            records, length = decode_lines(data)
            self._take(records, length)
            if data[length:]:
                self._drop(data[length:])
            self._is_locked = True
            yield
        finally:
            self._is_locked = False
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def begin(self, heading: Heading) -> None:
        """Write the heading of a journal that has none; only while it is locked.

        Raises:
            ValueError: There is one.
        """
        if self._heading is not None:
            message = "journal: expected an empty one, got one with a heading"
            raise ValueError(message)
        self._write({"format": _FORMAT, **asdict(heading)})
        sync_directory(self._path.parent)

    def append(self, event: Event) -> None:
        """Write an event and take it in; only while it is locked.

        Raises:
            FencedError, ValueError: It may not follow (see ``Claims.check``).
        """
        self._claims.check(event)
        self._write(event.as_record())

    def _write(self, record: Record) -> None:
        if not self._is_locked:
            message = "journal: expected to be locked before a line is written"
            raise RuntimeError(message)
        line = encode_line(record)
        offset = self._end
        while offset < self._end + len(line):
            offset += os.pwrite(self._fd, line[offset - self._end :], offset)
        os.fsync(self._fd)
        self._take(*decode_lines(line))

    def _take(self, records: Sequence[Record], length: int) -> None:
        """Take lines in and count their bytes as read."""
        try:
            for record in records:
                if self._heading is None:
                    self._heading = Heading.from_record(record)
                    self._claims = Claims(self._heading.case_ids)
                else:
                    self._claims.apply(Event.from_record(record))
        except ConfigurationError:
            raise
        except (FencedError, KeyError, TypeError, ValueError) as error:
            raise _damage(self._end) from error
        self._end += length

    def _drop(self, torn: bytes) -> None:
        """Cut off what a killed writer left behind the last whole line."""
        if any(_decode_line(line) is not None for line in torn.splitlines(keepends=True)):
            raise _damage(self._end)
        os.ftruncate(self._fd, self._end)

    def _read_on(self) -> bytes:
        data = bytearray()
        while chunk := os.pread(self._fd, _CHUNK_BYTES, self._end + len(data)):
            data += chunk
        return bytes(data)

    def _lock(self) -> None:
        until_s = time.monotonic() + self._patience_s
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > until_s:
                    message = (
                        f"journal: expected its lock within {self._patience_s:.0f} s, another "
                        "process holds it; is one suspended?"
                    )
                    raise UnavailableError(message) from error
                time.sleep(_LOCK_LOOK_S)
            except OSError as error:
                message = (
                    f"output directory: expected a file system with locks, got {error.strerror}; "
                    "choose another"
                )
                raise ConfigurationError(message) from error
            else:
                return


def sync_directory(directory: Path) -> None:
    """Make the names in a directory lasting, renamed and new ones."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _damage(offset: int) -> ConfigurationError:
    message = (
        f"journal: expected events that follow each other, got damage behind byte {offset}; "
        "restore the file, or run into another directory"
    )
    return ConfigurationError(message)
