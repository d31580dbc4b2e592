"""A fleet's records on an hour grid: errors, failures, maintenance, machines, telemetry.

Hours count from the first hour of the grid and may be negative for records from before it.
Missing telemetry is a mask, never a zero.  Knows no file format and no model.

Legend: M machines, T hours of the grid, S sensors, K records.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Records:
    """Events of one sort, sorted by machine and hour.

    Args:
        machine: Index of the machine [K].
        hour: Hour on the grid [K].
        kind: Index of the error or component [K].
    """

    machine: Ints
    hour: Ints
    kind: Ints

    @classmethod
    def sorted(cls, machine: Ints, hour: Ints, kind: Ints) -> "Records":
        """Return the records in order."""
        order = np.lexsort((kind, hour, machine))
        return cls(machine[order], hour[order], kind[order])

    def of(self, machine: int) -> tuple[Ints, Ints]:
        """Return hours and kinds of one machine, in order of time."""
        first, last = np.searchsorted(self.machine, (machine, machine + 1))
        return self.hour[first:last], self.kind[first:last]

    def before(self, hour: int) -> "Records":
        """Return the records strictly before an hour."""
        kept = self.hour < hour
        return Records(self.machine[kept], self.hour[kept], self.kind[kept])


@dataclass(frozen=True, slots=True)
class Fleet:
    """Everything that is known of a fleet.

    Args:
        start: Moment of hour 0.
        num_hours: T; the grid is 0 .. T-1.
        machines: Their names [M].
        models: Index of each machine's model [M].
        age_years: Age of each machine [M].
        error_names: By the kind of an error.
        components: By the kind of a failure or maintenance.
        sensors: By the last axis of ``telemetry``.
        errors: Error codes.
        failures: Failures.
        maintenance: Replacements of components, planned and after a failure.
        telemetry: float32 [M, T, S], NaN where nothing was measured.
    """

    start: datetime
    num_hours: int
    machines: Sequence[str]
    models: Ints
    age_years: Floats
    error_names: Sequence[str]
    components: Sequence[str]
    sensors: Sequence[str]
    errors: Records
    failures: Records
    maintenance: Records
    telemetry: Floats32

    @property
    def num_machines(self) -> int:
        """M."""
        return len(self.machines)

    def hour_of(self, moment: datetime) -> int:
        """Return the hour on the grid of a moment."""
        return round((moment - self.start).total_seconds() / 3600)
