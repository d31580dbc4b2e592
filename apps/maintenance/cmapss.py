"""Run-to-failure tables in the C-MAPSS layout: loading and metrics.

Any table with unit_id, cycle, op_setting_*, sensor_* (training also rul) will do.

Legend: N rows (one unit at one cycle), S sensors, U units.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from apps.maintenance.fleet import Floats, Ints

CAP_CYCLES = 125  # labels above say only "early"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of units, sorted by unit and cycle.

    Args:
        unit: [N]; cycle: [N].
        settings: Operating settings [N, 3].
        sensors: [N, S].
        sensor_names: [S].
        rul: Remaining cycles [N], NaN where not known.
    """

    unit: Ints
    cycle: Ints
    settings: Floats
    sensors: Floats
    sensor_names: tuple[str, ...]
    rul: Floats

    @property
    def last_rows(self) -> Ints:
        """Return the row of each unit's last cycle [U]."""
        return np.flatnonzero(np.append(np.diff(self.unit) != 0, True))

    def take(self, kept: NDArray[np.bool_]) -> "Table":
        """Return the rows of a mask."""
        return Table(
            self.unit[kept],
            self.cycle[kept],
            self.settings[kept],
            self.sensors[kept],
            self.sensor_names,
            self.rul[kept],
        )


def load_table(path: Path) -> Table:
    """Read a table.

    Raises:
        FileNotFoundError: There is none.
        ValueError: A column is missing or a value is not a number.
    """
    if not path.is_file():
        message = f"{path}: expected a parquet file in the C-MAPSS layout, found none"
        raise FileNotFoundError(message)
    frame = pd.read_parquet(path).sort_values(["unit_id", "cycle"])
    names = list(map(str, frame.columns))
    sensors = sorted((n for n in names if re.fullmatch(r"sensor_\d+", n)), key=_number)
    settings = sorted((n for n in names if re.fullmatch(r"op_setting_\d+", n)), key=_number)
    if not sensors or not settings:
        message = f"{path}: expected columns sensor_1.. and op_setting_1.., got {names}"
        raise ValueError(message)
    rul = frame["rul"] if "rul" in names else pd.Series(np.nan, index=frame.index)
    return Table(
        frame["unit_id"].to_numpy(np.int64),
        frame["cycle"].to_numpy(np.int64),
        frame[settings].to_numpy(np.float64),
        frame[sensors].to_numpy(np.float64),
        tuple(sensors),
        np.asarray(rul, dtype=np.float64),
    )


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])


def load_subset(folder: Path, subset: str) -> tuple[Table, Table, Floats]:
    """Return training rows, test rows and the true RUL at each test unit's last cycle."""
    truth = folder / f"RUL_{subset}.txt"
    if not truth.is_file():
        message = f"{truth}: expected the true RUL of the test units, found no such file"
        raise FileNotFoundError(message)
    tables = [load_table(folder / f"{part}_{subset}.parquet") for part in ("train", "test")]
    return tables[0], tables[1], np.loadtxt(truth, dtype=np.float64, ndmin=1)


def rmse(predicted: Floats, truth: Floats) -> float:
    """Return the root mean square error in cycles."""
    return float(np.sqrt(np.mean((predicted - truth) ** 2)))


def nasa_score(predicted: Floats, truth: Floats) -> float:
    """Return the PHM08 score: the sum of exp(-e / 13) - 1 if early, exp(e / 10) - 1 if late.

    Source:
        Saxena et al. 2008, eq. 11, PHM08.
    """
    error = predicted - truth
    return float(np.expm1(np.where(error < 0, -error / 13.0, error / 10.0)).sum())


def figures(life: Floats, early_life: Floats, truth: Floats) -> dict[str, float]:
    """Return RMSE and score against the truth as it is and capped at 125 cycles.

    Args:
        life: Forecast of the remaining cycles [U].
        early_life: Forecast of the remaining cycles up to 125 [U].
        truth: Remaining cycles [U].
    """
    capped = np.minimum(truth, CAP_CYCLES)
    return {
        "rmse": rmse(life, truth),
        "score": nasa_score(life, truth),
        "rmse_capped": rmse(early_life, capped),
        "score_capped": nasa_score(early_life, capped),
    }
