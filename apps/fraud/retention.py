"""The feature state as plain arrays, and what of it may be forgotten.

A row is kept while it may still be counted or shown: for 38 days of event time before the
newest row (30 days of window, 7 of label delay, 1 of lateness), and beyond that as one of the
last 16 of its card or the last 32 of its terminal.  What is dropped lives on as five integers
per card and the last fraud per terminal.  A kept row keeps its ratio: among the rows of its card
a dropped one may be before it or, if its terminal kept it, after it.

Legend: N rows, C cards, T terminals.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apps.fraud.features import (
    DAY_MS,
    LABEL_DELAY_MS,
    NUM_CARD_ROWS,
    NUM_TERMINAL_ROWS,
    WINDOWS_MS,
    Events,
    Ints,
)

MAX_LATENESS_MS = DAY_MS  # a row later than this may find its windows already thinned out
RETENTION_MS = LABEL_DELAY_MS + WINDOWS_MS[-1] + MAX_LATENESS_MS
NO_FRAUD = -1
COUNT, TOTAL, SQUARES_HIGH, SQUARES_LOW, PEAK = range(5)
LOW_BITS = 40  # sum of squares = high * 2**40 + low; both sums fit int64 for 4 million rows
_HALF_BITS = LOW_BITS // 2


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """All rows that are kept, in the order (time, id), and the sums of the dropped ones.

    Args:
        events: [N].
        ids: [N] transaction ids, int64 or str.
        dropped: int64 [C, 5] count, total, squares (two parts) and maximum of dropped amounts.
        old_fraud_ms: int64 [T] the last dropped fraud of each terminal, or NO_FRAUD.
    """

    events: Events
    ids: NDArray[Any]
    dropped: Ints
    old_fraud_ms: Ints

    def in_order(self) -> "Memory":
        """Return the same with rows in the order (time, id)."""
        steps = np.diff(self.events.time_ms)
        ties = np.flatnonzero(steps == 0)
        if (steps >= 0).all() and (self.ids[ties] < self.ids[ties + 1]).all():
            return self
        return self._rows(np.lexsort((self.ids, self.events.time_ms)))

    def compacted(self) -> "Memory":
        """Return the rows that may still matter; the others move into the sums."""
        events = self.events
        keep = events.time_ms > events.time_ms.max(initial=0) - RETENTION_MS
        keep |= _is_among_last(events.card, NUM_CARD_ROWS)
        keep |= _is_among_last(events.terminal, NUM_TERMINAL_ROWS)
        gone = events.take(~keep)
        dropped, old_fraud_ms = self.dropped.copy(), self.old_fraud_ms.copy()
        for part, values in enumerate(_parts(gone.amount)):
            ufunc = np.maximum if part == PEAK else np.add
            ufunc.at(dropped[:, part], gone.card, values)
        dropped[:, SQUARES_HIGH] += dropped[:, SQUARES_LOW] >> LOW_BITS
        dropped[:, SQUARES_LOW] &= 2**LOW_BITS - 1
        fraud = gone.label == 1
        np.maximum.at(old_fraud_ms, gone.terminal[fraud], gone.time_ms[fraud])
        kept = self._rows(np.flatnonzero(keep))
        return replace(kept, dropped=dropped, old_fraud_ms=old_fraud_ms)

    def _rows(self, rows: NDArray[np.intp]) -> "Memory":
        return replace(self, events=self.events.take(rows), ids=self.ids[rows])


def group_rows(entity: NDArray[np.int32], num_entities: int) -> tuple[Ints, list[int]]:
    """Return rows grouped by entity, in their order, [N], and the bounds of the groups, C+1."""
    sizes = np.bincount(entity, minlength=num_entities)
    return np.argsort(entity, kind="stable"), [0, *np.cumsum(sizes).tolist()]


def _is_among_last(entity: NDArray[np.int32], count: int) -> NDArray[np.bool_]:
    rows, bounds = group_rows(entity, 0)
    ends = np.asarray(bounds[1:], np.int64)[entity[rows]]
    last = np.empty(entity.size, np.bool_)
    last[rows] = ends - np.arange(entity.size) <= count
    return last


def _parts(amount: Ints) -> tuple[Ints, ...]:
    """Return the five columns of ``dropped`` for single amounts below 2**40."""
    high, low = amount >> _HALF_BITS, amount & (2**_HALF_BITS - 1)
    rest = (high * low << (_HALF_BITS + 1)) + low * low
    squares_high = high * high + (rest >> LOW_BITS)
    return np.ones_like(amount), amount, squares_high, rest & (2**LOW_BITS - 1), amount
