"""A fleet as a folder of tables, parquet or CSV, and back.

    machines     machine, model, age_years
    errors       time, machine, error
    failures     time, machine, component
    maintenance  time, machine, component
    telemetry    time, machine, one column per sensor; hours without a row are missing

Times are UTC on whole hours; a sensor that was silent in an hour is NaN, never zero.  With a
``plant.json`` beside the tables (``telemetry.plant``) telemetry has its sampling period, and hour t
becomes what a history makes of it: the mean of the samples in (t - 1 h, t], missing with fewer
than half of them; an event in that span is one of hour t.
"""

from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd

from apps.maintenance.fleet import Fleet, Floats32, Ints, Records
from apps.maintenance.telemetry.plant import FILE, Plant

EVENTS = {"errors": "error", "failures": "component", "maintenance": "component"}
HOUR = pd.Timedelta(hours=1)
SECONDS = 3600  # of an hour
KEYS = ["machine", "time"]


def write_fleet(fleet: Fleet, folder: Path) -> None:
    """Write the tables; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    machines = pd.DataFrame(
        {
            "machine": list(fleet.machines),
            "model": fleet.models,
            "age_years": fleet.age_years,
        }
    )
    _write(machines, folder / "machines.parquet")
    for name, column in EVENTS.items():
        records: Records = getattr(fleet, name)
        kinds = fleet.error_names if column == "error" else fleet.components
        table = pd.DataFrame(
            {
                "time": _times(fleet.start, records.hour),
                "machine": np.array(fleet.machines)[records.machine],
                column: np.array(kinds)[records.kind],
            }
        )
        _write(table, folder / f"{name}.parquet")
    machine, hour = np.nonzero(~np.isnan(fleet.telemetry).all(axis=2))
    telemetry = pd.DataFrame(fleet.telemetry[machine, hour], columns=list(fleet.sensors))
    telemetry.insert(0, "time", _times(fleet.start, hour))
    telemetry.insert(1, "machine", np.array(fleet.machines)[machine])
    _write(telemetry, folder / "telemetry.parquet")


def _times(start: datetime, hours: Ints) -> pd.DatetimeIndex:
    return pd.DatetimeIndex(pd.Timestamp(start) + hours * HOUR)


def _write(table: pd.DataFrame, path: Path) -> None:
    partial = path.with_name(f"partial-{path.name}")
    table.to_parquet(partial, index=False)
    partial.rename(path)


def read_fleet(folder: Path) -> Fleet:
    """Read the tables.

    Raises:
        FileNotFoundError: A table is missing.
        ValueError: A machine is not in the list of machines, a time is off the hour, or an hour
            of a machine has two rows of telemetry.
        ConfigurationError: ``plant.json`` is not a plant's.
    """
    names = ("machines", *EVENTS, "telemetry")
    tables = {name: _read(folder, name) for name in names}
    if (folder / FILE).is_file():
        tables = _by_hour(tables, Plant.read(folder / FILE))
    if bool(tables["telemetry"].duplicated(KEYS).any()):
        message = "telemetry: expected one row per machine and hour, got two of some"
        raise ValueError(message)
    machines = tables["machines"].sort_values("machine")
    listed = machines["machine"].astype(str).to_numpy()
    times = [tables[name]["time"] for name in (*EVENTS, "telemetry") if len(tables[name])]
    start = tables["telemetry"]["time"].min().to_pydatetime()
    end = max(time.max() for time in times)
    num_hours = int((end - pd.Timestamp(start)) // HOUR) + 1
    errors = sorted(map(str, tables["errors"]["error"].unique()))
    failing = pd.concat([tables[name]["component"] for name in ("failures", "maintenance")])
    components = sorted(map(str, failing.unique()))
    sensors = [str(c) for c in tables["telemetry"].columns if c not in {"time", "machine"}]

    def place(name: str) -> tuple[Ints, Ints]:
        table = tables[name]
        owner = table["machine"].astype(str).to_numpy()
        found = np.searchsorted(listed, owner).clip(0, listed.size - 1)
        unknown = owner[listed[found] != owner]
        since = (table["time"] - pd.Timestamp(start)).to_numpy("timedelta64[s]").astype(np.int64)
        if unknown.size or bool((since % SECONDS != 0).any()):
            message = (
                f"{name}: expected machines of the list and times on whole hours, "
                f"got machines {sorted(set(unknown))[:5]} or times between the hours"
            )
            raise ValueError(message)
        return found.astype(np.int64), since // SECONDS

    def records(name: str, kinds: list[str]) -> Records:
        machine, hour = place(name)
        kind = np.searchsorted(kinds, tables[name][EVENTS[name]].astype(str)).astype(np.int64)
        return Records.sorted(machine, hour, kind)

    telemetry: Floats32 = np.full((listed.size, num_hours, len(sensors)), np.nan, np.float32)
    telemetry[place("telemetry")] = tables["telemetry"][sensors].to_numpy(np.float32)
    return Fleet(
        start=start,
        num_hours=num_hours,
        machines=listed.tolist(),
        models=machines["model"].to_numpy(np.int64),
        age_years=machines["age_years"].to_numpy(np.float64),
        error_names=errors,
        components=components,
        sensors=sensors,
        errors=records("errors", errors),
        failures=records("failures", components),
        maintenance=records("maintenance", components),
        telemetry=telemetry,
    )


def _by_hour(tables: dict[str, pd.DataFrame], plant: Plant) -> dict[str, pd.DataFrame]:
    """Return the tables on whole hours; a time is part of the hour that ends with or after it."""
    found = {
        name: table.assign(time=table["time"].dt.ceil("h")) if name in EVENTS else table
        for name, table in tables.items()
    }
    telemetry = tables["telemetry"].drop_duplicates(KEYS)
    hours = telemetry.assign(time=telemetry["time"].dt.ceil("h")).groupby(KEYS)
    means = hours.mean().where(hours.count() >= plant.least_samples)
    return found | {"telemetry": means.dropna(how="all").reset_index()}


def _read(folder: Path, name: str) -> pd.DataFrame:
    path = folder / f"{name}.parquet"
    if path.is_file():
        return pd.read_parquet(path)
    path = path.with_suffix(".csv")
    if not path.is_file():
        message = f"{folder}: expected {name}.parquet or {name}.csv of a fleet, found neither"
        raise FileNotFoundError(message)
    table = pd.read_csv(path, dtype=dict.fromkeys(("machine", "error", "component"), str))
    if name != "machines":
        table["time"] = pd.to_datetime(table["time"], utc=True).dt.tz_localize(None)
    return table
