"""The boxes of a fleet, as they report themselves, and what they upload."""

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from apps.maintenance.sync.database import Database
from cluster.errors import InvalidRequestError

MAX_NAME = 64  # characters
OFFLINE_S = 900.0  # a box that was silent for longer counts as offline


@dataclass(frozen=True, slots=True)
class BoxReport:
    """What a box says of itself; see ``edge.agent.Agent.status``.

    Args:
        agent: Its name.
        group: Its fleet group.
        version: That serves; 0 if none.
        digest: sha256 of the bundle that serves; empty if none.
        confirmed: Whether its watch has ended well.
        failed: sha256 of bundles that it gave up, and how.
        outcome: How its last update ended.
        facts: All it said, for whoever looks.
    """

    agent: str
    group: str
    version: int
    digest: str
    confirmed: bool
    failed: Mapping[str, str]
    outcome: str
    facts: Mapping[str, Any]

    @classmethod
    def from_record(cls, agent: str, record: Mapping[str, Any]) -> Self:
        """Return what came over a wire.

        Raises:
            InvalidRequestError: It is not the report of this box.
        """
        kinds = {
            "group": str,
            "version": int,
            "digest": str,
            "confirmed": bool,
            "failed": dict,
            "outcome": str,
        }
        wrong = [name for name, kind in kinds.items() if not isinstance(record.get(name), kind)]
        if wrong or record.get("agent") != agent or not 0 < len(record["group"]) <= MAX_NAME:
            message = f"report: expected the facts of box {agent!r:.66}, wrong: {wrong or 'names'}"
            raise InvalidRequestError(message)
        return cls(agent=agent, **{name: record[name] for name in kinds}, facts=record)


@dataclass(frozen=True, slots=True)
class Box:
    """A box as the platform knows it.

    Args:
        agent: Its name.
        group: Its fleet group.
        version: That serves there.
        first_seen: Seconds since 1970.
        last_seen: Seconds since 1970.
        is_offline: Whether it has been silent for longer than ``OFFLINE_S``.
        facts: Its last report.
    """

    agent: str
    group: str
    version: int
    first_seen: float
    last_seen: float
    is_offline: bool
    facts: Mapping[str, Any]


def save_report(db: sqlite3.Connection, report: BoxReport, now: float) -> bool:
    """Keep the report of a box; return whether it is new in its group."""
    known = db.execute("SELECT grp FROM boxes WHERE agent = ?", (report.agent,)).fetchone()
    db.execute(
        "INSERT INTO boxes VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (agent) DO UPDATE SET "
        "grp = excluded.grp, last_seen = excluded.last_seen, version = excluded.version, "
        "facts = excluded.facts",
        (report.agent, report.group, now, now, report.version, json.dumps(report.facts)),
    )
    return known is None or known[0] != report.group


def save_messages(database: Database, agent: str, messages: Sequence[Mapping[str, Any]]) -> int:
    """Keep what a box uploaded, each message once; return the last number.

    Raises:
        InvalidRequestError: They are not messages in order.
    """
    rows: list[tuple[str, int, str, str]] = []
    for message in messages:
        seq, body = message.get("seq"), message.get("body")
        if not isinstance(seq, int) or not isinstance(body, dict) or (rows and seq <= rows[-1][1]):
            text = f"messages: expected seq in order and a body, got seq {seq!r:.40}"
            raise InvalidRequestError(text)
        rows.append((agent, seq, str(body.get("kind", "")), json.dumps(body)))
    if not rows:
        text = "messages: expected one or more, got none"
        raise InvalidRequestError(text)
    with database.transaction() as db:
        db.executemany("INSERT OR IGNORE INTO messages VALUES (?, ?, ?, ?)", rows)
    return rows[-1][1]


def read_messages(
    database: Database, agent: str, after: int = 0, limit: int = 1000
) -> Sequence[tuple[int, Mapping[str, Any]]]:
    """Return what a box uploaded, by number."""
    with database.transaction() as db:
        rows = db.execute(
            "SELECT seq, body FROM messages WHERE agent = ? AND seq > ? ORDER BY seq LIMIT ?",
            (agent, after, limit),
        ).fetchall()
    return [(seq, json.loads(body)) for seq, body in rows]


def list_boxes(database: Database, now: float) -> Sequence[Box]:
    """Return all boxes by name."""
    with database.transaction() as db:
        rows = db.execute("SELECT * FROM boxes ORDER BY agent").fetchall()
    return [
        Box(
            agent=row["agent"],
            group=row["grp"],
            version=row["version"],
            first_seen=row["first_seen"],
            last_seen=row["last_seen"],
            is_offline=now - row["last_seen"] > OFFLINE_S,
            facts=json.loads(row["facts"]),
        )
        for row in rows
    ]
