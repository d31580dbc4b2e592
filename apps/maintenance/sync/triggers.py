"""What asks for a new training of a group's model, each with a threshold and hysteresis.

    drift      PSI of the name that has moved most from the training, newest windows of the group
    age        days from the end of the record the model was trained on
    samples    failures on record since then
    precision  share of the model's alerts that a failure followed, of those decided by now

A trigger is raised when its figure passes ``raise_at`` and is cleared only when it has come back
past ``clear_at``; a figure that is not known changes nothing.  Both are in the audit log.

Knows: figures and times.  Does not know: where they come from (``evidence``), what a raised
trigger leads to (``retrainings``).
"""

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from apps.maintenance.edge.spread import DRIFTED, STEADY
from apps.maintenance.sync.audit import append_audit

WATCHER = "triggers"  # the actor of what a figure decides


class Trigger(StrEnum):
    """What may ask for a new training."""

    DRIFT = "drift"
    AGE = "age"
    SAMPLES = "samples"
    PRECISION = "precision"


@dataclass(frozen=True, slots=True)
class Rule:
    """When a trigger is raised and cleared; the order of the two says which way is bad.

    Args:
        raise_at: Figure from which it is raised.
        clear_at: Figure from which it is cleared.
        unit: Of the figure.
    """

    raise_at: float
    clear_at: float
    unit: str

    def is_active(self, value: float, *, before: bool) -> bool:
        """Return whether it stands raised, given whether it did before."""
        sign = 1 if self.raise_at > self.clear_at else -1
        if before:
            return sign * value > sign * self.clear_at
        return sign * value >= sign * self.raise_at


RULES: Mapping[Trigger, Rule] = {
    Trigger.DRIFT: Rule(DRIFTED, STEADY, "PSI"),
    Trigger.AGE: Rule(90.0, 60.0, "days"),
    Trigger.SAMPLES: Rule(500.0, 250.0, "failures"),
    Trigger.PRECISION: Rule(0.3, 0.5, "share"),  # below it two of three alerts are in vain
}


@dataclass(frozen=True, slots=True)
class Reading:
    """A figure.

    Args:
        value: None while it is not known.
        detail: What it is of.
    """

    value: float | None
    detail: str


@dataclass(frozen=True, slots=True)
class Standing:
    """A trigger of a group as it stands.

    Args:
        group: Fleet group.
        trigger: Which.
        is_active: Whether it asks for a new training.
        value: Its last known figure; None if there was none yet.
        detail: What the figure is of.
        since: When it was raised or cleared last, seconds since 1970.
        seen_at: When it was read last.
        retraining: The one that answers it; 0 if none does.
    """

    group: str
    trigger: Trigger
    is_active: bool
    value: float | None
    detail: str
    since: float
    seen_at: float
    retraining: int


def take_readings(
    db: sqlite3.Connection, group: str, readings: Mapping[Trigger, Reading], now: float
) -> Sequence[Standing]:
    """Take in figures, within a transaction; return all triggers of the group."""
    known = {each.trigger: each for each in read_triggers(db, group)}
    for trigger, reading in readings.items():
        before = known.get(trigger, Standing(group, trigger, False, None, "", now, now, 0))
        after = _after(before, reading, now)
        db.execute(
            "INSERT OR REPLACE INTO triggers VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                group,
                trigger,
                after.is_active,
                after.value,
                after.detail,
                after.since,
                after.seen_at,
                after.retraining,
            ),
        )
        if after.is_active != before.is_active:
            facts = {"group": group, "trigger": trigger, "value": after.value}
            action = "raise trigger" if after.is_active else "clear trigger"
            append_audit(db, now, WATCHER, action, {**facts, "detail": after.detail})
    return read_triggers(db, group)


def read_triggers(db: sqlite3.Connection, group: str) -> Sequence[Standing]:
    """Return the triggers of a group in the order of ``Trigger``; those never read are not there."""
    rows = db.execute("SELECT * FROM triggers WHERE grp = ?", (group,)).fetchall()
    found = {row["name"]: row for row in rows}
    return [
        Standing(
            group,
            trigger,
            bool(row["is_active"]),
            *(row[name] for name in ("value", "detail", "since", "seen_at", "retraining")),
        )
        for trigger in Trigger
        if (row := found.get(trigger)) is not None
    ]


def _after(before: Standing, reading: Reading, now: float) -> Standing:
    if reading.value is None:
        value, detail = before.value, reading.detail
        is_active = before.is_active
    else:
        value, detail = reading.value, reading.detail
        is_active = RULES[before.trigger].is_active(reading.value, before=before.is_active)
    has_changed = is_active != before.is_active
    return Standing(
        before.group,
        before.trigger,
        is_active,
        value,
        detail,
        now if has_changed else before.since,
        now,
        0 if has_changed else before.retraining,
    )
