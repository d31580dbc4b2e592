"""A label: what became known, days later, about one transaction."""

from dataclasses import dataclass
from functools import cached_property

from apps.fraud.transaction import (
    MAX_MESSAGE_BYTES,
    DecodeError,
    IdKind,
    TransactionId,
    decode_object,
    parse_id,
)


@dataclass(frozen=True, slots=True)
class Label:
    """The verdict on one transaction; a later one corrects an earlier one."""

    transaction_id: TransactionId
    is_fraud: bool


@dataclass(frozen=True)
class LabelSchema:
    """How a topic writes labels; the defaults are the handbook's names.

    Args:
        transaction_id: Field of the id.
        is_fraud: Field of the verdict: 0, 1, false or true.
        id_kind: "integer" or "string".
        max_bytes: Longest message.
    """

    transaction_id: str = "TRANSACTION_ID"
    is_fraud: str = "TX_FRAUD"
    id_kind: IdKind = "integer"
    max_bytes: int = MAX_MESSAGE_BYTES

    @cached_property
    def fields(self) -> frozenset[str]:
        """The two field names."""
        return frozenset((self.transaction_id, self.is_fraud))

    def decode(self, value: bytes | None) -> Label:
        """Return the label of one JSON message.

        Raises:
            DecodeError: The message is not exactly one valid label.
        """
        fields = decode_object(value, self.max_bytes)
        if missing := self.fields - fields.keys():
            raise DecodeError(
                "MissingField", f"expected {sorted(missing)}, got {list(fields)!s:.200}"
            )
        if extra := fields.keys() - self.fields:
            message = f"expected only {sorted(self.fields)}, got also {sorted(extra)!s:.200}"
            raise DecodeError("UnknownField", message)
        verdict = fields[self.is_fraud]
        if type(verdict) not in (int, bool) or verdict not in (0, 1):
            message = f"{self.is_fraud}: expected 0, 1, false or true, got {verdict!r:.80}"
            raise DecodeError("InvalidLabel", message)
        transaction_id = parse_id(fields[self.transaction_id], self.id_kind, self.transaction_id)
        return Label(transaction_id, bool(verdict))
