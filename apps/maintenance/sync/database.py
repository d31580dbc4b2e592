"""The platform's file of the fleet: one SQLite database, written in transactions.

boxes        one row per box: what it last reported
messages     what boxes uploaded, each once
rollouts     one row per rollout, with its plan and where it stands
assignments  which box was given which rollout, and how that ended
stable       the bundle of each fleet group that all its boxes should run
triggers     what asks for a new training of a group's model, and whether it does now
retrainings  trainings that were begun, and how they ended
audit        what was decided, by whom, in a chain of hashes; nothing in it can be changed
"""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

_SCHEMA = """
CREATE TABLE IF NOT EXISTS boxes (
    agent TEXT PRIMARY KEY, grp TEXT NOT NULL, first_seen REAL NOT NULL, last_seen REAL NOT NULL,
    version INTEGER NOT NULL, facts TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS boxes_of_group ON boxes (grp);
CREATE TABLE IF NOT EXISTS messages (
    agent TEXT NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL,
    PRIMARY KEY (agent, seq)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS alerts_of_boxes ON messages (agent, seq) WHERE kind = 'alert';
CREATE TABLE IF NOT EXISTS rollouts (
    id INTEGER PRIMARY KEY, path TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL,
    grp TEXT NOT NULL, plan TEXT NOT NULL, status TEXT NOT NULL, stage INTEGER NOT NULL,
    reason TEXT NOT NULL, shadow TEXT NOT NULL, acted_at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS assignments (
    rollout INTEGER NOT NULL REFERENCES rollouts, agent TEXT NOT NULL, stage INTEGER NOT NULL,
    state TEXT NOT NULL, since REAL NOT NULL, detail TEXT NOT NULL,
    PRIMARY KEY (rollout, agent)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS assignments_of_box ON assignments (agent);
CREATE TABLE IF NOT EXISTS stable (grp TEXT PRIMARY KEY, path TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS triggers (
    grp TEXT NOT NULL, name TEXT NOT NULL, is_active INTEGER NOT NULL, value REAL,
    detail TEXT NOT NULL, since REAL NOT NULL, seen_at REAL NOT NULL, retraining INTEGER NOT NULL,
    PRIMARY KEY (grp, name)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS retrainings (
    id INTEGER PRIMARY KEY, grp TEXT NOT NULL, reasons TEXT NOT NULL, status TEXT NOT NULL,
    detail TEXT NOT NULL, began_at REAL NOT NULL, ended_at REAL NOT NULL, version INTEGER NOT NULL,
    rollout INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS audit (
    seq INTEGER PRIMARY KEY, time REAL NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL,
    detail TEXT NOT NULL, previous TEXT NOT NULL, hash TEXT NOT NULL
);
CREATE TRIGGER IF NOT EXISTS audit_is_final BEFORE UPDATE ON audit
    BEGIN SELECT RAISE(ABORT, 'the audit log cannot be changed'); END;
CREATE TRIGGER IF NOT EXISTS audit_is_kept BEFORE DELETE ON audit
    BEGIN SELECT RAISE(ABORT, 'the audit log cannot be shortened'); END;
"""


class Database:
    """The open file; may be used by several threads.

    Args:
        path: The file; made if there is none.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._depth = 0
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.executescript(_SCHEMA)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run a block wholly or not at all; blocks may be nested."""
        with self._lock:
            if self._depth == 0:
                self._db.execute("BEGIN IMMEDIATE")
            self._depth += 1
            try:
                yield self._db
            except BaseException:
                if self._depth == 1:
                    self._db.execute("ROLLBACK")
                raise
            else:
                if self._depth == 1:
                    self._db.execute("COMMIT")
            finally:
                self._depth -= 1
