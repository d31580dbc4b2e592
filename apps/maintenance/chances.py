"""From hazards to what is decided on: which component fails first within a horizon.

Legend: N rows, H horizons, C components.
"""

import numpy as np
from numpy.typing import NDArray

from apps.maintenance.fleet import Floats

SMALLEST = 1e-9  # probability; a hazard is never certain


def hazard_probs(logits_NHC: NDArray[np.floating]) -> Floats:
    """Return the probability of failing in each bucket after having lived up to it, [N, H, C]."""
    probs: Floats = 1.0 / (1.0 + np.exp(-logits_NHC.astype(np.float64)))
    return np.clip(probs, SMALLEST, 1.0 - SMALLEST)


def first_failure(probs_NHC: Floats) -> Floats:
    """Return the probability of no failure and of each component failing first, [N, H, 1 + C].

        p[h, 1 + c] = sum_{i <= h} alive[i] * q[i, c] * prod_{j < c} (1 - q[i, j])

    Components are taken as independent.  Two that fail in the same bucket count for the
    first of them by number, as labels do when they fail in the same hour.
    """
    num_rows, num_buckets, num_components = probs_NHC.shape
    alive = np.ones(num_rows)
    first = np.zeros((num_rows, num_buckets, 1 + num_components))
    total = np.zeros((num_rows, num_components))
    for bucket in range(num_buckets):
        for component in range(num_components):
            total[:, component] += alive * probs_NHC[:, bucket, component]
            alive = alive * (1.0 - probs_NHC[:, bucket, component])
        first[:, bucket, 1:] = total
        first[:, bucket, 0] = alive
    return first
