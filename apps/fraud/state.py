"""The feature state of a stream: what a worker remembers of cards and terminals.

Fed event by event it gives the features that ``apps.fraud.offline`` gives for the whole
table, bit for bit, for rows and labels that arrive in time.

- Every worker keeps all cards and all terminals, also of transactions it does not score: a
  terminal sees cards of all workers, and a partition can move without moving state.
- A label may come before or after its transaction and may be corrected.  It counts only from
  7 days after the transaction on, however early it is known.
- Memory: 38 days of event time, the last 16 rows of a card and 32 of a terminal (see
  ``apps.fraud.retention``), for ever a few integers per card, per terminal and per pair of them
  that met, and the last million frauds without a transaction.  A label for a dropped row waits
  there in vain, and a dropped id is no longer ``seen``.

Not thread-safe.  Knows no clock and no Kafka.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from apps.fraud.draft import Draft
from apps.fraud.entities import Card, Terminal, find_place, load_cards, load_terminals
from apps.fraud.eventlog import EventLog
from apps.fraud.features import Events, Features, amount_ratio, join
from apps.fraud.labels import Label
from apps.fraud.offline import Sequences, with_ratios
from apps.fraud.retention import NO_FRAUD, PEAK, Memory
from apps.fraud.table import event_columns
from apps.fraud.transaction import Transaction, TransactionId

MAX_PENDING_LABELS = 1_000_000  # frauds; a rebuild reads all labels first; about 100 MB
SPARE_ROWS = 2**18  # appended before rows are dropped again; dropping takes about 1 us per row
_PAIR_BITS = 32

_Entity = TypeVar("_Entity", Card, Terminal)


class FeatureState:
    """Everything that features of coming transactions depend on.

    Args:
        minor_units: Minor units of one currency unit.
        spare_rows: Least number of rows between two compactions.
    """

    def __init__(self, minor_units: int = 100, *, spare_rows: int = SPARE_ROWS) -> None:
        self._minor_units = minor_units
        self._spare_rows = spare_rows
        self._card_numbers: dict[str, int] = {}
        self._terminal_numbers: dict[str, int] = {}
        self._first_ms: dict[int, int] = {}  # card << 32 | terminal -> first time of the pair
        self._pending: OrderedDict[TransactionId, bool] = OrderedDict()
        self._load(_empty_memory())

    @property
    def newest_ms(self) -> int:
        """The latest event time so far, 0 if none.

        A transaction more than ``MAX_LATENESS_MS`` older may get thinned-out windows; one more than
        ``RETENTION_MS`` older may be placed behind dropped rows that are later than itself.
        """
        return int(self._log.view().time_ms.max(initial=0))

    def seen(self, transaction_id: TransactionId) -> bool:
        """Tell whether a transaction is remembered."""
        return transaction_id in self._row_of

    def add_label(self, label: Label) -> None:
        """Learn, or correct, whether a transaction was fraud."""
        row = self._row_of.get(label.transaction_id)
        if row is None:
            self._pending.pop(label.transaction_id, None)
            if label.is_fraud:  # a row begins as no fraud
                self._pending[label.transaction_id] = True
            if len(self._pending) > MAX_PENDING_LABELS:
                self._pending.popitem(last=False)
        else:
            self._set_label(row, is_fraud=label.is_fraud)

    def advance(self, transactions: Sequence[Transaction], owned: Sequence[bool]) -> Features:
        """Take in transactions in this order; return the features of the owned ones.

        A transaction sees those before it in the same call.

        Raises:
            ValueError: An id was seen before, or the lengths differ; nothing is changed then.
        """
        self._check_new(transactions, owned)
        keys = [(t.time_ms, t.transaction_id) for t in transactions]
        late = [i for i, (key, after) in enumerate(pairwise(keys), 1) if after < key]
        runs = [slice(*ends) for ends in pairwise((0, *late, len(keys)))]
        features = join([self._advance(transactions[run], owned[run]) for run in runs])
        if self._log.size >= self._compact_at:
            self.compact()
        return features

    def compact(self) -> None:
        """Forget what no coming transaction can need; ``advance`` does it in time."""
        self._load(self._memory().compacted())

    def snapshot(self) -> dict[str, NDArray[Any]]:
        """Return the whole state as arrays of plain dtypes."""
        memory = self._memory()
        return {
            **{f"event_{name}": column for name, column in memory.events._asdict().items()},
            "event_id": memory.ids,
            "dropped": memory.dropped,
            "old_fraud_ms": memory.old_fraud_ms,
            "card_name": np.array(list(self._card_numbers), np.str_),
            "terminal_name": np.array(list(self._terminal_numbers), np.str_),
            "pair": np.fromiter(self._first_ms.keys(), np.int64),
            "pair_first_ms": np.fromiter(self._first_ms.values(), np.int64),
            "pending_id": _id_array(list(self._pending)),
            "pending_is_fraud": np.fromiter(self._pending.values(), np.bool_),
            "minor_units": np.array(self._minor_units),
        }

    @classmethod
    def restore(cls, arrays: Mapping[str, NDArray[Any]]) -> "FeatureState":
        """Return the state of a snapshot; it continues exactly as the original would have."""
        state = cls(int(arrays["minor_units"]))
        state._card_numbers = _numbers(arrays["card_name"].tolist())
        state._terminal_numbers = _numbers(arrays["terminal_name"].tolist())
        state._first_ms = dict(
            zip(arrays["pair"].tolist(), arrays["pair_first_ms"].tolist(), strict=True)
        )
        state._pending = OrderedDict(
            zip(arrays["pending_id"].tolist(), arrays["pending_is_fraud"].tolist(), strict=True)
        )
        events = Events(*(arrays[f"event_{name}"] for name in Events._fields))
        memory = Memory(events, arrays["event_id"], arrays["dropped"], arrays["old_fraud_ms"])
        state._load(memory)
        return state

    @classmethod
    def warm(cls, table: pd.DataFrame, minor_units: int = 100) -> "FeatureState":
        """Return the state after a canonical table, as if streamed with its labels."""
        state = cls(minor_units)
        events, card_names, terminal_names = event_columns(table)
        state._card_numbers = _numbers(card_names)
        state._terminal_numbers = _numbers(terminal_names)
        ids = table["transaction_id"].to_numpy()
        memory = Memory(
            events,
            ids.astype(np.int64) if ids.dtype.kind in "iu" else _id_array(ids.tolist()),
            np.zeros((len(card_names), PEAK + 1), np.int64),
            np.full(len(terminal_names), NO_FRAUD, np.int64),
        ).in_order()
        in_order = np.arange(memory.ids.size)
        by_card = Sequences(memory.events.card, memory.events.time_ms, in_order)
        memory = replace(memory, events=with_ratios(memory.events, by_card, minor_units))
        pair = memory.events.card.astype(np.int64) << _PAIR_BITS | memory.events.terminal
        pairs, first = np.unique(pair, return_index=True)
        first_ms = memory.events.time_ms[first].tolist()
        state._first_ms = dict(zip(pairs.tolist(), first_ms, strict=True))
        state._load(memory.compacted())
        return state

    def _check_new(self, transactions: Sequence[Transaction], owned: Sequence[bool]) -> None:
        ids = [transaction.transaction_id for transaction in transactions]
        if len(owned) != len(ids):
            message = f"expected one owned flag per transaction, got {len(owned)} for {len(ids)}"
            raise ValueError(message)
        if len(set(ids)) < len(ids) or not self._row_of.keys().isdisjoint(ids):
            repeated = [i for i in ids if i in self._row_of or ids.count(i) > 1]
            message = f"expected new transaction ids, got {repeated[:3]!r} again"
            raise ValueError(message)

    def _advance(self, transactions: Sequence[Transaction], owned: Sequence[bool]) -> Features:
        """Take in transactions of rising (time, id).

        A late one changes the ratios of rows after it, which no transaction before it shows; so
        all answers may wait for the last transaction.
        """
        first = self._log.size
        cards = [_number(self._card_numbers, self._cards, t.card, Card) for t in transactions]
        terminals = [
            _number(self._terminal_numbers, self._terminals, t.terminal, Terminal)
            for t in transactions
        ]
        self._append(transactions, cards, terminals)
        draft = Draft()
        moved: list[tuple[int, int, int]] = []
        for index, transaction in enumerate(transactions):
            answered = draft if owned[index] else None
            row, card_idx = first + index, cards[index]
            at_card = self._take(transaction, row, card_idx, terminals[index], answered)
            moved += self._cards[card_idx].previous(at_card)
        self._set_ratios(moved)
        return draft.features(self._log.columns, self._minor_units)

    def _append(
        self, transactions: Sequence[Transaction], cards: list[int], terminals: list[int]
    ) -> None:
        ids = [transaction.transaction_id for transaction in transactions]
        self._row_of.update(zip(ids, range(self._log.size, self._log.size + len(ids)), strict=True))
        self._ids.extend(ids)
        times = [transaction.time_ms for transaction in transactions]
        amounts = [transaction.amount_minor for transaction in transactions]
        self._log.extend(times, amounts, cards, terminals)

    def _take(
        self,
        transaction: Transaction,
        row: int,
        card_idx: int,
        terminal_idx: int,
        draft: Draft | None,
    ) -> int:
        """Put a transaction in its places; return the one among the rows of its card."""
        time_ms, amount = transaction.time_ms, transaction.amount_minor
        card, terminal = self._cards[card_idx], self._terminals[terminal_idx]
        identifier = transaction.transaction_id
        at_card = find_place(card, self._ids, time_ms, identifier)
        at_terminal = find_place(terminal, self._ids, time_ms, identifier)
        pair = card_idx << _PAIR_BITS | terminal_idx
        if draft is not None:
            pair_seen = self._pair_seen(pair, card, at_card, time_ms)
            draft.add(row, transaction, (card, at_card), (terminal, at_terminal), pair_seen)
        card.insert(at_card, row, time_ms, amount)
        terminal.insert(at_terminal, row, time_ms)
        if self._first_ms.setdefault(pair, time_ms) > time_ms:
            self._first_ms[pair] = time_ms
        if self._pending and self._pending.pop(identifier, False):
            self._set_label(row, is_fraud=True)
        return at_card

    def _set_ratios(self, previous: list[tuple[int, int, int]]) -> None:
        """Set the ratios of rows; of a row named twice the last entry counts."""
        rows, counts, totals = np.array(previous, np.int64).reshape(-1, 3).T
        amounts = self._log.columns.amount[rows]
        self._log.columns.ratio[rows] = amount_ratio(amounts, counts, totals, self._minor_units)

    def _pair_seen(self, pair: int, card: Card, at_card: int, time_ms: int) -> bool:
        first_ms = self._first_ms.get(pair)
        if first_ms is None or first_ms != time_ms:
            return first_ms is not None and first_ms < time_ms
        terminals, terminal_idx = self._log.columns.terminal, pair & (2**_PAIR_BITS - 1)
        return any(
            card.times[before] == time_ms and terminals[card.rows[before]] == terminal_idx
            for before in range(at_card)
        )

    def _set_label(self, row: int, *, is_fraud: bool) -> None:
        columns = self._log.columns
        if bool(columns.label[row]) != is_fraud:
            columns.label[row] = is_fraud
            terminal = self._terminals[columns.terminal[row]]
            terminal.mark(int(columns.time_ms[row]), is_fraud=is_fraud)

    def _memory(self) -> Memory:
        new_cards = len(self._cards) - len(self._dropped)
        new_terminals = len(self._terminals) - self._old_fraud_ms.size
        return Memory(
            self._log.view().take(np.arange(self._log.size)),
            _id_array(self._ids),
            np.pad(self._dropped, ((0, new_cards), (0, 0))),
            np.pad(self._old_fraud_ms, (0, new_terminals), constant_values=NO_FRAUD),
        ).in_order()

    def _load(self, memory: Memory) -> None:
        """Make the log and the lists of all entities from rows in the order (time, id)."""
        self._dropped, self._old_fraud_ms = memory.dropped, memory.old_fraud_ms
        self._log = EventLog(memory.events)
        self._ids: list[TransactionId] = memory.ids.tolist()
        self._row_of = dict(zip(self._ids, range(self._log.size), strict=True))
        self._cards = load_cards(memory)
        self._terminals = load_terminals(memory)
        self._compact_at = self._log.size + max(self._log.size, self._spare_rows)


def _empty_memory() -> Memory:
    none = np.empty(0, np.int64)
    events = EventLog.empty_columns(0)
    return Memory(events, none, np.empty((0, PEAK + 1), np.int64), none)


def _id_array(ids: Sequence[TransactionId]) -> NDArray[Any]:
    return np.array(ids, np.str_ if ids and isinstance(ids[0], str) else np.int64)


def _numbers(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _number(
    numbers: dict[str, int], entities: list[_Entity], name: str, build: type[_Entity]
) -> int:
    number = numbers.get(name)
    if number is None:
        number = numbers[name] = len(entities)
        entities.append(build())
    return number
