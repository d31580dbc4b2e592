"""How values are spread over bins, and how far counts of new ones are from that.

    PSI = sum over bins of (new - old) * ln(new / old)        population stability index

Below .1 it is called steady, above .25 drifted; both are the conventional limits.

Legend: N windows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

STEADY, DRIFTED = 0.1, 0.25
HAZARD, LIFE = "forecast hazard", "forecast life"  # the largest hazard, the median life
NUM_BINS = 10
STEADY_SHARE = 0.9  # of the parts of a record in which a name must be steady
_LEAST = 1e-3  # share of an empty bin
_DIGITS = 6  # of edges and shares

Values = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Spread:
    """How the values of one name were spread in training.

    Args:
        edges: Between the bins, rising.
        shares: Of windows in each bin, then of those without a value; two more than edges.

    Raises:
        ValueError: They do not fit each other.
    """

    edges: tuple[float, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        is_rising = sorted(set(self.edges)) == list(self.edges)
        if not is_rising or len(self.shares) != len(self.edges) + 2 or min(self.shares) < 0:
            message = f"expected rising edges and two more shares, got {self.edges} {self.shares}"
            raise ValueError(message)

    @classmethod
    def of(cls, values: Values) -> "Spread":
        """Return the spread of values [N] over their own tenths; NaN is no value."""
        known = values[~np.isnan(values)]
        tenths = np.linspace(0, 1, NUM_BINS + 1)[1:-1]
        edges = np.unique(np.quantile(known, tenths).round(_DIGITS)) if known.size else known
        counts = np.bincount(_bins(values, edges), minlength=edges.size + 2)
        shares = (counts / max(values.size, 1)).round(_DIGITS)
        return cls(tuple(edges.tolist()), tuple(shares.tolist()))

    @classmethod
    def from_record(cls, record: Mapping[str, Sequence[float]]) -> "Spread":
        """Return what came as JSON.

        Raises:
            KeyError, TypeError, ValueError: It is no spread.
        """
        return cls(*(tuple(float(each) for each in record[name]) for name in cls.__slots__))

    def bins(self, values: Values) -> NDArray[np.int64]:
        """Return the bin of each value [N]."""
        return _bins(values, np.asarray(self.edges))

    def count(self, values: Values) -> NDArray[np.int64]:
        """Return how many values lie in each bin."""
        return np.bincount(self.bins(values), minlength=len(self.shares))

    def psi(self, counts: Sequence[int] | NDArray[np.int64]) -> float:
        """Return how far counts by bin are from this spread."""
        new = np.maximum(np.asarray(counts) / max(int(np.sum(counts)), 1), _LEAST)
        old = np.maximum(np.asarray(self.shares), _LEAST)
        return float(((new - old) * np.log(new / old)).sum())


def steady_spreads(columns: Mapping[str, Values], part: NDArray[np.int64]) -> Mapping[str, Spread]:
    """Return the spreads of the names that are steady over the parts of a record.

    A name whose values change from part to part in training itself, such as an age, would be
    called drifted for ever after.

    Args:
        columns: Values [N] by name.
        part: Of each window, such as its week [N].
    """
    found = {}
    for name, values in columns.items():
        spread = Spread.of(values)
        psis = [spread.psi(spread.count(values[part == each])) for each in np.unique(part)]
        if spread.edges and float(np.quantile(psis, STEADY_SHARE)) < STEADY:
            found[name] = spread
    return found


def _bins(values: Values, edges: Values) -> NDArray[np.int64]:
    return np.where(
        np.isnan(values), edges.size + 1, np.searchsorted(edges, values, side="right")
    ).astype(np.int64)
