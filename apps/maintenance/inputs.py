"""What a forecast request carries: context columns, and rows of telemetry and events.

The order of columns is that of ``core_model.series_tasks``, and a test holds them together.
Errors and telemetry count up to and including t, maintenance strictly before t.  What was
not measured is NaN.

Legend: N rows of the protocol, C context columns, R request rows, S sensors, T hours.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apps.maintenance.features import (
    HOURS_PER_DAY,
    Timeline,
    event_counts,
    hours_since,
    hours_to_service,
)
from apps.maintenance.fleet import Bools, Fleet, Floats32, Ints, Records
from apps.maintenance.protocol import Rows

SUMMARY_HOURS = (3, 6, 12, 24, 48)
ERROR_HOURS = (12, 24, 48)
AHEAD_HOURS = 48  # telemetry this near to the coming visit is summed up by itself
PATCH_HOURS = 6
NUM_PATCHES = 8  # back to 48 hours
EVENT_HOURS = 168  # errors back to a week
MAX_ERRORS = 32
NUM_MODELS = 4
PATCH, EVENT = 0.0, 1.0
LIFE_CAP_HOURS = 360  # hours left are forecast up to 15 days; beyond is "more than"
COLUMNS = (
    "to_visit_h",
    *(f"wear_{i}" for i in range(4)),
    "age_years",
    *(f"model_{i}" for i in range(NUM_MODELS)),
    *(f"errors_{h}h_{i}" for h in ERROR_HOURS for i in range(5)),
    *(f"error_ahead_{i}" for i in range(5)),
    *(f"error_age_{i}" for i in range(5)),
    *(f"mean_{h}h_{i}" for h in SUMMARY_HOURS for i in range(4)),
    *(f"mean_ahead_{i}" for i in range(4)),
    "moments_ahead",
)
TELEMETRY_COLUMNS = [i for i, name in enumerate(COLUMNS) if name.startswith(("mean_", "moments_"))]
LOG_COLUMNS = [i for i, name in enumerate(COLUMNS) if name.startswith(("to_", "wear_", "error"))]


@dataclass(frozen=True, slots=True)
class Series:
    """Request rows and context of many sequences.

    Args:
        rows: float32 [R, 4 + PATCH_HOURS * S], NaN where unknown.
        offsets: int32 [N + 1].
        context: float32 [N, C], NaN where unknown.
    """

    rows: Floats32
    offsets: NDArray[np.int32]
    context: Floats32

    def take(self, sequences: Ints) -> "Series":
        """Return the named sequences, in that order."""
        lengths = np.diff(self.offsets)[sequences]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        shift = np.repeat(self.offsets[:-1][sequences] - offsets[:-1], lengths)
        rows = self.rows[np.arange(offsets[-1]) + shift]
        return Series(rows, offsets.astype(np.int32), self.context[sequences])


def forecast_inputs(fleet: Fleet, rows: Rows, period: int) -> Series:
    """Return the inputs of rows; ``period`` is that of the visits in hours, 0 for none."""
    to_visit = hours_to_service(fleet.maintenance, rows, period)
    built, offsets = request_rows(fleet, rows, to_visit)
    return Series(built, offsets, context_columns(fleet, rows, to_visit, period))


def context_columns(fleet: Fleet, rows: Rows, to_visit: Floats32, period: int) -> Floats32:
    """Return [N, C]; wear counts whole periods at the coming visit, or days without a rhythm."""
    num_errors, num_components = len(fleet.error_names), len(fleet.components)
    since = hours_since(fleet.maintenance, rows, num_components, strict=True)
    wear = since / HOURS_PER_DAY
    if period:
        wear = (since + to_visit[:, None]) / period
    error_age = hours_since(fleet.errors, rows, num_errors, strict=False)
    columns = [
        to_visit[:, None],
        wear,
        fleet.age_years[rows.machine, None],
        fleet.models[rows.machine, None] == np.arange(NUM_MODELS),
        *(event_counts(fleet.errors, rows, num_errors, hours) for hours in ERROR_HOURS),
        error_age + to_visit[:, None],
        error_age,
        *telemetry_summaries(fleet.telemetry, rows, to_visit),
    ]
    return np.concatenate(columns, axis=1).astype(np.float32)


def telemetry_summaries(telemetry: Floats32, rows: Rows, to_visit: Floats32) -> list[Floats32]:
    """Return means over the last hours, those near the coming visit, and how many these are."""
    known = ~np.isnan(telemetry)
    sums = _from_start(np.nan_to_num(telemetry))
    counts = _from_start(known.astype(np.float32))
    since_ahead = np.nan_to_num(AHEAD_HOURS - to_visit + 1, nan=0.0).clip(0, AHEAD_HOURS)
    spans = [np.full(rows.size, hours) for hours in SUMMARY_HOURS] + [since_ahead.astype(int)]
    summaries: list[Floats32] = []
    count = np.zeros((rows.size, telemetry.shape[2]), np.float32)
    for hours in spans:
        first = np.maximum(rows.hour + 1 - hours, 0)
        count = counts[rows.machine, rows.hour + 1] - counts[rows.machine, first]
        total = sums[rows.machine, rows.hour + 1] - sums[rows.machine, first]
        with np.errstate(invalid="ignore", divide="ignore"):
            summaries.append(np.where(count > 0, total / count, np.nan).astype(np.float32))
    ahead = count.max(axis=1, keepdims=True).astype(np.float32)
    return [*summaries, ahead]


def _from_start(values: Floats32) -> NDArray[np.float64]:
    """Return running sums along the hours, from 0, [M, T + 1, S]."""
    zero = np.zeros((values.shape[0], 1, values.shape[2]))
    return np.concatenate([zero, np.cumsum(values, axis=1, dtype=np.float64)], axis=1)


def request_rows(
    fleet: Fleet, rows: Rows, to_visit: Floats32
) -> tuple[Floats32, NDArray[np.int32]]:
    """Return patches with anything measured, errors of a week and the last replacements."""
    num_errors = len(fleet.error_names)
    parts = [
        _patches(fleet.telemetry, rows),
        _errors(fleet.errors, rows, to_visit, fleet.telemetry.shape[2]),
        _replacements(fleet, rows, to_visit, num_errors),
    ]
    owner = np.concatenate([part[0] for part in parts])
    built = np.concatenate([part[1] for part in parts])
    order = np.argsort(owner, kind="stable")
    offsets = np.searchsorted(owner[order], np.arange(rows.size + 1)).astype(np.int32)
    return built[order], offsets


def _patches(telemetry: Floats32, rows: Rows) -> tuple[Ints, Floats32]:
    owners, built = [], []
    for patch in reversed(range(NUM_PATCHES)):
        hours = rows.hour[:, None] - patch * PATCH_HOURS - np.arange(PATCH_HOURS)[::-1]
        inside: Bools = hours >= 0
        values = telemetry[rows.machine[:, None], np.maximum(hours, 0)]
        values = np.where(inside[:, :, None], values, np.nan).reshape(rows.size, -1)
        kept = np.flatnonzero(~np.isnan(values).all(axis=1))
        head = np.tile(np.array([PATCH, patch * PATCH_HOURS, 0, np.nan]), (kept.size, 1))
        owners.append(kept)
        built.append(np.concatenate([head, values[kept]], axis=1))
    return np.concatenate(owners), np.concatenate(built).astype(np.float32)


def _errors(
    errors: Records, rows: Rows, to_visit: Floats32, num_sensors: int
) -> tuple[Ints, Floats32]:
    line = Timeline(errors)
    late = line.until(line.places, rows)
    early = line.until(line.places, rows, EVENT_HOURS)
    lengths = late - np.maximum(early, late - MAX_ERRORS)
    owner = np.repeat(np.arange(rows.size), lengths)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    index = np.repeat(late - lengths, lengths) + within
    return owner, _events(
        rows, to_visit, owner, errors.hour[index], errors.kind[index], num_sensors
    )


def _replacements(
    fleet: Fleet, rows: Rows, to_visit: Floats32, first_code: int
) -> tuple[Ints, Floats32]:
    since = hours_since(fleet.maintenance, rows, len(fleet.components), strict=True)
    owner, component = np.nonzero(~np.isnan(since))
    hour = rows.hour[owner] - since[owner, component].astype(np.int64)
    num_sensors = fleet.telemetry.shape[2]
    return owner, _events(rows, to_visit, owner, hour, first_code + component, num_sensors)


def _events(
    rows: Rows, to_visit: Floats32, owner: Ints, hour: Ints, code: Ints, num_sensors: int
) -> Floats32:
    age = rows.hour[owner] - hour
    head = np.stack([np.full(age.size, EVENT), age, code, age + to_visit[owner]], axis=1)
    values = np.full((age.size, PATCH_HOURS * num_sensors), np.nan)
    return np.concatenate([head, values], axis=1).astype(np.float32)
