"""One rollout as the database has it.

Knows: rows.  Does not know: when a rollout goes on (``policy``), who reports (``rollouts``).
"""

import json
import sqlite3
from dataclasses import dataclass
from typing import Any

from apps.maintenance.sync.boxes import BoxReport
from apps.maintenance.sync.policy import Plan, Status, Tally
from apps.maintenance.sync.shadow import ShadowFigures
from cluster.errors import InvalidRequestError

CLOSED = (Status.STOPPED, Status.DONE)


@dataclass(frozen=True, slots=True)
class Shadow:
    """What the shadow found.

    Args:
        new: Of the bundle to roll out.
        old: Of the one in use; None if there is none yet.
    """

    new: ShadowFigures
    old: ShadowFigures | None


@dataclass(frozen=True, slots=True)
class Rollout:
    """A rollout as it stands.

    Args:
        id: Its number.
        path: Name of its bundle.
        version: Of the bundle.
        digest: sha256 of the bundle.
        group: Fleet group.
        plan: How it proceeds.
        status: Where it stands.
        stage: At which stage.
        reason: Why it stands there.
        shadow: What the shadow found.
        acted_at: Time of the last decision of an operator, seconds since 1970.
        tally: Its boxes.
    """

    id: int
    path: str
    version: int
    digest: str
    group: str
    plan: Plan
    status: Status
    stage: int
    reason: str
    shadow: Shadow
    acted_at: float
    tally: Tally


def open_rollout(db: sqlite3.Connection, group: str) -> Rollout | None:
    """Return the rollout of a group that is neither done nor stopped."""
    row = db.execute(
        "SELECT id FROM rollouts WHERE grp = ? AND status NOT IN (?, ?)", (group, *CLOSED)
    ).fetchone()
    return read_rollout(db, row["id"]) if row else None


def read_rollout(db: sqlite3.Connection, number: int) -> Rollout:
    """Return a rollout.

    Raises:
        InvalidRequestError: There is none of that number.
    """
    row = db.execute("SELECT * FROM rollouts WHERE id = ?", (number,)).fetchone()
    if row is None:
        message = f"rollout: expected one that was begun, got {number}"
        raise InvalidRequestError(message)
    plan: dict[str, Any] = json.loads(row["plan"])
    plan |= {name: tuple(plan[name]) for name in ("shares", "approvals")}
    shadow = json.loads(row["shadow"])
    return Rollout(
        id=row["id"],
        path=row["path"],
        version=row["version"],
        digest=row["digest"],
        group=row["grp"],
        plan=Plan(**plan),
        status=Status(row["status"]),
        stage=row["stage"],
        reason=row["reason"],
        shadow=Shadow(
            ShadowFigures(**shadow["new"]),
            ShadowFigures(**shadow["old"]) if shadow["old"] else None,
        ),
        acted_at=row["acted_at"],
        tally=tally_of(db, number),
    )


def tally_of(db: sqlite3.Connection, number: int) -> Tally:
    """Return the boxes of a rollout by how it went."""
    rows = db.execute(
        "SELECT state, count(*) AS num FROM assignments WHERE rollout = ? GROUP BY state", (number,)
    ).fetchall()
    return Tally(**{row["state"]: row["num"] for row in rows})


def state_of(db: sqlite3.Connection, number: int, agent: str) -> str | None:
    """Return how a box fares with a rollout; None if it was not given it."""
    row = db.execute(
        "SELECT state FROM assignments WHERE rollout = ? AND agent = ?", (number, agent)
    ).fetchone()
    return row["state"] if row else None


def stable_for(db: sqlite3.Connection, report: BoxReport) -> str | None:
    """Return the stable bundle of a box's group, unless it runs one of a rollout since."""
    taken = db.execute(
        "SELECT 1 FROM assignments JOIN rollouts ON rollout = id "
        "WHERE agent = ? AND digest = ? AND status != ?",
        (report.agent, report.digest, Status.DONE),
    ).fetchone()
    row = db.execute("SELECT path FROM stable WHERE grp = ?", (report.group,)).fetchone()
    return row["path"] if row and not taken else None
