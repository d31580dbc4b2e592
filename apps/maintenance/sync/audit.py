"""The audit log: who decided what, in a chain of hashes.

Every entry holds the hash of the one before.  The database refuses to change or delete one;
whoever does it past the database breaks the chain, and ``verify_audit`` says where.
"""

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.errors import ConfigurationError

START = "0" * 64


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the log.

    Args:
        seq: Its number, from 1.
        time: Seconds since 1970.
        actor: Who: an operator, a box, or ``rollout`` for what a plan decides.
        action: What.
        detail: On what, and why; JSON.
        hash: Of this entry and the hash before it.
    """

    seq: int
    time: float
    actor: str
    action: str
    detail: str
    hash: str


def append_audit(
    db: sqlite3.Connection, time: float, actor: str, action: str, detail: Mapping[str, object]
) -> None:
    """Append an entry, within a transaction."""
    row = db.execute("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1").fetchone()
    seq, previous = (row[0] + 1, row[1]) if row else (1, START)
    text = json.dumps(detail, sort_keys=True)
    digest = _hash_of(seq, time, actor, action, text, previous)
    db.execute(
        "INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?)",
        (seq, time, actor, action, text, previous, digest),
    )


def read_audit(db: sqlite3.Connection, limit: int = 100) -> Sequence[Entry]:
    """Return the newest entries, oldest first."""
    rows = db.execute(
        "SELECT seq, time, actor, action, detail, hash FROM audit ORDER BY seq DESC LIMIT ?",
        (limit,),
    ).fetchall()
    return [Entry(*row) for row in reversed(rows)]


def verify_audit(db: sqlite3.Connection) -> str:
    """Check the whole chain; return the hash of its end.

    A copy of that hash, kept elsewhere, later proves that nothing was cut off the end.

    Raises:
        ConfigurationError: An entry was altered, left out or put in.
    """
    previous = START
    rows = db.execute("SELECT * FROM audit ORDER BY seq").fetchall()
    for expected, (seq, time, actor, action, detail, before, digest) in enumerate(rows, start=1):
        found = _hash_of(seq, time, actor, action, detail, previous)
        if (seq, before, digest) != (expected, previous, found):
            message = f"audit: expected an unbroken chain, entry {expected} does not follow"
            raise ConfigurationError(message)
        previous = digest
    return previous


def _hash_of(seq: int, time: float, actor: str, action: str, detail: str, previous: str) -> str:
    line = json.dumps([seq, time, actor, action, detail, previous])
    return hashlib.sha256(line.encode()).hexdigest()
