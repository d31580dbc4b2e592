"""A cloud model, its edge model and others judged side by side on the same rows.

Legend: N rows, H horizons, C components.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apps.maintenance.chances import first_failure
from apps.maintenance.fleet import Bools, Floats
from apps.maintenance.protocol import (
    HORIZONS,
    Forecasts,
    Rows,
    decide,
    hours_to_failure,
    labels,
    leads,
    metrics,
)
from apps.maintenance.splits import Part

CLOUD = "cloud"
_LEAST_ALIVE = 1e-9


@dataclass(frozen=True, slots=True)
class Opinion:
    """What one model says of rows.

    Args:
        probs: Of no failure and of each component failing first [N, H, 1 + C].
        caution: Factor on the probability of no failure, by horizon.
    """

    probs: Floats
    caution: Mapping[int, float]


def held_rows(part: Part) -> Rows:
    """Return the rows of a part's test; a horizon's own end comes in ``compare``."""
    hour = part.rows.hour
    return part.rows.take((hour > part.test_start) & (hour < part.test_end))


def edge_probs(hazard_NCH: NDArray[np.floating]) -> Floats:
    """Return the probabilities of the classes [N, H, 1 + C] from those of failing by a horizon."""
    alive = np.clip(1.0 - hazard_NCH.astype(np.float64).transpose(0, 2, 1), _LEAST_ALIVE, 1.0)
    before = np.concatenate([np.ones_like(alive[:, :1]), alive[:, :-1]], axis=1)
    return first_failure(np.clip(1.0 - alive / before, 0.0, 1.0))


def compare(part: Part, opinions: Mapping[str, Opinion]) -> dict[str, dict[str, Any]]:
    """Return the figures of each model by horizon, on the rows ``held_rows`` returns.

    ``share_of_cloud`` is the share of the events that the cloud model catches.
    """
    rows = held_rows(part)
    hours = hours_to_failure(part.fleet.failures, rows, len(part.fleet.components))
    figures: dict[str, dict[str, Any]] = {name: {} for name in opinions}
    for i, horizon in enumerate(HORIZONS):
        kept = rows.hour < part.test_end - horizon
        taken, truth, events = rows.take(kept), labels(hours[kept], horizon), part.events(horizon)
        caught: dict[str, Bools] = {}
        for name, opinion in opinions.items():
            probs = opinion.probs[kept, i]
            predicted = decide(probs, opinion.caution[horizon])
            caught[name] = leads(taken, predicted > 0, events, horizon) > 0
            judged = Forecasts(taken, truth, probs, predicted, events, horizon)
            figures[name][str(horizon)] = metrics(judged)
        for name, found in caught.items():
            of_cloud = found[caught[CLOUD]]
            share = float(of_cloud.mean()) if of_cloud.size else None
            figures[name][str(horizon)]["share_of_cloud"] = share
    return figures
