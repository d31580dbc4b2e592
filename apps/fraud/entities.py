"""What is remembered of one card and of one terminal.

Rows are positions in the event log, in the order (time, id).  A row usually goes to the end;
a late one goes to its place, and the running values behind it are corrected.
Sums are exact: those of squares are Python integers, the others fit 64 bits (amounts are below
2**40).  Arrays keep a worker's millions of entries out of the garbage collector's walks, which
took .2 to .4 s each with lists (docs/log.md#stalls).
"""

from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from apps.fraud.features import DAY_MS, LABEL_DELAY_MS, UNDEFINED, WINDOWS_MS
from apps.fraud.retention import (
    COUNT,
    LOW_BITS,
    NO_FRAUD,
    PEAK,
    SQUARES_HIGH,
    SQUARES_LOW,
    TOTAL,
    Memory,
    group_rows,
)
from apps.fraud.transaction import TransactionId

_DAY, _WEEK, _MONTH = WINDOWS_MS
_KNOWN_DAY, _KNOWN_WEEK, _KNOWN_MONTH = (LABEL_DELAY_MS + window for window in WINDOWS_MS)


class Card:
    """Running values of one card.

    Entry i of ``totals``, ``squares`` and ``peaks`` is the sum, the sum of squares and the
    maximum of the amounts before row i; entry 0 stands for the rows that were dropped.
    """

    __slots__ = ("num_dropped", "peaks", "rows", "squares", "times", "totals")

    def __init__(self, num_dropped: int = 0) -> None:
        self.num_dropped = num_dropped
        self.rows = array("q")
        self.times = array("q")
        self.totals = array("q", [0])
        self.squares = [0]
        self.peaks = array("q", [0])

    def aggregate(self, position: int, time_ms: int, amount: int) -> tuple[int, ...]:
        """Return counts, totals (3 windows each), n, S, maximum, gap and n * Q - S * S."""
        times, totals = self.times, self.totals
        day = bisect_right(times, time_ms - _DAY, 0, position)
        week = bisect_right(times, time_ms - _WEEK, 0, day)
        month = bisect_right(times, time_ms - _MONTH, 0, week)
        previous = totals[position]
        total, count = previous + amount, position + 1
        num_previous = self.num_dropped + position
        return (
            count - day,
            count - week,
            count - month,
            total - totals[day],
            total - totals[week],
            total - totals[month],
            num_previous,
            previous,
            self.peaks[position],
            time_ms - times[position - 1] if position else UNDEFINED,
            num_previous * self.squares[position] - previous * previous,
        )

    def previous(self, position: int) -> list[tuple[int, int, int]]:
        """Return each row from a position on, with the number n and sum S of those before it."""
        return [
            (self.rows[i], self.num_dropped + i, self.totals[i])
            for i in range(position, len(self.rows))
        ]

    def insert(self, position: int, row: int, time_ms: int, amount: int) -> None:
        """Put a row in its place."""
        self.rows.insert(position, row)
        self.times.insert(position, time_ms)
        totals, squares, peaks = self.totals, self.squares, self.peaks
        totals.insert(position, totals[position])
        squares.insert(position, squares[position])
        peaks.insert(position, peaks[position])
        square = amount * amount
        for after in range(position + 1, len(totals)):  # one turn unless the row is late
            totals[after] += amount
            squares[after] += square
            peaks[after] = max(peaks[after], amount)


class Terminal:
    """Rows of one terminal, and the times of its frauds as far as labels tell."""

    __slots__ = ("fraud_ms", "rows", "times")

    def __init__(self) -> None:
        self.rows = array("q")
        self.times = array("q")
        self.fraud_ms: list[int] = []

    def aggregate(self, position: int, time_ms: int) -> tuple[int, ...]:
        """Return counts, frauds (3 delayed windows each), gap and days since a known fraud."""
        times = self.times
        known, *starts = _delayed(times, time_ms, position)
        counts = [known - start for start in starts]
        gap_ms = time_ms - times[position - 1] if position else UNDEFINED
        if not self.fraud_ms:
            return (*counts, 0, 0, 0, gap_ms, UNDEFINED)
        known, *starts = _delayed(self.fraud_ms, time_ms, len(self.fraud_ms))
        frauds = [known - start for start in starts]
        age_days = time_ms // DAY_MS - self.fraud_ms[known - 1] // DAY_MS if known else UNDEFINED
        return (*counts, *frauds, gap_ms, age_days)

    def insert(self, position: int, row: int, time_ms: int) -> None:
        """Put a row in its place."""
        self.rows.insert(position, row)
        self.times.insert(position, time_ms)

    def mark(self, time_ms: int, *, is_fraud: bool) -> None:
        """Add a fraud at this time, or take one back."""
        if is_fraud:
            insort(self.fraud_ms, time_ms)
        else:
            del self.fraud_ms[bisect_left(self.fraud_ms, time_ms)]


def _delayed(times: Sequence[int], time_ms: int, end: int) -> tuple[int, int, int, int]:
    """Return the number of times up to 7 days ago, and up to 7 days and each window ago."""
    known = bisect_right(times, time_ms - LABEL_DELAY_MS, 0, end)
    day = bisect_right(times, time_ms - _KNOWN_DAY, 0, known)
    week = bisect_right(times, time_ms - _KNOWN_WEEK, 0, day)
    return known, day, week, bisect_right(times, time_ms - _KNOWN_MONTH, 0, week)


def find_place(
    entity: Card | Terminal,
    ids: Sequence[TransactionId],
    time_ms: int,
    transaction_id: TransactionId,
) -> int:
    """Return the position of a new row of an entity in the order (time, id)."""
    times = entity.times
    if not times or times[-1] < time_ms:
        return len(times)
    position = bisect_right(times, time_ms)
    while (
        position
        and times[position - 1] == time_ms
        and ids[entity.rows[position - 1]] > transaction_id  # type: ignore[operator] # one kind
    ):
        position -= 1
    return position


def load_cards(memory: Memory) -> list[Card]:
    """Return the cards of kept rows, which are in the order (time, id)."""
    events, dropped = memory.events, memory.dropped.tolist()
    rows, bounds = group_rows(events.card, len(dropped))
    all_rows, times = rows.tolist(), events.time_ms[rows].tolist()
    amounts = events.amount[rows].tolist()
    cards = []
    for sums, start, end in zip(dropped, bounds, bounds[1:], strict=False):
        card, own = Card(sums[COUNT]), amounts[start:end]
        card.rows, card.times = array("q", all_rows[start:end]), array("q", times[start:end])
        squares = (sums[SQUARES_HIGH] << LOW_BITS) + sums[SQUARES_LOW]
        card.totals = array("q", accumulate(own, initial=sums[TOTAL]))
        card.squares = list(accumulate((amount * amount for amount in own), initial=squares))
        card.peaks = array("q", accumulate(own, max, initial=sums[PEAK]))
        cards.append(card)
    return cards


def load_terminals(memory: Memory) -> list[Terminal]:
    """Return the terminals of kept rows, which are in the order (time, id)."""
    events, old_fraud_ms = memory.events, memory.old_fraud_ms.tolist()
    rows, bounds = group_rows(events.terminal, len(old_fraud_ms))
    all_rows, times = rows.tolist(), events.time_ms[rows].tolist()
    terminals = []
    for start, end in pairwise(bounds):
        terminal = Terminal()
        terminal.rows, terminal.times = (
            array("q", all_rows[start:end]),
            array("q", times[start:end]),
        )
        terminals.append(terminal)
    frauds = np.flatnonzero(events.label == 1)
    for owner, time_ms in zip(
        events.terminal[frauds].tolist(), events.time_ms[frauds].tolist(), strict=True
    ):
        terminals[owner].fraud_ms.append(time_ms)
    for terminal, old_ms in zip(terminals, old_fraud_ms, strict=True):
        if old_ms != NO_FRAUD:
            terminal.mark(old_ms, is_fraud=True)
    return terminals
