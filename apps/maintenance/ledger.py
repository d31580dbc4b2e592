"""The downtime ledger: planned against unplanned hours under a stated cost model, replayable.

A failure without notice stops a machine until a technician and the part are there, and for the
repair.  Notice shortens that wait; notice as long as the wait makes the stop a planned one.
A false episode costs an inspection.  The same record and costs give the same figures, to the
last digit: the interval comes from machines drawn with a fixed seed.

Legend: M machines, K failures.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from apps.maintenance.fleet import Bools, Floats, Ints
from apps.maintenance.protocol import Events, Rows, episode_ids, leads

NAME = "ledger.json"
LEVEL = 0.9
DRAWS = 2000


@dataclass(frozen=True, slots=True)
class CostModel:
    """Hours of downtime; assumptions, to be replaced by a plant's own.

    Args:
        wait_hours: Until technician and part are there, if nobody was warned.
        repair_hours: Of a failed component, secondary damage included.
        planned_hours: To replace a component that still runs.
        inspection_hours: That a false episode costs.
    """

    wait_hours: float = 24.0
    repair_hours: float = 8.0
    planned_hours: float = 3.0
    inspection_hours: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 0:
                message = f"{name}: expected 0 or more hours, got {value}"
                raise ValueError(message)


@dataclass(frozen=True, slots=True)
class Conduct:
    """What alarms of one policy led to.

    Args:
        lead: Hours of notice of each failure, 0 for none [K].
        machine: Whose failure [K].
        false_episodes: Of each machine [M].
    """

    lead: Ints
    machine: Ints
    false_episodes: Ints


def conduct(
    rows: Rows, alarm: Bools, truth: Ints, events: Events, horizon: int, num_machines: int
) -> Conduct:
    """Return what alarms of a horizon led to.

    Args:
        rows: Sorted by machine and hour [N].
        alarm: Whether a row is one [N].
        truth: Labels [N].
        events: Failures that count.
        horizon: Hours.
        num_machines: M.
    """
    lead = leads(rows, alarm, events, horizon)
    episode, is_real = episode_ids(rows, alarm, truth)
    owner = np.zeros(is_real.size, np.int64)
    owner[episode] = rows.machine[alarm]
    false = np.bincount(owner[~is_real], minlength=num_machines).astype(np.int64)
    return Conduct(lead, events.machine, false)


def hours_by_machine(conduct: Conduct, costs: CostModel) -> tuple[Floats, Floats]:
    """Return planned and unplanned hours of each machine, [M] each."""
    num = conduct.false_episodes.size
    in_time = conduct.lead >= costs.wait_hours
    stopped = np.where(in_time, 0.0, costs.wait_hours - conduct.lead + costs.repair_hours)
    unplanned = np.bincount(conduct.machine, weights=stopped, minlength=num)
    replaced = np.where(in_time, costs.planned_hours, 0.0)
    planned = np.bincount(conduct.machine, weights=replaced, minlength=num)
    planned = planned + costs.inspection_hours * conduct.false_episodes
    return planned.astype(np.float64), unplanned.astype(np.float64)


def saved_share(policy: Floats, baseline: Floats) -> float:
    """Return the share of the baseline's unplanned hours that the policy spares."""
    return float(1.0 - policy.sum() / max(float(baseline.sum()), 1e-9))


def saved_interval(policy: Floats, baseline: Floats, seed: int = 0) -> tuple[float, float]:
    """Return the interval of the saved share at ``LEVEL``, whole machines drawn anew."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, policy.size, (DRAWS, policy.size))
    shares = 1.0 - policy[drawn].sum(axis=1) / np.maximum(baseline[drawn].sum(axis=1), 1e-9)
    low, high = np.quantile(shares, ((1.0 - LEVEL) / 2, (1.0 + LEVEL) / 2))
    return float(low), float(high)


def ledger(
    policy: Conduct,
    baseline: Conduct,
    costs: CostModel,
    period: tuple[datetime, datetime],
    baseline_name: str,
) -> dict[str, Any]:
    """Return the ledger as its file says it, with the digest of all it says."""
    planned, unplanned = hours_by_machine(policy, costs)
    planned_before, unplanned_before = hours_by_machine(baseline, costs)
    low, high = saved_interval(unplanned, unplanned_before)
    found = {
        "period": {"from": period[0].isoformat(), "to": period[1].isoformat()},
        "policy": _hours(planned, unplanned, policy),
        "baseline": {"name": baseline_name, **_hours(planned_before, unplanned_before, baseline)},
        "saving": {
            "share": saved_share(unplanned, unplanned_before),
            "interval": [low, high],
            "level": LEVEL,
        },
        "cost_model": asdict(costs),
        "failures": int(policy.lead.size),
    }
    return {**found, "digest": digest(found)}


def digest(found: Mapping[str, Any]) -> str:
    """Return the sha256 of a ledger's canonical text, ``digest`` itself left out."""
    said = {name: value for name, value in found.items() if name != "digest"}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _hours(planned: Floats, unplanned: Floats, conduct: Conduct) -> Mapping[str, float]:
    num = max(conduct.lead.size, 1)
    return {
        "planned_hours": float(planned.sum()),
        "unplanned_hours": float(unplanned.sum()),
        "planned_hours_per_failure": float(planned.sum()) / num,
        "unplanned_hours_per_failure": float(unplanned.sum()) / num,
        "false_episodes": int(conduct.false_episodes.sum()),
    }


def write_ledger(found: Mapping[str, Any], folder: Path) -> Path:
    """Write a ledger where the dashboard looks for it; it appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    partial = path.with_name(f"partial-{NAME}")
    partial.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    partial.rename(path)
    return path
