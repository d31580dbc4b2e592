"""A card transaction, and the schema that reads it from a message or a file.

Knows: field names, number kinds, money, time.  Does not know: Kafka, features, state.
Every message either becomes one ``Transaction`` or raises one ``DecodeError``.

Money is kept as whole minor units (cents), so that sums are exact in any order.
Time is kept as epoch milliseconds, UTC; a time without a zone is taken as UTC.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.errors import InvalidRequestError

if TYPE_CHECKING:
    import pandas as pd

ErrorClass = Literal[
    "MalformedMessage",
    "MessageTooLarge",
    "MissingField",
    "UnknownField",
    "InvalidId",
    "InvalidTime",
    "InvalidAmount",
    "InvalidLabel",
]
IdKind = Literal["integer", "string"]
TimeFormat = Literal["iso", "epoch_s", "epoch_ms"]
TransactionId = int | str

LABEL_FIELDS = frozenset(
    {"TX_FRAUD", "TX_FRAUD_SCENARIO"}
)  # the answer must not be in the question
MAX_MESSAGE_BYTES = 64 * 1024
MAX_ID_CHARACTERS = 128
MAX_AMOUNT_MINOR = 2**40 - 1  # sums of 8 million such amounts of one card fit int64
MAX_TIME_MS = 253_402_300_799_999  # end of the year 9999
DECIMAL_TOLERANCE = (
    1e-6  # of a minor unit; binary noise as in 167.25000000000003, not a third decimal
)
_INT64 = range(-(2**63), 2**63)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class DecodeError(InvalidRequestError):
    """A message or a file that is no transaction or label; ``error_class`` says in what way."""

    def __init__(self, error_class: ErrorClass, message: str) -> None:
        super().__init__(message)
        self.error_class = error_class


@dataclass(frozen=True, slots=True)
class Transaction:
    """One card payment.

    Args:
        transaction_id: Unique; breaks ties of time, integers by value, strings by code point.
        time_ms: Epoch milliseconds, UTC.
        card: The paying card.
        terminal: The terminal it was used at.
        amount_minor: Amount in minor units (cents), 0 to ``MAX_AMOUNT_MINOR``.
    """

    transaction_id: TransactionId
    time_ms: int
    card: str
    terminal: str
    amount_minor: int


def decode_object(value: bytes | None, max_bytes: int) -> dict[str, Any]:
    """Return the JSON object of a message.

    Raises:
        DecodeError: Too large, not UTF-8, not JSON, not an object, or a field given twice.
    """
    if value is None or len(value) > max_bytes:
        if value is None:
            raise DecodeError("MalformedMessage", "expected a JSON object, got no value")
        message = f"expected at most {max_bytes} bytes, got {len(value)}"
        raise DecodeError("MessageTooLarge", message)
    try:
        fields = json.loads(value.decode(), object_pairs_hook=_unique_fields)
    except (ValueError, RecursionError) as error:
        message = f"expected a JSON object in UTF-8: {error!s:.200}"
        raise DecodeError("MalformedMessage", message) from error
    if not isinstance(fields, dict):
        message = f"expected a JSON object, got {type(fields).__name__}"
        raise DecodeError("MalformedMessage", message)
    return fields


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a field is given twice")
    return fields


def parse_id(value: object, kind: IdKind, field: str) -> TransactionId:
    """Return a transaction id of the declared kind.

    Raises:
        DecodeError: Another kind, out of the int64 range, empty, too long or not printable.
    """
    if kind == "string":
        return parse_name(value, field)
    if type(value) is int and value in _INT64:
        return value
    raise DecodeError("InvalidId", f"{field}: expected a 64-bit integer, got {value!r:.80}")


def parse_name(value: object, field: str) -> str:
    """Return the name of a card or terminal: a string, or an integer's digits.

    Raises:
        DecodeError: Another type, empty, too long or not printable.
    """
    name = str(value) if type(value) is int and value in _INT64 else value
    if isinstance(name, str) and 0 < len(name) <= MAX_ID_CHARACTERS and name.isprintable():
        return name
    expected = f"1 to {MAX_ID_CHARACTERS} printable characters or an integer"
    raise DecodeError("InvalidId", f"{field}: expected {expected}, got {value!r:.80}")


@dataclass(frozen=True)
class TransactionSchema:
    """How a topic or a file writes transactions; the defaults are the handbook's names.

    Args:
        transaction_id: Field of the id.
        time: Field of the time.
        card: Field of the card.
        terminal: Field of the terminal.
        amount: Field of the amount, a number in currency units.
        id_kind: "integer" or "string".
        time_format: "iso" (ISO 8601, or a parquet timestamp), "epoch_s" or "epoch_ms".
        minor_units: Minor units of one currency unit, such as 100.
        extra_fields: "reject" or "ignore"; labels are rejected in either case.
        max_bytes: Longest message.
    """

    transaction_id: str = "TRANSACTION_ID"
    time: str = "TX_DATETIME"
    card: str = "CUSTOMER_ID"
    terminal: str = "TERMINAL_ID"
    amount: str = "TX_AMOUNT"
    id_kind: IdKind = "integer"
    time_format: TimeFormat = "iso"
    minor_units: int = 100
    extra_fields: Literal["reject", "ignore"] = "reject"
    max_bytes: int = MAX_MESSAGE_BYTES

    @cached_property
    def fields(self) -> frozenset[str]:
        """The five field names."""
        return frozenset((self.transaction_id, self.time, self.card, self.terminal, self.amount))

    def decode(self, value: bytes | None) -> Transaction:
        """Return the transaction of one JSON message.

        Raises:
            DecodeError: The message is not exactly one valid transaction.
        """
        fields = decode_object(value, self.max_bytes)
        if fields.keys() != self.fields:
            self._check_names(fields)
        return Transaction(
            parse_id(fields[self.transaction_id], self.id_kind, self.transaction_id),
            self._parse_time(fields[self.time]),
            parse_name(fields[self.card], self.card),
            parse_name(fields[self.terminal], self.terminal),
            self._parse_amount(fields[self.amount]),
        )

    def read_table(self, path: Path) -> "pd.DataFrame":
        """Return a CSV or parquet file as the canonical table, see ``apps.fraud.table``."""
        from apps.fraud.table import read_table  # noqa: PLC0415 - a stream needs no pandas

        return read_table(path, self)

    def _check_names(self, fields: Mapping[str, object]) -> None:
        if missing := self.fields - fields.keys():
            raise DecodeError(
                "MissingField", f"expected {sorted(missing)}, got {list(fields)!s:.200}"
            )
        extra = fields.keys() - self.fields
        unwanted = extra if self.extra_fields == "reject" else extra & LABEL_FIELDS
        if unwanted:
            message = f"expected only {sorted(self.fields)}, got also {sorted(unwanted)!s:.200}"
            raise DecodeError("UnknownField", message)

    def _parse_time(self, value: object) -> int:
        time_ms = _TIME_PARSERS[self.time_format](value)
        if time_ms is None or not 0 <= time_ms <= MAX_TIME_MS:
            message = (
                f"{self.time}: expected {self.time_format} from 1970 to 9999, got {value!r:.80}"
            )
            raise DecodeError("InvalidTime", message)
        return time_ms

    def _parse_amount(self, value: object) -> int:
        if type(value) is float and 0 <= value <= MAX_AMOUNT_MINOR:
            scaled = value * self.minor_units
            minor = round(scaled)
            exact = abs(scaled - minor) <= DECIMAL_TOLERANCE or minor / self.minor_units == value
        else:
            exact = type(value) is int
            minor = value * self.minor_units if type(value) is int else -1
        if not (exact and 0 <= minor <= MAX_AMOUNT_MINOR):
            expected = f"a number from 0 to {MAX_AMOUNT_MINOR / self.minor_units}"
            message = f"{self.amount}: expected {expected} in whole 1/{self.minor_units}, got {value!r:.80}"
            raise DecodeError("InvalidAmount", message)
        return minor


def _parse_iso(value: object) -> int | None:
    if not isinstance(value, str):
        return None
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        return None
    past = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH
    return past.days * 86_400_000 + past.seconds * 1000 + past.microseconds // 1000


def _parse_epoch_s(value: object) -> int | None:
    if type(value) is int:
        return value * 1000
    return round(value * 1000) if type(value) is float and isfinite(value) else None


def _parse_epoch_ms(value: object) -> int | None:
    return value if type(value) is int else None


_TIME_PARSERS = {"iso": _parse_iso, "epoch_s": _parse_epoch_s, "epoch_ms": _parse_epoch_ms}
