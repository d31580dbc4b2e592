"""Dead letters: why a message could not be decided, where it came from, what it was."""

import base64
import json
from typing import NamedTuple

from apps.fraud.stream import Record

PAYLOAD_BYTES = 4096  # of the offending message; enough to see what is wrong with it


class Rejection(NamedTuple):
    """A message that cannot be decided and the reason."""

    record: Record
    error_class: str
    message: str


def encode_rejection(rejection: Rejection) -> bytes:
    """Return a dead letter as JSON: error class, message, input and truncated payload."""
    record = rejection.record
    payload = record.value or b""
    return json.dumps(
        {
            "error_class": rejection.error_class,
            "message": rejection.message,
            "input": {
                "topic": record.topic,
                "partition": record.partition,
                "offset": record.offset,
                "timestamp": record.timestamp,
            },
            "payload": base64.b64encode(payload[:PAYLOAD_BYTES]).decode(),
            "payload_bytes": len(payload),
        },
        separators=(",", ":"),
    ).encode()
