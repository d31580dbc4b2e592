"""Rollouts: which boxes get which bundle, as far as their plan, the shadow and operators allow.

Rules:
    1. A rollout that the shadow objects to is stopped before any box is told of it.
    2. A box that was given a rollout keeps it while it runs.  A box that joins late is given it
       as soon as the share of the stage has room, and after the end with everybody else.
    3. A pause holds back boxes that have not begun; a stop does so for good.
    4. Everything that changes a rollout is in the audit log, in the same transaction.

Knows: reports, plans, time.  Does not know: HTTP, TUF; a box trusts signatures, not this file.
"""

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from apps.maintenance.sync.audit import append_audit
from apps.maintenance.sync.boxes import OFFLINE_S, BoxReport, save_report
from apps.maintenance.sync.database import Database
from apps.maintenance.sync.offers import Offer
from apps.maintenance.sync.operators import Action, Operators, SignedDecision
from apps.maintenance.sync.outcomes import Outcome
from apps.maintenance.sync.policy import Plan, Status, Step, decide
from apps.maintenance.sync.rollout import (
    CLOSED,
    Rollout,
    Shadow,
    open_rollout,
    read_rollout,
    stable_for,
    state_of,
    tally_of,
)
from apps.maintenance.sync.shadow import ShadowLimits
from cluster.errors import ConfigurationError, InvalidRequestError

PLANNER = "rollout"  # the actor of what a plan decides
SWEEP_S = 1.0  # a report that changes nothing looks at silent boxes no more often
_NOT_ITS = {Outcome.PINNED, Outcome.NOT_FOR_THIS_GROUP, Outcome.DOWNGRADE}


class Rollouts:
    """All rollouts of a fleet.

    Args:
        database: Of the fleet.
        operators: Who may decide.
        clock: Returns now, seconds since 1970.
    """

    def __init__(
        self, database: Database, operators: Operators, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._operators = operators
        self._clock = clock
        self._swept_at: dict[int, float] = {}

    def begin(
        self,
        offer: Offer,
        group: str,
        plan: Plan,
        shadow: Shadow,
        limits: ShadowLimits | None = None,
    ) -> Rollout:
        """Begin a rollout, or keep why it was not begun.

        Raises:
            ConfigurationError: The bundle is not for the group, or another rollout is open there.
        """
        if not offer.is_for(group):
            message = f"{offer.path}: expected group {group}, is for {', '.join(offer.groups)}"
            raise ConfigurationError(message)
        objection = (limits or ShadowLimits()).objection(shadow.new, shadow.old)
        status = Status.STOPPED if objection else Status.RUNNING
        with self._database.transaction() as db:
            if (other := open_rollout(db, group)) is not None:
                message = f"group {group}: expected no open rollout, got {other.id} ({other.path})"
                raise ConfigurationError(message)
            done = db.execute(
                "INSERT INTO rollouts (path, version, digest, grp, plan, status, stage, reason, "
                "shadow, acted_at) VALUES (?, ?, ?, ?, ?, ?, 0, ?, ?, 0)",
                (
                    offer.path,
                    offer.version,
                    offer.digest,
                    group,
                    json.dumps(asdict(plan)),
                    status,
                    objection,
                    json.dumps(asdict(shadow)),
                ),
            )
            number = int(done.lastrowid or 0)
            detail = {"rollout": number, "bundle": offer.path, "group": group, "reason": objection}
            append_audit(db, self._clock(), PLANNER, f"begin: {status}", detail)
            rollout = read_rollout(db, number)
            if status is Status.RUNNING:
                self._advance(db, rollout)
            return read_rollout(db, number)

    def report(self, report: BoxReport) -> str | None:
        """Take in what a box says; return the name of the bundle it should take, if any."""
        now = self._clock()
        with self._database.transaction() as db:
            is_new = save_report(db, report, now)
            rollout = open_rollout(db, report.group)
            if rollout is None:
                self._settle_late(db, report)
                return stable_for(db, report)
            has_changed = self._settle(db, rollout, report)
            is_due = now - self._swept_at.get(rollout.id, 0.0) > SWEEP_S
            if rollout.status is Status.RUNNING and (is_new or has_changed or is_due):
                self._swept_at[rollout.id] = now
                self._advance(db, rollout)
                rollout = read_rollout(db, rollout.id)
            state = state_of(db, rollout.id, report.agent)
            is_given = state is not None and rollout.status is not Status.STOPPED
            if is_given and (
                rollout.status is not Status.PAUSED or report.digest == rollout.digest
            ):
                return rollout.path
            return stable_for(db, report)

    def act(self, signed: SignedDecision) -> Rollout:
        """Do what an operator decided.

        Raises:
            AccessDeniedError: Nobody who may decide has signed it.
            InvalidRequestError: It is for another rollout, bundle or stage, was used before, or
                makes no sense where the rollout stands.
        """
        self._operators.check(signed)
        decision = signed.decision
        with self._database.transaction() as db:
            rollout = read_rollout(db, decision.rollout)
            if (decision.digest, decision.stage) != (rollout.digest, rollout.stage):
                message = f"decision: expected bundle and stage of rollout {rollout.id}, "
                raise InvalidRequestError(message + f"which stands at stage {rollout.stage}")
            if decision.issued_at <= rollout.acted_at:
                message = "decision: expected one later than the last, got an old one; sign anew"
                raise InvalidRequestError(message)
            step = _step_of(rollout, decision.action)
            self._move(db, rollout, step, decision.operator, decision.action)
            db.execute(
                "UPDATE rollouts SET acted_at = ? WHERE id = ?", (decision.issued_at, rollout.id)
            )
            if step.status is Status.RUNNING:
                self._advance(db, read_rollout(db, rollout.id))
            return read_rollout(db, rollout.id)

    def list(self) -> Sequence[Rollout]:
        """Return all rollouts, newest first."""
        with self._database.transaction() as db:
            rows = db.execute("SELECT id FROM rollouts ORDER BY id DESC").fetchall()
            return [read_rollout(db, row["id"]) for row in rows]

    def get(self, number: int) -> Rollout:
        """Return a rollout.

        Raises:
            InvalidRequestError: There is none of that number.
        """
        with self._database.transaction() as db:
            return read_rollout(db, number)

    def stable(self, group: str) -> str | None:
        """Return the bundle that all boxes of a group should run."""
        with self._database.transaction() as db:
            row = db.execute("SELECT path FROM stable WHERE grp = ?", (group,)).fetchone()
        return row["path"] if row else None

    def _advance(self, db: sqlite3.Connection, rollout: Rollout) -> None:
        """Give up on silent boxes, decide, and give it to more boxes; until nothing changes."""
        self._give_up_silent(db, rollout)
        while True:
            self._assign(db, rollout)
            step = decide(rollout.plan, rollout.stage, tally_of(db, rollout.id))
            if (step.status, step.stage) == (Status.RUNNING, rollout.stage):
                return
            action = "go on" if step.status is Status.RUNNING else str(step.status)
            self._move(db, rollout, step, PLANNER, action)
            rollout = read_rollout(db, rollout.id)
            if rollout.status is not Status.RUNNING:
                return

    def _assign(self, db: sqlite3.Connection, rollout: Rollout) -> None:
        """Give it to as many boxes as the stage has room for, those that are there first."""
        rows = db.execute(
            "SELECT agent, last_seen FROM boxes WHERE grp = ? AND agent NOT IN "
            "(SELECT agent FROM assignments WHERE rollout = ?)",
            (rollout.group, rollout.id),
        ).fetchall()
        num_given = tally_of(db, rollout.id).num
        room = rollout.plan.num_at(rollout.stage, num_given + len(rows)) - num_given
        if room <= 0:
            return
        now = self._clock()
        ranked = sorted(
            rows,
            key=lambda row: (now - row["last_seen"] > OFFLINE_S, _rank(rollout.id, row["agent"])),
        )
        db.executemany(
            "INSERT INTO assignments VALUES (?, ?, ?, 'pending', ?, '')",
            [(rollout.id, row["agent"], rollout.stage, now) for row in ranked[:room]],
        )

    def _give_up_silent(self, db: sqlite3.Connection, rollout: Rollout) -> None:
        before = self._clock() - rollout.plan.patience_s
        db.execute(
            "UPDATE assignments SET state = 'unreached', detail = 'said nothing' "
            "WHERE rollout = ? AND state = 'pending' AND since < ? AND agent IN "
            "(SELECT agent FROM boxes WHERE last_seen < ?)",
            (rollout.id, before, before),
        )

    def _settle(self, db: sqlite3.Connection, rollout: Rollout, report: BoxReport) -> bool:
        """Note how a box fares with a rollout; return whether that is new."""
        before = state_of(db, rollout.id, report.agent)
        if before is None:
            return False
        state, detail = "pending", report.outcome
        if rollout.digest in report.failed:
            state, detail = "failed", report.failed[rollout.digest]
        elif report.digest == rollout.digest and report.confirmed:
            state, detail = "succeeded", ""
        elif report.outcome in _NOT_ITS:
            state = "unreached"
        if state == before:
            return False
        now = self._clock()
        db.execute(
            "UPDATE assignments SET state = ?, detail = ?, since = ? WHERE rollout = ? AND agent = ?",
            (state, detail, now, rollout.id, report.agent),
        )
        if state != "pending":
            facts = {"rollout": rollout.id, "detail": detail}
            append_audit(db, now, report.agent, state, facts)
        return True

    def _settle_late(self, db: sqlite3.Connection, report: BoxReport) -> None:
        """Note how a box fares that a closed rollout did not wait for."""
        row = db.execute(
            "SELECT rollout FROM assignments WHERE agent = ? AND state IN ('pending', 'unreached') "
            "ORDER BY rollout DESC LIMIT 1",
            (report.agent,),
        ).fetchone()
        if row is not None:
            self._settle(db, read_rollout(db, row["rollout"]), report)

    def _move(
        self, db: sqlite3.Connection, rollout: Rollout, step: Step, actor: str, action: str
    ) -> None:
        db.execute(
            "UPDATE rollouts SET status = ?, stage = ?, reason = ? WHERE id = ?",
            (step.status, step.stage, step.reason, rollout.id),
        )
        if step.status is Status.DONE:
            db.execute(
                "INSERT INTO stable VALUES (?, ?) ON CONFLICT (grp) DO UPDATE SET "
                "path = excluded.path",
                (rollout.group, rollout.path),
            )
        detail = {"rollout": rollout.id, **asdict(step)}
        append_audit(db, self._clock(), actor, action, detail)


def _step_of(rollout: Rollout, action: Action) -> Step:
    """Return what an operator's decision leads to.

    Raises:
        InvalidRequestError: It makes no sense where the rollout stands.
    """
    allowed = {
        Action.APPROVE: {Status.AWAITING_APPROVAL: Status.RUNNING},
        Action.PAUSE: {Status.RUNNING: Status.PAUSED},
        Action.RESUME: {Status.PAUSED: Status.RUNNING},
        Action.STOP: {each: Status.STOPPED for each in Status if each not in CLOSED},
    }[action]
    if rollout.status not in allowed:
        message = f"rollout {rollout.id}: expected {' or '.join(allowed)} to {action}, "
        raise InvalidRequestError(message + f"it is {rollout.status}")
    stage = rollout.stage + (action is Action.APPROVE)
    return Step(allowed[rollout.status], stage, f"{action} by an operator")


def _rank(number: int, agent: str) -> bytes:
    """Return an order of boxes that differs from rollout to rollout."""
    return hashlib.sha256(f"{number}/{agent}".encode()).digest()
