"""Uploads by machine and kind, so that a page reads what it shows and no more.

The tables lie in the fleet's database beside the messages and are made from them alone: each
call of ``catch_up`` takes in what has come since.  Deleting them costs one pass over all
messages.  A message that is not what its kind promises is counted and left out.
"""

import json
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from apps.console.uploads import EVENT, FORECAST, TELEMETRY, Event, Telemetry, parse_upload
from apps.maintenance.sync.database import Database

_CHUNK = 2000  # messages of one transaction
_SCHEMA = """
CREATE TABLE IF NOT EXISTS console_read (
    agent TEXT PRIMARY KEY, seq INTEGER NOT NULL, malformed INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS console_index (
    agent TEXT NOT NULL, machine TEXT NOT NULL, kind TEXT NOT NULL, seq INTEGER NOT NULL,
    moment REAL NOT NULL, version TEXT, peak REAL, life REAL,
    PRIMARY KEY (agent, machine, kind, seq)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS console_versions ON console_index (agent, version, seq)
    WHERE kind = 'forecast';
CREATE INDEX IF NOT EXISTS console_alerts ON console_index (moment) WHERE kind = 'alert';
CREATE TABLE IF NOT EXISTS console_machines (
    agent TEXT NOT NULL, machine TEXT NOT NULL, seq INTEGER NOT NULL, moment REAL NOT NULL,
    peak REAL NOT NULL, PRIMARY KEY (agent, machine)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS console_peaks ON console_machines (peak);
"""


@dataclass(frozen=True, slots=True)
class Place:
    """A message in the index.

    Args:
        seq: Its number.
        moment: Seconds since 1970.
        peak: Its largest hazard; None if it has none.
    """

    seq: int
    moment: float
    peak: float | None


class MessageIndex:
    """The index of one fleet.

    Args:
        database: Of the fleet.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._catching_up = threading.Lock()
        with database.transaction() as db:
            for statement in _SCHEMA.split(";\n"):
                db.execute(statement)

    def catch_up(self) -> None:
        """Take in all that has come since the last call; boxes may go on uploading meanwhile."""
        with self._catching_up:
            with self._database.transaction() as db:
                rows = db.execute(
                    "SELECT boxes.agent, coalesce(console_read.seq, 0) FROM boxes "
                    "LEFT JOIN console_read USING (agent)"
                ).fetchall()
            for agent, seq in rows:
                last: int | None = seq
                while last is not None:
                    last = self._take(agent, last)

    def malformed(self) -> dict[str, int]:
        """Return how many messages of each box could not be read, where any could not."""
        with self._database.transaction() as db:
            rows = db.execute(
                "SELECT agent, malformed FROM console_read WHERE malformed"
            ).fetchall()
        return {row["agent"]: row["malformed"] for row in rows}

    def places(self, agent: str, machine: str, kind: str, since: float) -> Sequence[Place]:
        """Return a machine's messages of one kind from a moment on, by number."""
        with self._database.transaction() as db:
            rows = db.execute(
                "SELECT seq, moment, peak FROM console_index WHERE agent = ? AND machine = ? AND "
                "kind = ? AND moment >= ? ORDER BY seq",
                (agent, machine, kind, since),
            ).fetchall()
        return [Place(*row) for row in rows]

    def newest(self, agent: str, machine: str, kind: str, limit: int) -> Sequence[int]:
        """Return the numbers of the newest messages of one kind, newest first."""
        with self._database.transaction() as db:
            rows = db.execute(
                "SELECT seq FROM console_index WHERE agent = ? AND machine = ? AND kind = ? "
                "ORDER BY seq DESC LIMIT ?",
                (agent, machine, kind, limit),
            ).fetchall()
        return [row["seq"] for row in rows]

    def bodies(self, agent: str, numbers: Sequence[int]) -> Sequence[dict[str, object]]:
        """Return the messages of these numbers, in their order."""
        with self._database.transaction() as db:
            rows = [
                db.execute(
                    "SELECT body FROM messages WHERE agent = ? AND seq = ?", (agent, seq)
                ).fetchone()
                for seq in numbers
            ]
        return [json.loads(row["body"]) for row in rows]

    def _take(self, agent: str, after: int) -> int | None:
        """Take in some messages of a box; return the last number, None if there were none."""
        with self._database.transaction() as db:
            rows = db.execute(
                "SELECT seq, body FROM messages WHERE agent = ? AND seq > ? ORDER BY seq LIMIT ?",
                (agent, after, _CHUNK),
            ).fetchall()
            if not rows:
                return None
            num_malformed = 0
            for seq, body in rows:
                try:
                    _add(db, agent, seq, json.loads(body))
                except (ValueError, OverflowError):
                    num_malformed += 1
            last = int(rows[-1]["seq"])
            db.execute(
                "INSERT INTO console_read VALUES (?, ?, ?) ON CONFLICT (agent) DO UPDATE SET "
                "seq = excluded.seq, malformed = malformed + excluded.malformed",
                (agent, last, num_malformed),
            )
        return last


def _add(db: sqlite3.Connection, agent: str, seq: int, body: dict[str, object]) -> None:
    """Put one message into the index.

    Raises:
        ValueError: It is malformed.
    """
    found = parse_upload(body)
    if found is None:
        return
    insert = "INSERT OR IGNORE INTO console_index VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
    if isinstance(found, Event):
        db.execute(insert, (agent, found.machine, EVENT, seq, found.moment, None, None, None))
        return
    if isinstance(found, Telemetry):
        db.execute(insert, (agent, found.machine, TELEMETRY, seq, found.moment, None, None, None))
        return
    facts = found.moment, found.version, found.peak, found.life[1]
    db.execute(insert, (agent, found.machine, found.kind, seq, *facts))
    if found.kind == FORECAST:
        db.execute(
            "INSERT INTO console_machines VALUES (?, ?, ?, ?, ?) ON CONFLICT (agent, machine) "
            "DO UPDATE SET seq = excluded.seq, moment = excluded.moment, peak = excluded.peak",
            (agent, found.machine, seq, found.moment, found.peak),
        )
