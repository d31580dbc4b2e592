"""An alert as an HTTP POST that its receiver can tell apart and believe.

    Idempotency-Key      the message's ``id``: the same for every attempt
    X-Trimoe-Timestamp   seconds since 1970, of this attempt
    X-Trimoe-Signature   sha256=HMAC(secret, timestamp + "." + body), hexadecimal

2xx is taken.  408, 425, 429, 5xx and no answer are for another attempt; whatever else is a refusal.
"""

import hashlib
import hmac
import http.client
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from apps.maintenance.sync.connection import open_connection
from cluster.errors import ConfigurationError, InvalidRequestError, UnavailableError

STALL_S, TOTAL_S = 5.0, 15.0
_AGAIN = {408, 425, 429}
_LEAST_SECRET = 16  # bytes


@dataclass(frozen=True, slots=True)
class Webhook:
    """A receiver of alerts.

    Args:
        url: http or https.
        secret: That both sides know.

    Raises:
        ConfigurationError: The URL or the secret cannot be used.
    """

    url: str
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            message = f"webhook: expected http(s)://HOST/PATH, got {self.url!r:.100}"
            raise ConfigurationError(message)
        if len(self.secret) < _LEAST_SECRET:
            message = f"webhook: expected {_LEAST_SECRET} characters in $TRIMOE_WEBHOOK_SECRET"
            raise ConfigurationError(message)

    def send(self, message: Mapping[str, object]) -> None:
        """Send a message.

        Raises:
            UnavailableError: It was not taken; another attempt may succeed.
            InvalidRequestError: It was refused.
        """
        body = json.dumps(message, separators=(",", ":")).encode()
        timestamp = f"{time.time():.0f}"
        headers = {
            "Content-Type": "application/json",
            "Idempotency-Key": str(message["id"]),
            "X-Trimoe-Timestamp": timestamp,
            "X-Trimoe-Signature": f"sha256={sign(self.secret, timestamp, body)}",
        }
        parts = urlsplit(self.url)
        path = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
        try:
            with open_connection(self.url, STALL_S, time.monotonic() + TOTAL_S) as connection:
                connection.request("POST", path, body, headers)
                status = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            text = f"{parts.netloc}: expected an answer, got {error!r:.100}"
            raise UnavailableError(text) from error
        if 200 <= status < 300:
            return
        text = f"{parts.netloc}: expected HTTP 2xx, got {status}"
        raise (
            UnavailableError(text)
            if status in _AGAIN or status >= 500
            else InvalidRequestError(text)
        )


def sign(secret: bytes, timestamp: str, body: bytes) -> str:
    """Return the signature of a body sent at a time."""
    return hmac.new(secret, f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()
