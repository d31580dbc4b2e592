"""Store and forward: what an edge box has to say, kept until the platform has it.

Rules:
    1. What ``put`` has returned from is on disk (SQLite, WAL, a sync per commit).
    2. Messages leave in the order they came; a sequence number is never used twice, so that
       a receiver can tell a repeated message from a new one.
    3. The file and its log never exceed the cap.  When there is no room, the oldest messages
       of the lowest priority go, and each one is counted.
    4. Room freed by a drain is given back to the file system.

Knows: bytes and priorities.  Does not know: what a message says, HTTP.
"""

import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Self

from apps.maintenance.edge.durable import write_whole
from cluster.errors import ConfigurationError, UnavailableError

EPOCH_NUMBERS = 2**40  # of a file; the platform tells messages apart by their numbers
PAGE_BYTES = 4096
MIN_CAP_BYTES = 128 * PAGE_BYTES
_LOG_SHARE = 4  # a quarter of the cap is for the write-ahead log, what is left for the file
_SLACK_PAGES = 24  # room for one batch, inner nodes, the index and counts
_EVICT_AT_ONCE = 32  # messages
_BATCH_BYTES = 8 * PAGE_BYTES  # of one transaction; keeps the log within its share
_ROW_BYTES = 64  # what a row takes beside its body, in table and index

_SCHEMA = """
CREATE TABLE IF NOT EXISTS messages (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, priority INTEGER NOT NULL, body BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS by_priority ON messages (priority, seq);
CREATE TABLE IF NOT EXISTS evicted (priority INTEGER PRIMARY KEY, num INTEGER NOT NULL);
"""


class Priority(IntEnum):
    """What is given up first when there is no room: the lowest."""

    TELEMETRY = 0
    FORECAST = 1
    EVENT = 2
    ALERT = 3


@dataclass(frozen=True, slots=True)
class Message:
    """A message that waits.

    Args:
        seq: Its place in the order, from 1.
        priority: When it may be given up.
        body: What it says.
    """

    seq: int
    priority: Priority
    body: bytes


class Outbox:
    """The queue; may be used by several threads of one process.

    Args:
        path: The database; made if there is none.
        cap_bytes: File and log together at most.

    Raises:
        ConfigurationError: The cap is too small to hold anything.
    """

    def __init__(self, path: Path, cap_bytes: int) -> None:
        if cap_bytes < MIN_CAP_BYTES:
            message = f"outbox: expected a cap of {MIN_CAP_BYTES} bytes or more, got {cap_bytes}"
            raise ConfigurationError(message)
        self._path = path
        self._lock = threading.Lock()
        self._log_pages = cap_bytes // PAGE_BYTES // _LOG_SHARE
        self._max_pages = cap_bytes // PAGE_BYTES - self._log_pages
        self.was_damaged = False
        try:
            self._db = self._open()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # locked, full: not damage
                raise
            self.was_damaged = True
            self._begin_epoch()
            self._set_aside()
            self._db = self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what waits stays."""
        with self._lock:
            self._db.close()

    def put(self, messages: Sequence[tuple[Priority, bytes]]) -> None:
        """Take messages, and give up older or less important ones if there is no room.

        Raises:
            UnavailableError: The disk itself has no room, or fails; what it did not take of
                these messages is lost, everything before is kept.
        """
        for batch in _batches(messages):
            with self._transaction():
                self._db.executemany("INSERT INTO messages (priority, body) VALUES (?, ?)", batch)
                while self._used_pages() > self._max_pages - _SLACK_PAGES and self._evict():
                    pass

    def head(self, limit: int = 256, max_bytes: int = 2**20) -> Sequence[Message]:
        """Return the oldest messages, at least one if any waits."""
        with self._lock:
            found: list[Message] = []
            num_bytes = 0
            for seq, priority, body in self._db.execute(
                "SELECT seq, priority, body FROM messages ORDER BY seq LIMIT ?", (limit,)
            ):
                num_bytes += len(body)
                if found and num_bytes > max_bytes:
                    break
                found.append(Message(seq, Priority(priority), body))
        return found

    def acknowledge(self, seq: int) -> None:
        """Let go of a message and all before it; when none is left the file shrinks."""
        with self._transaction():
            self._db.execute("DELETE FROM messages WHERE seq <= ?", (seq,))
        if not self.num_waiting:
            self._reclaim()

    @property
    def num_waiting(self) -> int:
        """Messages that wait."""
        with self._lock:
            return int(self._db.execute("SELECT count(*) FROM messages").fetchone()[0])

    @property
    def evicted(self) -> Mapping[Priority, int]:
        """How many messages were given up since the file was made, of each priority."""
        with self._lock:
            rows = self._db.execute("SELECT priority, num FROM evicted").fetchall()
        return {Priority(priority): num for priority, num in rows}

    @property
    def disk_bytes(self) -> int:
        """What file and log take."""
        paths = (self._path, Path(f"{self._path}-wal"))
        return sum(path.stat().st_size for path in paths if path.exists())

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        try:
            db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute(f"PRAGMA max_page_count = {self._max_pages}")
            db.execute(f"PRAGMA wal_autocheckpoint = {max(1, self._log_pages // 4)}")
            db.execute(f"PRAGMA journal_size_limit = {self._log_pages * PAGE_BYTES // 2}")
            db.executescript(_SCHEMA)
            db.execute(
                "INSERT INTO sqlite_sequence SELECT 'messages', ? "
                "WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'messages')",
                (self._epoch() * EPOCH_NUMBERS,),
            )
            _check(db)
        except BaseException:
            db.close()
            raise
        return db

    @property
    def _epoch_file(self) -> Path:
        return self._path.with_name(f"{self._path.name}.epoch")

    def _epoch(self) -> int:
        """Files before this one: a damaged one does not say which numbers it has used."""
        try:
            return int(self._epoch_file.read_text(encoding="ascii"))
        except (FileNotFoundError, ValueError):
            return 0

    def _begin_epoch(self) -> None:
        write_whole(self._epoch_file, b"%d" % (self._epoch() + 1))

    def _set_aside(self) -> None:
        """Keep a damaged file for whoever wants to look, one at most."""
        self._path.replace(self._path.with_name(f"{self._path.name}.damaged"))
        for suffix in ("-wal", "-shm"):
            Path(f"{self._path}{suffix}").unlink(missing_ok=True)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                message = f"outbox: expected room on the disk, got {error}; free some"
                raise UnavailableError(message) from error

    def _used_pages(self) -> int:
        (num_pages,) = self._db.execute("PRAGMA page_count").fetchone()
        (num_free,) = self._db.execute("PRAGMA freelist_count").fetchone()
        return int(num_pages - num_free)

    def _evict(self) -> bool:
        """Give up the oldest of the lowest priority; say whether there was any."""
        found = self._db.execute("SELECT min(priority) FROM messages").fetchone()[0]
        if found is None:
            return False
        done = self._db.execute(
            "DELETE FROM messages WHERE seq IN "
            "(SELECT seq FROM messages WHERE priority = ? ORDER BY seq LIMIT ?)",
            (found, _EVICT_AT_ONCE),
        )
        self._db.execute(
            "INSERT INTO evicted VALUES (?, ?) "
            "ON CONFLICT (priority) DO UPDATE SET num = num + excluded.num",
            (found, done.rowcount),
        )
        return True

    def _reclaim(self) -> None:
        with self._lock:
            self._db.executescript("PRAGMA incremental_vacuum")  # execute() would free one page
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _check(db: sqlite3.Connection) -> None:
    found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise sqlite3.DatabaseError(found)


def _batches(
    messages: Sequence[tuple[Priority, bytes]],
) -> Iterator[Sequence[tuple[Priority, bytes]]]:
    batch: list[tuple[Priority, bytes]] = []
    num_bytes = 0
    for priority, body in messages:
        if batch and num_bytes + len(body) + _ROW_BYTES > _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append((priority, body))
        num_bytes += len(body) + _ROW_BYTES
    if batch:
        yield batch
