"""What each page shows, as JSON; every answer says what time it is and how many alerts wait."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from apps.console.alerts import Alerts
from apps.console.bundles import Bundles
from apps.console.drift import NUM, Drift
from apps.console.index import MessageIndex
from apps.console.ledger import NAME, read_ledger
from apps.console.machines import Machines
from apps.maintenance.edge.spread import DRIFTED, STEADY
from apps.maintenance.sync.boxes import Box
from apps.maintenance.sync.control import Control
from apps.maintenance.sync.rollout import Rollout
from apps.maintenance.sync.triggers import RULES
from cluster.errors import ConfigurationError

MAX_BOXES = 200  # of one answer
NUM_AUDIT = 200
MAX_RETRAININGS = 50


class Views:
    """The pages of one fleet.

    Args:
        control: Of the fleet.
        clock: Returns now, seconds since 1970; that of the control.
    """

    def __init__(self, control: Control, clock: Callable[[], float] = time.time) -> None:
        self._control = control
        self._clock = clock
        self._index = MessageIndex(control.database)
        bundles = Bundles(control.repository)
        self._machines = Machines(control.database, self._index, bundles)
        self._drift = Drift(control.database, bundles)
        self._alerts = Alerts(control.database, bundles, clock)

    def fleet(self, find: str) -> Mapping[str, Any]:
        """Return boxes, offline ones first, and the machines with the highest hazards."""
        self._index.catch_up()
        boxes = self._control.boxes()
        malformed = self._index.malformed()
        found = [box for box in boxes if find.lower() in f"{box.agent} {box.group}".lower()]
        found.sort(key=lambda box: (not box.is_offline, box.agent))
        state_of = {box.agent: box.is_offline for box in boxes}
        machines = [
            {**each, "is_offline": state_of.get(each["agent"], True)}
            for each in self._machines.highest(find)
        ]
        return self._answer(
            num_boxes=len(boxes),
            num_offline=sum(box.is_offline for box in boxes),
            num_waiting=sum(_count(box, "waiting") for box in boxes),
            num_machines=self._machines.count(""),
            num_boxes_found=len(found),
            num_machines_found=self._machines.count(find),
            boxes=[_box(box, malformed.get(box.agent, 0)) for box in found[:MAX_BOXES]],
            machines=machines,
        )

    def machine(self, agent: str, machine: str, hours: float) -> Mapping[str, Any]:
        """Return one machine over time."""
        self._index.catch_up()
        found = self._machines.history(agent, machine, hours)
        box = next((each for each in self._control.boxes() if each.agent == agent), None)
        return self._answer(
            **found,
            box=_box(box, 0) if box else None,
            alerts=self._alerts.of_machine(agent, machine, found["since"]),
        )

    def alerts(self) -> Mapping[str, Any]:
        """Return open and acknowledged alerts."""
        self._index.catch_up()
        return self._answer(**self._alerts.view())

    def acknowledge(self, agent: str, seq: int, name: str) -> Mapping[str, Any]:
        """Acknowledge an alert; return what is left."""
        self._index.catch_up()
        self._alerts.acknowledge(agent, seq, name)
        return self.alerts()

    def rollouts(self) -> Mapping[str, Any]:
        """Return rollouts, newest first, and the public keys of those who may decide."""
        folder = self._control.operators
        return self._answer(
            rollouts=[self._rollout(each) for each in self._control.rollouts.list()],
            operators={path.stem: path.read_text() for path in sorted(folder.glob("*.pub"))},
        )

    def drift(self) -> Mapping[str, Any]:
        """Return how far each box has moved, what asks for a new training, and what came of it."""
        self._index.catch_up()
        retrainings = self._control.retrainings
        return self._answer(
            boxes=self._drift.view(self._control.boxes()),
            triggers=[
                {**asdict(each), **asdict(RULES[each.trigger])} for each in retrainings.triggers()
            ],
            retrainings=[asdict(each) for each in retrainings.list()[:MAX_RETRAININGS]],
            needed=2 * NUM,
            steady=STEADY,
            drifted=DRIFTED,
        )

    def ledger(self) -> Mapping[str, Any]:
        """Return the downtime ledger; null if there is none yet."""
        return self._answer(ledger=read_ledger(self._control.repository.parent / NAME))

    def audit(self) -> Mapping[str, Any]:
        """Return the end of the audit log, newest first, and whether its chain holds."""
        end, broken = "", ""
        try:
            end = self._control.verify_audit()
        except ConfigurationError as error:
            broken = str(error)
        entries = [asdict(each) for each in reversed(self._control.audit(NUM_AUDIT))]
        return self._answer(entries=entries, end=end, broken=broken)

    def _rollout(self, rollout: Rollout) -> Mapping[str, Any]:
        with self._control.database.transaction() as db:
            num_boxes = db.execute(
                "SELECT count(*) FROM boxes WHERE grp = ?", (rollout.group,)
            ).fetchone()[0]
            rows = db.execute(
                "SELECT agent, stage, state, since, detail FROM assignments WHERE rollout = ? "
                "ORDER BY state = 'succeeded', agent LIMIT ?",
                (rollout.id, MAX_BOXES),
            ).fetchall()
        plan = rollout.plan
        return {
            **asdict(rollout),
            "num_boxes": num_boxes,
            "stages": [
                {
                    "share": share,
                    "num": plan.num_at(stage, num_boxes),
                    "needs_approval": stage in plan.approvals and stage < len(plan.shares) - 1,
                }
                for stage, share in enumerate(plan.shares)
            ],
            "assignments": [dict(row) for row in rows],
        }

    def _answer(self, **facts: object) -> Mapping[str, Any]:
        return {"now": self._clock(), "num_open_alerts": self._alerts.num_open, **facts}


def _box(box: Box, num_malformed: int) -> Mapping[str, Any]:
    facts = box.facts
    return {
        "agent": box.agent,
        "group": box.group,
        "version": box.version,
        "last_seen": box.last_seen,
        "is_offline": box.is_offline,
        "slot": str(facts.get("slot") or ""),
        "confirmed": bool(facts.get("confirmed")),
        "waiting": _count(box, "waiting"),
        "num_evicted": _num_evicted(facts.get("evicted")),
        "outcome": str(facts.get("outcome") or ""),
        "num_malformed": num_malformed,
    }


def _count(box: Box, name: str) -> int:
    """Return a count that a box may have reported; anything else is none."""
    found = box.facts.get(name)
    return found if isinstance(found, int) else 0


def _num_evicted(found: object) -> int:
    counts = found.values() if isinstance(found, dict) else ()
    return sum(count for count in counts if isinstance(count, int))
