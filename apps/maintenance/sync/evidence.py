"""Figures for the triggers: from what boxes report, what they uploaded, and the plant's record.

The record is a fleet's tables (``apps.maintenance.tables``), written by the plant: it alone knows
what has failed.  An alert is decided once the record covers its horizon: right if the component
failed, wrong if nothing happened; one whose component was replaced in time is left out, because
nobody can know.

Legend: K records.
"""

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apps.maintenance.edge.bundle import BundleInfo
from apps.maintenance.fleet import Fleet, Records
from apps.maintenance.sync.boxes import Box
from apps.maintenance.sync.triggers import Reading, Trigger

LEAST_WINDOWS = 500  # of a group, below which their distribution says nothing
LEAST_ALERTS = 20  # decided ones, below which their share says nothing
HOUR_S, DAY_S = 3600.0, 86_400.0


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert that a box uploaded.

    Args:
        machine: Its name.
        component: Its name.
        moment: Seconds since 1970.
    """

    machine: str
    component: str
    moment: float


def readings(
    info: BundleInfo, boxes: Iterable[Box], alerts: Iterable[Alert], record: Fleet, now: float
) -> Mapping[Trigger, Reading]:
    """Return the figures of a group.

    Args:
        info: Of the bundle it runs.
        boxes: Of the group, those that are online.
        alerts: Of that bundle.
        record: Of its machines.
        now: Seconds since 1970.
    """
    return {
        Trigger.DRIFT: read_drift(info, boxes),
        Trigger.AGE: _read_age(info, now),
        Trigger.SAMPLES: _read_samples(info, record),
        Trigger.PRECISION: read_precision(info, alerts, record),
    }


def read_drift(info: BundleInfo, boxes: Iterable[Box]) -> Reading:
    """Return the PSI of the name that has moved most, over the windows of all boxes together."""
    psis, num = drift_of(info, boxes)
    if not info.reference:
        return Reading(None, f"{info.name}: its bundle says nothing of its training")
    if num < LEAST_WINDOWS:
        return Reading(None, f"{num} of {LEAST_WINDOWS} windows")
    name = max(psis, key=lambda each: psis[each])
    return Reading(round(psis[name], 4), f"{name}, {num} windows")


def drift_of(info: BundleInfo, boxes: Iterable[Box]) -> tuple[Mapping[str, float], int]:
    """Return the PSI of each name and the number of windows behind them."""
    total = {name: np.zeros(len(each.shares), np.int64) for name, each in info.reference.items()}
    num = 0
    for box in boxes:
        facts = box.facts.get("drift")
        if not isinstance(facts, dict) or facts.get("version") != info.name:
            continue
        found = {name: _counts(facts.get("counts"), name, total[name].size) for name in total}
        counts = {name: each for name, each in found.items() if each is not None}
        if counts.keys() == total.keys() and counts:
            total = {name: total[name] + each for name, each in counts.items()}
            num += int(next(iter(counts.values())).sum())
    return {name: info.reference[name].psi(counts) for name, counts in total.items()}, num


def read_precision(info: BundleInfo, alerts: Iterable[Alert], record: Fleet) -> Reading:
    """Return the share of alerts that a failure followed, of those the record decides."""
    horizon_h = info.alerts.horizon_h
    right = wrong = 0
    for alert in alerts:
        if alert.machine not in record.machines or alert.component not in record.components:
            continue
        hour = (alert.moment - start_of(record)) / HOUR_S
        machine = record.machines.index(alert.machine)
        kind = record.components.index(alert.component)
        failed, replaced = (
            _happened(each, machine, kind, (hour, hour + horizon_h))
            for each in (record.failures, record.maintenance)
        )
        is_decided = hour >= 0 and hour + horizon_h < record.num_hours
        right += failed
        wrong += is_decided and not failed and not replaced
    num = right + wrong
    if num < LEAST_ALERTS:
        return Reading(None, f"{num} of {LEAST_ALERTS} alerts decided")
    return Reading(round(right / num, 4), f"{num} alerts decided")


def alerts_of(db: sqlite3.Connection, group: str, version: str) -> Sequence[Alert]:
    """Return the alerts that boxes of a group uploaded under a version; malformed ones are not."""
    rows = db.execute(
        "SELECT body FROM messages JOIN boxes USING (agent) WHERE kind = 'alert' AND grp = ?",
        (group,),
    ).fetchall()
    found = (_alert_of(json.loads(row["body"]), version) for row in rows)
    return [each for each in found if each is not None]


def start_of(record: Fleet) -> float:
    """Return when a record begins, seconds since 1970; its times are UTC."""
    return record.start.replace(tzinfo=UTC).timestamp()


def end_of(record: Fleet) -> float:
    """Return when a record ends, seconds since 1970."""
    return start_of(record) + record.num_hours * HOUR_S


def _read_age(info: BundleInfo, now: float) -> Reading:
    if not info.trained_until:
        return Reading(None, f"{info.name}: its bundle says nothing of its training")
    return Reading(round((now - info.trained_until) / DAY_S, 2), info.name)


def _read_samples(info: BundleInfo, record: Fleet) -> Reading:
    if not info.trained_until:
        return Reading(None, f"{info.name}: its bundle says nothing of its training")
    first = (info.trained_until - start_of(record)) / HOUR_S
    return Reading(
        float((record.failures.hour >= first).sum()), f"since the training of {info.name}"
    )


def _happened(records: Records, machine: int, kind: int, span: tuple[float, float]) -> bool:
    """Return whether something befell a component within (start, end], hours of the grid."""
    hours, kinds = records.of(machine)
    return bool(((kinds == kind) & (hours > span[0]) & (hours <= span[1])).any())


def _counts(found: object, name: str, size: int) -> NDArray[np.int64] | None:
    """Return a box's counts of a name; None if it is anything else."""
    counts = found.get(name) if isinstance(found, dict) else None
    if not isinstance(counts, list) or len(counts) != size:
        return None
    if not all(isinstance(each, int) and 0 <= each < 2**31 for each in counts):
        return None
    return np.array(counts, np.int64)


def _alert_of(body: Mapping[str, Any], version: str) -> Alert | None:
    try:
        if body["version"] != version:
            return None
        moment = datetime.fromisoformat(body["time"])
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return Alert(str(body["machine"]), str(body["component"]), moment.timestamp())
    except (KeyError, TypeError, ValueError):
        return None
