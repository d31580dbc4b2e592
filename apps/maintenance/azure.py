"""Loader of the Azure predictive-maintenance sample (simulated, 100 machines, 2015).

Telemetry comes from two files: one quarter of 20 machines without a gap, and windows of
all machines; what neither holds stays missing.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from apps.maintenance.fleet import Fleet, Floats32, Ints, Records

START = pd.Timestamp("2015-01-01 06:00")
NUM_HOURS = 8761  # one year, last hour 2016-01-01 06:00
ERRORS = ("error1", "error2", "error3", "error4", "error5")
COMPONENTS = ("comp1", "comp2", "comp3", "comp4")
SENSORS = ("volt", "rotate", "pressure", "vibration")
CONTIGUOUS = "PdM_telemetry_m1-20_2015Q1.parquet"
WINDOWS = "PdM_telemetry_real_rows_all.parquet"
FILES = ("PdM_errors.csv", "PdM_failures.csv", "PdM_maint.csv", "PdM_machines.csv", WINDOWS)


def load_fleet(folder: Path) -> Fleet:
    """Read the sample.

    Raises:
        FileNotFoundError: A file is missing.
    """
    for name in FILES:
        if not (folder / name).is_file():
            message = f"{folder}: expected {name} of the Azure sample, found no such file"
            raise FileNotFoundError(message)
    machines = pd.read_csv(folder / "PdM_machines.csv").sort_values("machineID")
    names = machines["machineID"].to_numpy()

    def records(file: str, column: str, kinds: tuple[str, ...]) -> Records:
        table = pd.read_csv(folder / file, parse_dates=["datetime"])
        return Records.sorted(
            np.searchsorted(names, table["machineID"]).astype(np.int64),
            _hours(table["datetime"]),
            np.asarray(table[column].map({kind: i for i, kind in enumerate(kinds)}), np.int64),
        )

    return Fleet(
        start=START.to_pydatetime(),
        num_hours=NUM_HOURS,
        machines=[str(name) for name in names],
        models=machines["model"].str.removeprefix("model").to_numpy(np.int64) - 1,
        age_years=machines["age"].to_numpy(np.float64),
        error_names=ERRORS,
        components=COMPONENTS,
        sensors=SENSORS,
        errors=records("PdM_errors.csv", "errorID", ERRORS),
        failures=records("PdM_failures.csv", "failure", COMPONENTS),
        maintenance=records("PdM_maint.csv", "comp", COMPONENTS),
        telemetry=_telemetry(folder / WINDOWS, names),
    )


def _hours(moments: pd.Series) -> Ints:
    return np.asarray((moments - START) // pd.Timedelta(hours=1), np.int64)


def _telemetry(path: Path, names: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Floats32:
    """Return [M, T, S]; the file of windows holds the contiguous rows too."""
    table = pd.read_parquet(path)
    grid = np.full((names.size, NUM_HOURS, len(SENSORS)), np.nan, np.float32)
    machine = np.searchsorted(names, table["machineID"])
    grid[machine, _hours(table["datetime"])] = table[list(SENSORS)].to_numpy(np.float32)
    return grid
