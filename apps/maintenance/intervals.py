"""Intervals of remaining life and their calibration by what was held out (split conformal).

Romano, Patterson, Candes 2019, arXiv:1905.03222: the interval between two quantiles is
widened or narrowed by the margin that makes it hold as often as it says on held-out rows.
Where the upper quantile reaches the cap the interval is open above: "more than".

Legend: N rows; quantiles are low, middle, high.
"""

import numpy as np
from numpy.typing import NDArray

from apps.maintenance.fleet import Bools, Floats, Ints

COVERAGE = 0.9
BANDS = (0.2, 0.4, 0.6, 0.8)  # of the cap, between which margins differ
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
    quantiles_N3: NDArray[np.floating],
    truth_N: NDArray[np.floating],
    cap: float,
    group_N: Ints,
) -> float:
    """Return the margin with which ``COVERAGE`` of the intervals hold on held-out rows.

    Args:
        quantiles_N3: Low, middle, high.
        truth_N: What they forecast.
        cap: Of the quantiles; infinite for none.
        group_N: Machine or unit of each row.
    """
    low, high = bounds(quantiles_N3, 0.0, cap)
    missed = np.maximum(low - truth_N, np.where(np.isinf(high), -np.inf, truth_N - high))
    return group_quantile(missed, group_N, COVERAGE)


def band_margins(
    quantiles_N3: NDArray[np.floating], truth_N: NDArray[np.floating], cap: float, group_N: Ints
) -> Floats:
    """Return the margins below and above, by band of the middle quantile [len(BANDS) + 1, 2].

    Each side is missed as often as the other.  Who asks when is not known, but whatever the
    mix of lives that are asked for, each band holds (Mondrian conformal prediction).

    Args:
        quantiles_N3: Of held-out rows.
        truth_N: What they forecast.
        cap: Of the quantiles.
        group_N: Unit of each row.
    """
    band = np.digitize(quantiles_N3[:, 1], np.array(BANDS) * cap)
    low, high = quantiles_N3[:, 0].astype(np.float64), quantiles_N3[:, 2].astype(np.float64)
    side, margins = (1.0 + COVERAGE) / 2.0, np.zeros((len(BANDS) + 1, 2))
    for i in range(len(BANDS) + 1):
        own = band == i
        closed = own & (high < OPEN_SHARE * cap)
        if own.any():
            margins[i, 0] = group_quantile((low - truth_N)[own], group_N[own], side)
        if closed.any():
            margins[i, 1] = group_quantile((truth_N - high)[closed], group_N[closed], side)
    return margins


def widened(quantiles_N3: NDArray[np.floating], margins: Floats, cap: float) -> Floats:
    """Return the quantiles with the margins of their bands, [N, 3]; what is open stays open."""
    margin_N2 = margins[np.digitize(quantiles_N3[:, 1], np.array(BANDS) * cap)]
    low, middle, high = quantiles_N3.astype(np.float64).T
    high = np.where(high >= OPEN_SHARE * cap, high, high + margin_N2[:, 1])
    return np.stack([low - margin_N2[:, 0], middle, high], axis=1)


def group_quantile(values_N: Floats, group_N: Ints, level: float) -> float:
    """Return what a value does not exceed with probability ``level``.

    Rows of one group go wrong together: each group counts as one, asked at any of its rows.
    """
    _, group, count = np.unique(group_N, return_inverse=True, return_counts=True)
    order = np.argsort(values_N)
    reached = np.cumsum(1.0 / count[group[order]]) / count.size
    wanted = min(1.0, level * (1.0 + 1.0 / count.size))
    position = min(int(np.searchsorted(reached, wanted - 1e-9)), values_N.size - 1)
    return float(values_N[order[position]])
