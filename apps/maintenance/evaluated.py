"""The decisions of a finished Azure evaluation, as the table of forecasts that a ledger replays.

Reads what ``trimoe maintenance evaluate --dataset azure --work DIR`` keeps there: answers of seed 0
on the test rows, and gate and cautions chosen on held-out machines.
"""

from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd

from apps.maintenance.chances import first_failure, hazard_probs
from apps.maintenance.fleet import Fleet
from apps.maintenance.protocol import HORIZONS, decide
from apps.maintenance.splits import parts
from cluster.errors import ConfigurationError

PARTS = ("logs", "contiguous")  # the windows are a case-control sample: no hours to add up
EXPERTS = ("tree", "sequence")  # mixed under the gate


def evaluated_table(folder: Path, fleet: Fleet) -> pd.DataFrame:
    """Return time, machine and decisions of the test rows of the first part that is finished.

    Raises:
        ConfigurationError: None is finished, or it was of another record.
    """
    name = next((each for each in PARTS if (folder / f"{each}-ours-0.npz").is_file()), "")
    if not name:
        message = f"{folder}: expected forecasts.parquet or a finished evaluation, found neither"
        raise ConfigurationError(message)
    part = next(each for each in parts(fleet) if each.name == name)
    hour = part.rows.hour
    rows = part.rows.take((hour > part.test_start) & (hour < part.test_end))
    with np.load(folder / f"{name}-ours-0.npz", allow_pickle=False) as file:
        tree, sequence = (file[f"{each}_both"].astype(np.float64) for each in EXPERTS)
    with np.load(folder / f"{name}-calibration.npz", allow_pickle=False) as file:
        cautions = file["caution"].astype(float).tolist()
        share = 1.0 / (1.0 + np.exp(-file["gate"].astype(np.float64))).reshape(1, -1)
    if tree.shape[0] != rows.size:
        message = f"{folder}: expected answers on {rows.size} rows of {name}, got {tree.shape[0]}"
        raise ConfigurationError(message)
    shape = (rows.size, len(HORIZONS), len(fleet.components))
    hazard = tree + share * (sequence - tree)
    classes = first_failure(hazard_probs(hazard.reshape(shape)))
    names = np.array([None, *fleet.components], object)
    decisions = {
        f"decision_{horizon}h": names[decide(classes[:, i], cautions[i])]
        for i, horizon in enumerate(HORIZONS)
    }
    moments = [fleet.start + timedelta(hours=int(h)) for h in rows.hour]
    machines = [fleet.machines[m] for m in rows.machine]
    return pd.DataFrame({"time": moments, "machine": machines, **decisions})
