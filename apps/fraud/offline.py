"""The features of a whole table at once, vectorised.

``offline_context`` and ``HistoryIndex`` say what ``apps.fraud.state`` would have said event
by event, had every label been known on the day it may be used: equal to the last bit.

Rows are sorted by entity, then (time, id); a window is a pair of positions found by binary
search; a sum over a window is a difference of running sums of integers.

Legend: N rows of the table, B chosen rows, R history rows, W windows.
"""

from itertools import accumulate
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from apps.fraud.features import (
    CONTEXT_NAMES,
    DAY_MS,
    KIND_CARD,
    KIND_EVENT,
    KIND_TERMINAL,
    LABEL_DELAY_MS,
    NUM_CARD_ROWS,
    NUM_TERMINAL_ROWS,
    UNDEFINED,
    WINDOWS_MS,
    Aggregates,
    Events,
    Features,
    Floats,
    Ints,
    amount_ratio,
    derive,
    gather_history,
)
from apps.fraud.table import event_columns, id_ranks
from apps.fraud.transaction import TransactionSchema

EXACT_INT64 = 2.0**62  # below it, by a float64 estimate, an integer certainly fits int64


class Sequences:
    """Rows grouped by entity, in the order (time, id) within each.

    Args:
        entity: [N] number of the card or terminal.
        time_ms: [N].
        order: [N] all rows in the order (time, id).
    """

    def __init__(self, entity: NDArray[np.int32], time_ms: Ints, order: Ints) -> None:
        self.rows = order[np.argsort(entity[order], kind="stable")]  # position -> row
        self.position = np.empty_like(self.rows)  # row -> position
        self.position[self.rows] = np.arange(self.rows.size)
        sizes = np.bincount(entity, minlength=1)
        self.start = (np.cumsum(sizes) - sizes)[entity]  # row -> position of its entity's first
        self._entity = entity.astype(np.int64)
        self._past = time_ms - time_ms.min(initial=np.iinfo(np.int64).max)
        self._span = int(self._past.max(initial=0)) + 1
        if self._span * sizes.size >= EXACT_INT64:
            days = self._span // DAY_MS
            message = (
                f"expected entities x milliseconds below 2**62, got {sizes.size} x {days} days"
            )
            raise ValueError(message)
        self._keys = (self._entity * self._span + self._past)[self.rows]

    def after(self, back_ms: int) -> Ints:
        """Return, for each row, the first position of its entity later than time - back_ms, [N]."""
        wanted = np.maximum(self._past - back_ms, -1) + self._entity * self._span
        positions: Ints = np.searchsorted(self._keys, wanted, side="right")
        return positions

    def gap_ms(self) -> Ints:
        """Return the time since the entity's previous row, UNDEFINED for its first, [N]."""
        previous = self._past[self.rows[np.maximum(self.position - 1, 0)]]
        return np.where(self.position > self.start, self._past - previous, UNDEFINED)

    def previous_count(self) -> Ints:
        """Return the number of previous rows of the entity, [N]."""
        return self.position - self.start

    def previous_total(self, sums: Ints) -> Ints:
        """Return the sum over the entity's previous rows, from running sums by position, [N]."""
        total: Ints = sums[self.position] - sums[self.start]
        return total

    def running_max(self, amounts: Ints) -> Ints:
        """Return the maximum over the entity's previous rows, 0 for its first, [N]."""
        lift = self._entity * (int(amounts.max(initial=0)) + 1)  # later entities lie above earlier
        peaks = np.maximum.accumulate((amounts + lift)[self.rows])
        previous = peaks[np.maximum(self.position - 1, 0)] - lift
        return np.where(self.position > self.start, previous, 0)


def _running_sum(values: Ints) -> Ints:
    sums = np.zeros(values.size + 1, np.int64)
    np.cumsum(values, out=sums[1:])
    return sums


def _spread(cards: Sequences, amounts: Ints, counts: Ints, totals: Ints) -> Floats:
    """Return float(n * sum of squares - S * S) of the previous rows, exact before rounding, [N].

    int64 wraps around without harm as long as the result itself fits; cards whose result might
    not fit are counted in Python's integers.
    """
    squares = _running_sum((amounts * amounts)[cards.rows])
    spread = counts * (squares[cards.position] - squares[cards.start]) - totals * totals
    out: Floats = spread.astype(np.float64)
    bounds = np.append(np.unique(cards.start), amounts.size)
    estimate = np.add.reduceat(amounts[cards.rows].astype(np.float64) ** 2, bounds[:-1])
    for card in np.flatnonzero(estimate * np.diff(bounds) >= EXACT_INT64):
        rows = cards.rows[bounds[card] : bounds[card + 1]]
        values = amounts[rows].tolist()
        sums = accumulate(values, initial=0)
        exact = accumulate((value * value for value in values), initial=0)
        triples = zip(range(rows.size), sums, exact, strict=False)
        out[rows] = [float(n * square - total * total) for n, total, square in triples]
    return out


def _pair_seen(events: Events, cards: Sequences) -> Ints:
    pair = events.card.astype(np.int64) << 32 | events.terminal
    first = cards.rows[np.unique(pair[cards.rows], return_index=True)[1]]
    seen = np.ones(pair.size, np.int64)
    seen[first] = 0
    return seen


def _fraud_age_days(events: Events, terminals: Sequences, known: Ints, frauds: Ints) -> Ints:
    """Return days since the last fraud before position ``known`` of the terminal, [N]."""
    fraud_ms = np.append(events.time_ms[terminals.rows][events.label[terminals.rows] == 1], 0)
    last = fraud_ms[frauds[known] - 1]
    exists = frauds[known] > frauds[terminals.start]
    return np.where(exists, events.time_ms // DAY_MS - last // DAY_MS, UNDEFINED)


def _aggregates(events: Events, order: Ints) -> Aggregates:
    cards = Sequences(events.card, events.time_ms, order)
    terminals = Sequences(events.terminal, events.time_ms, order)
    totals = _running_sum(events.amount[cards.rows])
    frauds = _running_sum(events.label[terminals.rows].astype(np.int64))
    card_from = np.stack([cards.after(window) for window in WINDOWS_MS], axis=1)
    known = terminals.after(LABEL_DELAY_MS)
    delayed = [terminals.after(LABEL_DELAY_MS + window) for window in WINDOWS_MS]
    known_from = np.stack(delayed, axis=1)
    previous_count, previous_total = cards.previous_count(), cards.previous_total(totals)
    return Aggregates(
        time_ms=events.time_ms,
        amount=events.amount,
        card_counts=cards.position[:, None] + 1 - card_from,
        card_totals=totals[cards.position + 1][:, None] - totals[card_from],
        terminal_counts=known[:, None] - known_from,
        terminal_frauds=frauds[known][:, None] - frauds[known_from],
        previous_count=previous_count,
        previous_total=previous_total,
        previous_max=cards.running_max(events.amount),
        card_gap_ms=cards.gap_ms(),
        terminal_gap_ms=terminals.gap_ms(),
        pair_seen=_pair_seen(events, cards),
        fraud_age_days=_fraud_age_days(events, terminals, known, frauds),
        spread=_spread(cards, events.amount, previous_count, previous_total),
    )


def with_ratios(events: Events, cards: Sequences, minor_units: int) -> Events:
    """Return the same events with their ratios."""
    total = cards.previous_total(_running_sum(events.amount[cards.rows]))
    ratio = amount_ratio(events.amount, cards.previous_count(), total, minor_units)
    return events._replace(ratio=ratio.astype(np.float32))


def offline_context(table: pd.DataFrame, minor_units: int = 100) -> Floats:
    """Return the context features of every row of a canonical table, float64 [N, 24].

    Without a column TX_FRAUD no fraud is known.
    """
    events, _, _ = event_columns(table)
    order = np.lexsort((id_ranks(table), events.time_ms))
    return derive(_aggregates(events, order), minor_units)


class HistoryIndex:
    """Finds the history rows of any rows of a canonical table."""

    def __init__(self, table: pd.DataFrame, minor_units: int = 100) -> None:
        events, _, _ = event_columns(table)
        self._minor_units = minor_units
        order = np.lexsort((id_ranks(table), events.time_ms))
        self._cards = Sequences(events.card, events.time_ms, order)
        self._terminals = Sequences(events.terminal, events.time_ms, order)
        self._events = with_ratios(events, self._cards, minor_units)

    def features(self, row_indices: Ints, context: Floats) -> Features:
        """Return the features of the chosen rows.

        Args:
            row_indices: [B] rows of the table.
            context: float64 [N, 24] of the whole table, from ``offline_context``.
        """
        chosen = np.asarray(row_indices, np.int64)
        cards, terminals = self._cards, self._terminals
        num_card = np.minimum(cards.position[chosen] - cards.start[chosen], NUM_CARD_ROWS)
        num_terminal = terminals.position[chosen] - terminals.start[chosen]
        lengths = 1 + num_card + np.minimum(num_terminal, NUM_TERMINAL_ROWS)
        cu_seqlens = np.zeros(chosen.size + 1, np.int32)
        np.cumsum(lengths, out=cu_seqlens[1:])
        event = np.repeat(chosen, lengths)
        steps = np.arange(event.size) - np.repeat(cu_seqlens[:-1], lengths)
        beyond = steps - np.repeat(num_card, lengths)  # above 0: a row of the terminal
        kinds = np.where(beyond > 0, KIND_TERMINAL, np.where(steps > 0, KIND_CARD, KIND_EVENT))
        by_card = cards.rows[np.maximum(cards.position[event] - steps, 0)]  # step 0: itself
        by_terminal = terminals.rows[terminals.position[event] - np.maximum(beyond, 0)]
        rows = np.where(beyond > 0, by_terminal, by_card)
        history = gather_history(
            self._events, rows, kinds.astype(np.int8), cu_seqlens, self._minor_units
        )
        return Features(context[chosen], history, cu_seqlens)


def write_features(in_path: Path, out_path: Path, schema: TransactionSchema | None = None) -> int:
    """Write TRANSACTION_ID and the 24 context features of a file; return the number of rows.

    Raises:
        DecodeError: The input is not a table of transactions.
        OSError: A file cannot be read or written.
    """
    schema = schema or TransactionSchema()
    table = schema.read_table(in_path)
    context = offline_context(table, schema.minor_units)
    out = pd.DataFrame(context, columns=list(CONTEXT_NAMES))
    out.insert(0, schema.transaction_id, table["transaction_id"])
    if out_path.suffix == ".csv":
        out.to_csv(out_path, index=False)
    else:
        out.to_parquet(out_path, index=False)
    return len(out)
