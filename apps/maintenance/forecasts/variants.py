"""Which inputs a machine has at a moment, and so which variant of the model answers.

    telemetry   something was measured within the last ``FRESH_HOURS``
    logs        an error or a replacement was ever written down

What is stale is hidden, so that the accuracy known of the variant holds.  Without either there is
no forecast.

Legend: N rows.
"""

from collections.abc import Sequence

import numpy as np

from apps.maintenance.degrade import VARIANTS, degraded, joined
from apps.maintenance.fleet import Bools, Fleet
from apps.maintenance.inputs import Series
from apps.maintenance.protocol import Rows

FRESH_HOURS = 24  # gaps up to a day are part of training with both inputs
NONE = ""


def choose_variants(fleet: Fleet, rows: Rows) -> Sequence[str]:
    """Return the variant of each row, ``NONE`` where nothing is known [N]."""
    hours = rows.hour[:, None] - np.arange(FRESH_HOURS)
    values = fleet.telemetry[rows.machine[:, None], np.maximum(hours, 0)]
    measured: Bools = (~np.isnan(values).all(axis=2) & (hours >= 0)).any(axis=1)
    first = np.full(fleet.num_machines, np.iinfo(np.int64).max)
    for records, late in ((fleet.errors, 0), (fleet.maintenance, 1)):
        np.minimum.at(first, records.machine, records.hour + late)
    logged: Bools = first[rows.machine] <= rows.hour
    name = {(True, True): "both", (False, True): "logs", (True, False): "telemetry"}
    return [name.get((bool(m), bool(w)), NONE) for m, w in zip(measured, logged, strict=True)]


def degrade_each(series: Series, variants: Sequence[str]) -> Series:
    """Return the series, each without what its variant lacks, in the same order."""
    chosen = np.array(variants)
    places = [np.flatnonzero(chosen == name) for name in VARIANTS]
    parts = [
        degraded(series.take(place), name)
        for name, place in zip(VARIANTS, places, strict=True)
        if place.size
    ]
    return joined(parts).take(np.argsort(np.concatenate(places)))
