"""Drift on a box: its newest windows counted into the bins of the training of its model.

The bundle brings a ``Spread`` for every input that was steady while its model was trained, and
for two figures of the forecasts.  The box reports counts, never values.

Knows: windows and forecasts.  Does not know: labels, so it cannot say that a model is wrong.

Legend: N windows, D features.
"""

import threading
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from apps.maintenance.edge.bundle import BundleInfo
from apps.maintenance.edge.forecast import Forecasts
from apps.maintenance.edge.spread import HAZARD, LIFE, Spread, Values

NEWEST = 1000  # windows of a box that count


class Sketch:
    """Counts of the newest windows under one model; may be used by two threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._version = ""
        self._spreads: Mapping[str, Spread] = {}
        self._bins = np.empty((0, 0), np.uint8)

    def note(self, info: BundleInfo, features: NDArray[np.float32], found: Forecasts) -> None:
        """Take in windows [N, D]; those of another model than before begin anew."""
        if found.version != info.name:
            return  # another model had to answer
        columns = watched_columns(info.features, features, found)
        with self._lock:
            if info.name != self._version:
                self._version, self._spreads = info.name, info.reference
                self._bins = np.empty((0, len(info.reference)), np.uint8)
            new = np.empty((features.shape[0], len(self._spreads)), np.uint8)
            for idx, (name, spread) in enumerate(self._spreads.items()):
                new[:, idx] = spread.bins(columns[name])
            self._bins = np.concatenate([self._bins, new])[-NEWEST:]

    def facts(self) -> Mapping[str, object]:
        """Return version, number of windows and counts by name, for JSON."""
        with self._lock:
            counts = {
                name: np.bincount(self._bins[:, idx], minlength=len(spread.shares)).tolist()
                for idx, (name, spread) in enumerate(self._spreads.items())
            }
            return {"version": self._version, "windows": len(self._bins), "counts": counts}


def watched_columns(
    names: tuple[str, ...], features: NDArray[np.float32], found: Forecasts
) -> Mapping[str, Values]:
    """Return all that may be watched of windows and their forecasts, [N] by name."""
    return {
        **dict(zip(names, features.T, strict=True)),
        HAZARD: found.hazard.max(axis=(1, 2)),
        LIFE: found.life[:, 1],
    }
