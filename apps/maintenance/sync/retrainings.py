"""New trainings of a group's model: when one is due, and how each went.

    running -> waiting | rolled_out | refused | failed,   waiting -> running

Rules:
    1. One at a time in a group, and none while a rollout of the group is open: what is on its
       way may already be the answer.
    2. A trigger that is raised meanwhile is folded into the one that runs.
    3. A trigger that stays raised asks again ``PAUSE_S`` after the training that was to answer
       it; one that is raised anew asks at once, whatever became of the last training.
    4. One whose process died is still running here, and is gone on with.
    5. Everything that changes is in the audit log, in the same transaction.
"""

import sqlite3
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from apps.maintenance.sync.audit import append_audit
from apps.maintenance.sync.database import Database
from apps.maintenance.sync.rollout import open_rollout
from apps.maintenance.sync.triggers import Reading, Standing, Trigger, read_triggers, take_readings

TRAINER = "retraining"  # the actor
PAUSE_S = 86_400.0


class State(StrEnum):
    """Where a retraining stands."""

    RUNNING = "running"
    WAITING = "waiting"  # for signing keys, or for another rollout to end
    ROLLED_OUT = "rolled_out"  # its rollout was begun
    REFUSED = "refused"  # by the shadow
    FAILED = "failed"


OPEN = (State.RUNNING, State.WAITING)


@dataclass(frozen=True, slots=True)
class Retraining:
    """One retraining.

    Args:
        number: Its number.
        group: Fleet group.
        reasons: Triggers that it answers.
        state: Where it stands.
        detail: Why it stands there.
        began_at: Seconds since 1970.
        ended_at: Likewise; 0 while it is open.
        version: Of its bundle; 0 before there is one.
        rollout: Its number; 0 before there is one.
    """

    number: int
    group: str
    reasons: tuple[str, ...]
    state: State
    detail: str
    began_at: float
    ended_at: float
    version: int
    rollout: int


class Retrainings:
    """All retrainings of a fleet.

    Args:
        database: Of the fleet.
        clock: Returns now, seconds since 1970.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def look(
        self,
        group: str,
        readings: Mapping[Trigger, Reading],
        early: Collection[Trigger] = (),
    ) -> Retraining | None:
        """Take in figures; return the retraining that is to be done now, new or interrupted.

        Args:
            group: Fleet group.
            readings: Figures by trigger.
            early: Triggers that a training could not answer yet, for want of labels.
        """
        now = self._clock()
        with self._database.transaction() as db:
            standings = take_readings(db, group, readings, now)
            if (interrupted := _open(db, group)) is not None:
                self._fold(db, interrupted, standings)
                return _read(db, interrupted.number)
            due = [each.trigger for each in standings if _is_due(db, each, now)]
            reasons = [each for each in due if each not in early]
            if not reasons or open_rollout(db, group) is not None:
                return None
            done = db.execute(
                "INSERT INTO retrainings (grp, reasons, status, detail, began_at, ended_at, "
                "version, rollout) VALUES (?, ?, ?, '', ?, 0, 0, 0)",
                (group, " ".join(reasons), State.RUNNING, now),
            )
            number = int(done.lastrowid or 0)
            self._answer(db, group, number)
            facts = {"retraining": number, "group": group, "reasons": reasons}
            append_audit(db, now, TRAINER, "begin retraining", facts)
            return _read(db, number)

    def fold(self, group: str, readings: Mapping[Trigger, Reading]) -> None:
        """Take in figures while a retraining runs: what is raised is answered by it."""
        with self._database.transaction() as db:
            standings = take_readings(db, group, readings, self._clock())
            if (running := _open(db, group)) is not None:
                self._fold(db, running, standings)

    def note(
        self, number: int, state: State, detail: str, *, version: int = 0, rollout: int = 0
    ) -> Retraining:
        """Note where a retraining stands; return it."""
        now = self._clock()
        with self._database.transaction() as db:
            before = _read(db, number)
            db.execute(
                "UPDATE retrainings SET status = ?, detail = ?, ended_at = ?, version = ?, "
                "rollout = ? WHERE id = ?",
                (
                    state,
                    detail,
                    0.0 if state in OPEN else now,
                    version or before.version,
                    rollout or before.rollout,
                    number,
                ),
            )
            if (state, detail) != (before.state, before.detail):
                facts = {"retraining": number, "group": before.group, "detail": detail}
                append_audit(db, now, TRAINER, f"retraining {state}", facts)
            return _read(db, number)

    def list(self, group: str = "") -> Sequence[Retraining]:
        """Return the retrainings of a group, or of all, newest first."""
        with self._database.transaction() as db:
            rows = db.execute(
                "SELECT id FROM retrainings WHERE grp = ? OR ? = '' ORDER BY id DESC",
                (group, group),
            ).fetchall()
            return [_read(db, row["id"]) for row in rows]

    def triggers(self) -> Sequence[Standing]:
        """Return the triggers of all groups, by group."""
        with self._database.transaction() as db:
            rows = db.execute("SELECT DISTINCT grp FROM triggers ORDER BY grp").fetchall()
            return [each for row in rows for each in read_triggers(db, row["grp"])]

    def _fold(
        self, db: sqlite3.Connection, running: Retraining, standings: Sequence[Standing]
    ) -> None:
        late = [each.trigger for each in standings if each.is_active and not each.retraining]
        if not late:
            return
        reasons = " ".join(
            [*running.reasons, *(each for each in late if each not in running.reasons)]
        )
        db.execute("UPDATE retrainings SET reasons = ? WHERE id = ?", (reasons, running.number))
        self._answer(db, running.group, running.number)
        facts = {"retraining": running.number, "group": running.group, "triggers": late}
        append_audit(db, self._clock(), TRAINER, "fold triggers", facts)

    def _answer(self, db: sqlite3.Connection, group: str, number: int) -> None:
        db.execute(
            "UPDATE triggers SET retraining = ? WHERE grp = ? AND is_active", (number, group)
        )


def _is_due(db: sqlite3.Connection, standing: Standing, now: float) -> bool:
    if not standing.is_active or not standing.retraining:
        return standing.is_active
    return now >= _read(db, standing.retraining).ended_at + PAUSE_S


def _open(db: sqlite3.Connection, group: str) -> Retraining | None:
    """Return the retraining of a group that is running or waits."""
    row = db.execute(
        "SELECT id FROM retrainings WHERE grp = ? AND status IN (?, ?)", (group, *OPEN)
    ).fetchone()
    return _read(db, row["id"]) if row else None


def _read(db: sqlite3.Connection, number: int) -> Retraining:
    row = db.execute("SELECT * FROM retrainings WHERE id = ?", (number,)).fetchone()
    return Retraining(
        number=row["id"],
        group=row["grp"],
        reasons=tuple(row["reasons"].split()),
        state=State(row["status"]),
        **{name: row[name] for name in ("detail", "began_at", "ended_at", "version", "rollout")},
    )
