"""Features of rows from event logs: counts, times since, wear, and the service rhythm.

Errors count up to and including t; maintenance strictly before t, because it is written
down in the hour of the failure that it answers.  Vectorised numpy over a dense hour grid.

Legend: M machines, T hours, N rows, K kinds, C components.
"""

import numpy as np

from apps.maintenance.fleet import Fleet, Floats32, Ints, Records
from apps.maintenance.protocol import Rows

COUNT_HOURS = (24, 48, 168, 720)
HOURS_PER_DAY = 24.0
LONGEST_PERIOD_DAYS = 60
REGULAR_SHARE = 0.8  # of the gaps between visits that must be whole periods


class Timeline:
    """The hours of records on one axis, where each machine has a stretch of its own.

    So a search finds a machine's records, all rows at once.

    Args:
        records: Of one kind of thing, such as errors.
    """

    def __init__(self, records: Records) -> None:
        self._before = int(records.hour.min(initial=0)) - 1
        self._stretch = int(records.hour.max(initial=0)) + 2 - self._before
        self.places = self._place(records.machine, records.hour)

    def _place(self, machine: Ints, hour: Ints) -> Ints:
        since = np.clip(hour - self._before, 0, self._stretch - 1)
        place: Ints = machine * self._stretch + since
        return place

    def until(self, places: Ints, rows: Rows, hours_ago: int = 0, *, strict: bool = False) -> Ints:
        """Count those of sorted places that earlier machines have, and the row's own up to then.

        Args:
            places: Some of ``places``, in order.
            rows: Machine and hour t of each.
            hours_ago: Then is t less these.
            strict: Leave out what happened in that hour itself.
        """
        then = self._place(rows.machine, rows.hour - hours_ago)
        count: Ints = np.searchsorted(places, then, side="left" if strict else "right")
        return count

    def since_last(self, places: Ints, rows: Rows, *, strict: bool) -> Floats32:
        """Return the hours since the last of sorted places, NaN if the machine has none, [N]."""
        last = self.until(places, rows, strict=strict) - 1
        found = last >= np.searchsorted(places, rows.machine * self._stretch)
        since = np.full(rows.size, np.nan, np.float32)
        hour = places[last[found]] - rows.machine[found] * self._stretch + self._before
        since[found] = rows.hour[found] - hour
        return since


def event_counts(records: Records, rows: Rows, num_kinds: int, hours: int) -> Floats32:
    """Count the records of each kind in (t - hours, t], [N, K]."""
    line, counts = Timeline(records), np.empty((rows.size, num_kinds), np.float32)
    for kind in range(num_kinds):
        own = line.places[records.kind == kind]
        counts[:, kind] = line.until(own, rows) - line.until(own, rows, hours)
    return counts


def hours_since(records: Records, rows: Rows, num_kinds: int, *, strict: bool) -> Floats32:
    """Return the hours since the last record of each kind, NaN if there is none, [N, K].

    Args:
        records: Of one kind of thing, such as errors.
        rows: Machine and hour of each.
        num_kinds: K.
        strict: Leave out what happened in the hour t itself.
    """
    line, since = Timeline(records), np.empty((rows.size, num_kinds), np.float32)
    for kind in range(num_kinds):
        own = line.places[records.kind == kind]
        since[:, kind] = line.since_last(own, rows, strict=strict)
    return since


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
