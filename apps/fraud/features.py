"""The 24 context features and the history rows of a transaction: one definition.

Two executions feed it: ``apps.fraud.offline`` over whole tables and ``apps.fraud.state``
event by event.  Both hand over the same integers, and everything after that is
elementwise + - * / and sqrt on float64, so both results are equal to the last bit.

Point in time: a feature of transaction i uses rows before i, in the order (time, id),
and the label of row j only if time_j <= time_i - 7 days.

Legend: B transactions, R rows of all histories, W the three windows (1, 7, 30 days).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

DAY_MS = 86_400_000
HOUR_MS = 3_600_000
WINDOW_DAYS = (1, 7, 30)
WINDOWS_MS = tuple(days * DAY_MS for days in WINDOW_DAYS)
LABEL_DELAY_MS = 7 * DAY_MS  # the handbook's delay until a fraud is known
NUM_CARD_ROWS = 16
NUM_TERMINAL_ROWS = 32
NUM_ROW_COLUMNS = 7  # kind, age_s, amount, matured, fraud, same, ratio
KIND_EVENT, KIND_CARD, KIND_TERMINAL = 0, 1, 2
UNDEFINED = -1  # for a gap or an age that no earlier row defines

CONTEXT_NAMES = (
    "TX_AMOUNT",
    "TX_DURING_WEEKEND",
    "TX_DURING_NIGHT",
    *(
        f"CUSTOMER_ID_{kind}_{days}DAY_WINDOW"
        for days in WINDOW_DAYS
        for kind in ("NB_TX", "AVG_AMOUNT")
    ),
    *(f"TERMINAL_ID_{kind}_{days}DAY_WINDOW" for days in WINDOW_DAYS for kind in ("NB_TX", "RISK")),
    "C_GAP",
    "T_GAP",
    "CT_SEEN",
    "C_RATIO_ALL",
    "C_RATIO30",
    "C_PREV_MAX",
    "C_OVERMAX",
    "C_Z",
    "T_DAYS_SINCE_KNOWN_FRAUD",
)
NUM_CONTEXT = len(CONTEXT_NAMES)


class Aggregates(NamedTuple):
    """What the context features are computed from; int64, money in minor units.

    "Previous" is before the transaction in the order (time, id).

    Args:
        time_ms: [B] epoch milliseconds.
        amount: [B].
        card_counts: [B, W] rows of the card in (time - w, time], the transaction included.
        card_totals: [B, W] their amounts.
        terminal_counts: [B, W] rows of the terminal in (time - 7 d - w, time - 7 d].
        terminal_frauds: [B, W] frauds among them.
        previous_count: [B] previous rows n of the card.
        previous_total: [B] their sum S.
        previous_max: [B] their maximum, 0 if none.
        card_gap_ms: [B] since the card's previous row, or UNDEFINED.
        terminal_gap_ms: [B] since the terminal's previous row, or UNDEFINED.
        pair_seen: [B] 1 if the card was at this terminal before.
        fraud_age_days: [B] calendar days since the terminal's last known fraud, or UNDEFINED.
        spread: float64 [B], n * sum of squares - S * S of the previous rows: the exact integer,
            of any size, rounded once.
    """

    time_ms: Ints
    amount: Ints
    card_counts: Ints
    card_totals: Ints
    terminal_counts: Ints
    terminal_frauds: Ints
    previous_count: Ints
    previous_total: Ints
    previous_max: Ints
    card_gap_ms: Ints
    terminal_gap_ms: Ints
    pair_seen: Ints
    fraud_age_days: Ints
    spread: Floats


class Events(NamedTuple):
    """Columns of transactions, each [N].

    Label is 1 for a fraud, 0 for none or not known.  Ratio is ``amount_ratio`` over the card's
    previous rows, rounded to float32: NaN if undefined or not yet computed.
    """

    time_ms: Ints
    amount: Ints
    card: NDArray[np.int32]
    terminal: NDArray[np.int32]
    label: NDArray[np.int8]
    ratio: NDArray[np.float32]

    def take(self, rows: slice | NDArray[np.integer] | NDArray[np.bool_]) -> "Events":
        """Return the chosen rows; a slice makes no copy."""
        return Events(
            self.time_ms[rows],
            self.amount[rows],
            self.card[rows],
            self.terminal[rows],
            self.label[rows],
            self.ratio[rows],
        )


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """What the model is asked with.

    Args:
        context: float64 [B, 24], columns ``CONTEXT_NAMES``, NaN where undefined.
        history: float32 [R, 7]: kind, age_s, amount, matured, fraud, same, ratio.  Per
            transaction: itself, up to 16 earlier rows of its card, up to 32 of its terminal,
            newest first.  Ratio is C_RATIO_ALL of the row itself, for its own card.
        cu_seqlens: int32 [B+1], row offsets of the transactions in ``history``.
    """

    context: Floats
    history: NDArray[np.float32]
    cu_seqlens: NDArray[np.int32]

    def digest(self, index: int) -> str:
        """Return 16 hex digits that name the exact bits of one transaction's features."""
        start, end = self.cu_seqlens[index : index + 2]
        hashed = blake2b(self.context[index].tobytes(), digest_size=8)
        hashed.update(self.history[start:end].tobytes())
        return hashed.hexdigest()


def join(parts: Sequence[Features]) -> Features:
    """Return the features of all parts, in order; at least one part."""
    if len(parts) == 1:
        return parts[0]
    lengths = np.concatenate([np.diff(part.cu_seqlens) for part in parts])
    cu_seqlens = np.zeros(lengths.size + 1, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    context = np.concatenate([part.context for part in parts])
    return Features(context, np.concatenate([part.history for part in parts]), cu_seqlens)


def _ratio(numerator: Floats | Ints, denominator: Floats | Ints, otherwise: float) -> Floats:
    out = np.full(numerator.shape, otherwise)
    np.divide(numerator, denominator, out=out, where=denominator > 0)
    return out


def _mean(total: Ints, count: Ints, minor_units: int) -> Floats:
    return _ratio(total, count, np.nan) / minor_units


def amount_ratio(amount: Ints, count: Ints, total: Ints, minor_units: int) -> Floats:
    """Return amounts over the mean of the previous amounts of their cards, [B].

    Args:
        amount: [B] minor units.
        count: [B] previous rows of the card.
        total: [B] their sum.
        minor_units: Minor units of one currency unit.

    Returns:
        NaN where no previous row has an amount above 0.
    """
    return _ratio(amount / minor_units, _mean(total, count, minor_units), np.nan)


def derive(aggregates: Aggregates, minor_units: int) -> Floats:
    """Return the context features, float64 [B, 24], columns ``CONTEXT_NAMES``.

    Source:
        Fraud Detection Handbook, chapter 3 (the first 15 columns).
    """
    a = aggregates
    context = np.empty((a.amount.size, NUM_CONTEXT))
    amount = a.amount / minor_units
    context[:, 0] = amount
    context[:, 1] = (a.time_ms // DAY_MS + 3) % 7 >= 5  # day 0 of the epoch was a Thursday
    context[:, 2] = a.time_ms // HOUR_MS % 24 <= 6
    context[:, 3:9:2] = a.card_counts
    context[:, 4:9:2] = a.card_totals / a.card_counts / minor_units
    context[:, 9:15:2] = a.terminal_counts
    context[:, 10:15:2] = _ratio(a.terminal_frauds, a.terminal_counts, 0.0)
    context[:, 15] = np.where(a.card_gap_ms < 0, np.nan, a.card_gap_ms / 1000)
    context[:, 16] = np.where(a.terminal_gap_ms < 0, np.nan, a.terminal_gap_ms / 1000)
    context[:, 17] = a.pair_seen
    context[:, 18] = amount_ratio(a.amount, a.previous_count, a.previous_total, minor_units)
    context[:, 19] = _ratio(amount, context[:, 8], np.nan)
    previous_max = np.where(a.previous_count > 0, a.previous_max / minor_units, np.nan)
    context[:, 20] = previous_max
    context[:, 21] = _ratio(amount, previous_max, np.nan)
    num_pairs = a.previous_count * np.maximum(a.previous_count - 1, 0)
    deviation = np.sqrt(_ratio(a.spread, num_pairs, np.nan)) / minor_units
    mean = _mean(a.previous_total, a.previous_count, minor_units)
    context[:, 22] = _ratio(amount - mean, deviation, np.nan)
    context[:, 23] = np.where(a.fraud_age_days < 0, np.nan, a.fraud_age_days)
    return context


def gather_history(
    events: Events,
    rows: Ints,
    kinds: NDArray[np.int8],
    cu_seqlens: NDArray[np.int32],
    minor_units: int,
) -> NDArray[np.float32]:
    """Return the history rows of transactions, float32 [R, 7].

    Args:
        events: The columns that ``rows`` points into.
        rows: [R] per transaction: itself, then its history.
        kinds: [R] KIND_EVENT, KIND_CARD or KIND_TERMINAL.
        cu_seqlens: [B+1] row offsets of the transactions.
        minor_units: Minor units of one currency unit.
    """
    lengths = np.diff(cu_seqlens)
    event_rows = rows[cu_seqlens[:-1]]
    age_ms = np.repeat(events.time_ms[event_rows], lengths) - events.time_ms[rows]
    matured = age_ms >= LABEL_DELAY_MS
    same_card = np.repeat(events.card[event_rows], lengths) == events.card[rows]
    same_terminal = np.repeat(events.terminal[event_rows], lengths) == events.terminal[rows]
    history = np.empty((rows.size, NUM_ROW_COLUMNS), np.float32)
    history[:, 0] = kinds
    history[:, 1] = age_ms / 1000
    history[:, 2] = events.amount[rows] / minor_units
    history[:, 3] = matured
    history[:, 4] = matured & (events.label[rows] == 1)
    history[:, 5] = same_card & same_terminal & (kinds != KIND_EVENT)
    history[:, 6] = events.ratio[rows]
    return history
