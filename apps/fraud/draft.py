"""Features in the making: integers of single transactions, collected, then computed at once."""

import numpy as np

from apps.fraud.entities import Card, Terminal
from apps.fraud.features import (
    KIND_CARD,
    KIND_EVENT,
    KIND_TERMINAL,
    NUM_CARD_ROWS,
    NUM_TERMINAL_ROWS,
    Aggregates,
    Events,
    Features,
    derive,
    gather_history,
)
from apps.fraud.transaction import Transaction

_KINDS = np.array([KIND_EVENT, KIND_CARD, KIND_TERMINAL], np.int8)
_NUM_INTEGERS = 21  # of one transaction, in the order of ``_aggregates``


class Draft:
    """The answered transactions of one call."""

    __slots__ = ("_integers", "_lengths", "_rows", "_spread")

    def __init__(self) -> None:
        self._integers: list[tuple[int, ...]] = []
        self._spread: list[float] = []
        self._rows: list[int] = []
        self._lengths: list[int] = []

    def add(
        self,
        row: int,
        transaction: Transaction,
        card_place: tuple[Card, int],
        terminal_place: tuple[Terminal, int],
        pair_seen: bool,
    ) -> None:
        """Look at card and terminal as they are before this transaction."""
        time_ms, amount = transaction.time_ms, transaction.amount_minor
        (card, at_card), (terminal, at_terminal) = card_place, terminal_place
        *of_card, spread = card.aggregate(at_card, time_ms, amount)
        of_terminal = terminal.aggregate(at_terminal, time_ms)
        self._integers.append((time_ms, amount, *of_card, *of_terminal, pair_seen))
        self._spread.append(float(spread))
        card_rows = card.rows[max(0, at_card - NUM_CARD_ROWS) : at_card]
        terminal_rows = terminal.rows[max(0, at_terminal - NUM_TERMINAL_ROWS) : at_terminal]
        self._rows.append(row)
        self._rows += card_rows[::-1]
        self._rows += terminal_rows[::-1]
        self._lengths += (1, len(card_rows), len(terminal_rows))

    def features(self, events: Events, minor_units: int) -> Features:
        """Return the features of all transactions added."""
        rows = np.array(self._rows, np.int64)
        lengths = np.array(self._lengths, np.int64)
        cu_seqlens = np.zeros(len(self._integers) + 1, np.int32)
        np.cumsum(lengths.reshape(-1, 3).sum(axis=1), out=cu_seqlens[1:])
        kinds = np.repeat(np.tile(_KINDS, len(self._integers)), lengths)
        context = derive(self._aggregates(), minor_units)
        history = gather_history(events, rows, kinds, cu_seqlens, minor_units)
        return Features(context, history, cu_seqlens)

    def _aggregates(self) -> Aggregates:
        of = np.array(self._integers, np.int64).reshape(-1, _NUM_INTEGERS).T.copy()
        return Aggregates(
            time_ms=of[0],
            amount=of[1],
            card_counts=of[2:5].T,
            card_totals=of[5:8].T,
            previous_count=of[8],
            previous_total=of[9],
            previous_max=of[10],
            card_gap_ms=of[11],
            terminal_counts=of[12:15].T,
            terminal_frauds=of[15:18].T,
            terminal_gap_ms=of[18],
            fraud_age_days=of[19],
            pair_seen=of[20],
            spread=np.array(self._spread, np.float64),
        )
