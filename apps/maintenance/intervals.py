"""Intervals of remaining life and their calibration by what was held out (split conformal).

Romano, Patterson, Candes 2019, arXiv:1905.03222: the interval between two quantiles is
widened or narrowed by the margin that makes it hold as often as it says on held-out rows.
Where the upper quantile reaches the cap the interval is open above: "more than".

Legend: N rows; quantiles are low, middle, high.
"""

import numpy as np
from numpy.typing import NDArray

from apps.maintenance.fleet import Bools, Floats

COVERAGE = 0.9
OPEN_SHARE = 0.97  # an upper quantile within 3 % of the cap is beyond it


def bounds(quantiles_N3: NDArray[np.floating], margin: float, cap: float) -> tuple[Floats, Floats]:
    """Return lower and upper ends [N]; an open upper end is infinite."""
    low = quantiles_N3[:, 0].astype(np.float64) - margin
    high = quantiles_N3[:, 2].astype(np.float64)
    return low, np.where(high >= OPEN_SHARE * cap, np.inf, high + margin)


def covered(
    quantiles_N3: NDArray[np.floating], truth_N: NDArray[np.floating], margin: float, cap: float
) -> Bools:
    """Tell whether the truth lies within each interval."""
    low, high = bounds(quantiles_N3, margin, cap)
    return (truth_N >= low) & (truth_N <= high)


def conformal_margin(
    quantiles_N3: NDArray[np.floating], truth_N: NDArray[np.floating], cap: float = np.inf
) -> float:
    """Return the margin with which ``COVERAGE`` of the intervals hold on held-out rows."""
    low, high = bounds(quantiles_N3, 0.0, cap)
    missed = np.maximum(low - truth_N, np.where(np.isinf(high), -np.inf, truth_N - high))
    level = min(1.0, COVERAGE * (1.0 + 1.0 / missed.size))
    return float(np.quantile(missed, level))
