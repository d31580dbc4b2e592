"""Features of rows from event logs: counts, times since, wear, and the service rhythm.

Errors count up to and including t; maintenance strictly before t, because it is written
down in the hour of the failure that it answers.  Vectorised numpy over a dense hour grid.

Legend: M machines, T hours, N rows, K kinds, C components.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from apps.maintenance.fleet import Fleet, Floats32, Ints, Records
from apps.maintenance.protocol import Rows

COUNT_HOURS = (24, 48, 168, 720)
HOURS_PER_DAY = 24.0
LONGEST_PERIOD_DAYS = 60
REGULAR_SHARE = 0.8  # of the gaps between visits that must be whole periods


def event_counts(records: Records, rows: Rows, num_kinds: int, hours: int) -> Floats32:
    """Count the records of each kind in (t - hours, t], [N, K]."""
    counts = np.zeros((rows.size, num_kinds), np.float32)
    for part, kind, own in _per_machine(records, rows, num_kinds):
        t = rows.hour[part]
        late = np.searchsorted(own, t, side="right")
        counts[part, kind] = late - np.searchsorted(own, t - hours, side="right")
    return counts


def hours_since(records: Records, rows: Rows, num_kinds: int, *, strict: bool) -> Floats32:
    """Return the hours since the last record of each kind, NaN if there is none, [N, K].

    Args:
        records: Of one kind of thing, such as errors.
        rows: Machine and hour of each.
        num_kinds: K.
        strict: Leave out what happened in the hour t itself.
    """
    since = np.full((rows.size, num_kinds), np.nan, np.float32)
    side: Literal["left", "right"] = "left" if strict else "right"
    for part, kind, own in _per_machine(records, rows, num_kinds):
        t = rows.hour[part]
        position = np.searchsorted(own, t, side=side) - 1
        found = position >= 0
        since[np.arange(part.start, part.stop)[found], kind] = t[found] - own[position[found]]
    return since


def _per_machine(records: Records, rows: Rows, num_kinds: int) -> Iterator[tuple[slice, int, Ints]]:
    """Yield a machine's rows, a kind, and the hours of the machine's records of that kind."""
    for machine in np.unique(rows.machine):
        first, last = np.searchsorted(rows.machine, (machine, machine + 1))
        hours, kinds = records.of(machine)
        for kind in range(num_kinds):
            yield slice(int(first), int(last)), kind, hours[kinds == kind]


def log_features(fleet: Fleet, rows: Rows) -> Floats32:
    """Return the 32 columns of the baseline."""
    num_errors, num_components = len(fleet.error_names), len(fleet.components)
    counts = [event_counts(fleet.errors, rows, num_errors, hours) for hours in COUNT_HOURS]
    since = hours_since(fleet.errors, rows, num_errors, strict=False)
    wear = hours_since(fleet.maintenance, rows, num_components, strict=True) / HOURS_PER_DAY
    machine = np.stack(
        [
            fleet.age_years[rows.machine],
            fleet.models[rows.machine],
            (rows.hour + fleet.start.hour) % 24,
        ],
        axis=1,
    )
    return np.concatenate([*counts, since, wear, machine], axis=1).astype(np.float32)


def service_period(maintenance: Records) -> int:
    """Return the longest period in hours of which the gaps between visits are multiples.

    Args:
        maintenance: Of the training time only.

    Returns:
        Whole days in hours; 0 if the visits follow no rhythm.
    """
    machine, hour = np.unique(np.stack([maintenance.machine, maintenance.hour]), axis=1)
    gaps = np.diff(hour)[np.diff(machine) == 0]
    for days in range(LONGEST_PERIOD_DAYS, 1, -1):
        period = days * 24
        if gaps.size and np.mean(gaps % period == 0) >= REGULAR_SHARE:
            return period
    return 0


def hours_to_service(maintenance: Records, rows: Rows, period: int) -> Floats32:
    """Return the hours to the next visit if the rhythm of the last one before t goes on, [N].

    NaN where there is no rhythm or no visit yet; above 0, at most ``period``.
    """
    if period == 0:
        return np.full(rows.size, np.nan, np.float32)
    visits = Records(maintenance.machine, maintenance.hour, np.zeros_like(maintenance.kind))
    since = hours_since(visits, rows, 1, strict=True)[:, 0]
    return (period - since % period).astype(np.float32)
