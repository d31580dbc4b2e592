"""A fleet out of a history: hours from samples, read with DuckDB.

Hour t of the grid holds the mean of the samples in (t - 1 h, t]; an event in that span is one of
hour t.  So nothing that is known at t has happened later.  An hour with fewer than half of its
samples is missing.  A message that came twice counts once, as it came first.

Legend: M machines, T hours, S sensors.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from apps.maintenance.fleet import Fleet, Floats, Floats32, Ints, Records
from apps.maintenance.telemetry.history import (
    EVENTS_TABLE,
    MACHINES_TABLE,
    TELEMETRY_TABLE,
    parts,
)
from apps.maintenance.telemetry.messages import ERROR, FAILURE, MAINTENANCE
from apps.maintenance.telemetry.plant import FILE, HOUR_S, Plant
from cluster.errors import ConfigurationError

UNKNOWN_MODEL = -1
_HOURS = """
SELECT machine, sensor, ceil(epoch(time) / 3600)::BIGINT AS hour, avg(value) AS value
FROM (
    SELECT machine, sensor, time, arg_min_null(value, (segment, position)) AS value
    FROM read_parquet($files) WHERE time > $since AND time <= $until GROUP BY ALL
) GROUP BY ALL HAVING count(value) >= $least
"""
_EVENTS = """
SELECT DISTINCT machine, ceil(epoch(time) / 3600)::BIGINT AS hour, what, name
FROM read_parquet($files) WHERE time <= $until ORDER BY ALL
"""
_MACHINES = """
SELECT machine, arg_max(model, (time, segment, position)),
       arg_max(age_years, (time, segment, position))
FROM read_parquet($files) WHERE time <= $until GROUP BY machine ORDER BY machine
"""
Rows = list[tuple[Any, ...]]


def read_history(folder: Path, until: datetime | None = None, hours: int | None = None) -> Fleet:
    """Return what a history knew at a moment.

    Args:
        folder: Of the history; what still lies in its journal is not seen.
        until: Last moment, on a whole hour; None takes the last whole hour on record.
        hours: Of telemetry to go back; None takes all.  Events are of all time.

    Raises:
        FileNotFoundError: It is no history.
        ConfigurationError: Nothing was measured.
    """
    plant = Plant.read(folder / FILE)
    with duckdb.connect() as db:
        db.execute("SET TimeZone = 'UTC'")
        first, last = _extreme(db, folder)
        if until is not None:
            last = int(until.replace(tzinfo=UTC).timestamp()) // HOUR_S
        if hours is not None:
            first = last - hours + 1
        span = {"since": _moment(first - 1), "until": _moment(last)}
        day = _moment(first - 1).date().isoformat()
        measured = _ask(
            db, _HOURS, parts(folder, TELEMETRY_TABLE, day), {**span, "least": plant.least_samples}
        )
        ends = {"until": span["until"]}
        events = _ask(db, _EVENTS, parts(folder, EVENTS_TABLE), ends)
        facts = _ask(db, _MACHINES, parts(folder, MACHINES_TABLE), ends)
    return _fleet(plant, (first, last), measured, events, facts)


def _ask(
    db: duckdb.DuckDBPyConnection, query: str, files: Sequence[Path], values: Mapping[str, object]
) -> Rows:
    if not files:
        return []
    return db.execute(query, {"files": [str(path) for path in files], **values}).fetchall()


def _moment(hour: int) -> datetime:
    return datetime(1970, 1, 1) + timedelta(hours=hour)


def _extreme(db: duckdb.DuckDBPyConnection, folder: Path) -> tuple[int, int]:
    """Return the first and the last whole hour on record."""
    query = (
        "SELECT ceil(min(epoch(time)) / 3600)::BIGINT, floor(max(epoch(time)) / 3600)::BIGINT "
        "FROM read_parquet($files)"
    )
    found = _ask(db, query, parts(folder, TELEMETRY_TABLE), {})
    if not found:
        message = "history: expected telemetry, found none yet"
        raise ConfigurationError(message)
    return found[0][0], found[0][1]


def _fleet(plant: Plant, span: tuple[int, int], measured: Rows, events: Rows, facts: Rows) -> Fleet:
    first, last = span
    names = sorted({str(row[0]) for rows in (measured, events, facts) for row in rows})
    index = {name: i for i, name in enumerate(names)}
    sensors = list(plant.sensors)
    telemetry: Floats32 = np.full((len(names), last - first + 1, len(sensors)), np.nan, np.float32)
    for machine, sensor, hour, value in measured:
        telemetry[index[machine], hour - first, sensors.index(sensor)] = value
    models: Ints = np.full(len(names), UNKNOWN_MODEL)
    ages: Floats = np.full(len(names), np.nan)
    for machine, model, age in facts:
        models[index[machine]], ages[index[machine]] = model, age

    def records(what: str, kinds: Sequence[str]) -> Records:
        rows = [
            (index[machine], hour - first, kinds.index(name))
            for machine, hour, sort, name in events
            if sort == what
        ]
        columns: Ints = np.array(rows, np.int64).reshape(-1, 3)
        return Records.sorted(columns[:, 0], columns[:, 1], columns[:, 2])

    return Fleet(
        start=_moment(first),
        num_hours=last - first + 1,
        machines=names,
        models=models,
        age_years=ages,
        error_names=list(plant.errors),
        components=list(plant.components),
        sensors=sensors,
        errors=records(ERROR, plant.errors),
        failures=records(FAILURE, plant.components),
        maintenance=records(MAINTENANCE, plant.components),
        telemetry=telemetry,
    )
