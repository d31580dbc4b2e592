"""What a box says to the platform: its report, and the messages that waited.

    POST <cloud>/fleet/<agent>/report    facts -> {"wanted": name of a bundle or null}
    POST <cloud>/fleet/<agent>/messages  {"messages": [{"seq": n, "body": {...}}]}
                                         -> {"acknowledged": n}

A message is let go of once the platform has acknowledged it; one that was sent twice has the
same number, so the platform keeps it once.
"""

import http.client
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from apps.maintenance.edge.outbox import Outbox
from apps.maintenance.sync.connection import open_connection
from cluster.errors import ConfigurationError, UnavailableError

MAX_ANSWER_BYTES = 64 * 1024
STALL_S = 10.0
REQUEST_S = 30.0
DRAIN_S = 60.0  # of one drain; what is left goes with the next


@dataclass(frozen=True, slots=True)
class Uplink:
    """The way to the platform.

    Args:
        cloud: Root URL of the sync server.
        agent: Name of this box.

    Raises:
        ConfigurationError: The URL is not an http(s) one.
    """

    cloud: str
    agent: str

    def __post_init__(self) -> None:
        parts = urlsplit(self.cloud)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            message = f"cloud: expected http://HOST:PORT or https://HOST:PORT, got {self.cloud!r}"
            raise ConfigurationError(message)

    def report(self, facts: Mapping[str, object]) -> str | None:
        """Say how this box is; return the bundle it should take, if any.

        Raises:
            UnavailableError: The platform cannot be reached, or answers something else.
        """
        wanted = self.post("report", json.dumps(facts).encode()).get("wanted")
        return wanted if isinstance(wanted, str) else None

    def drain(self, outbox: Outbox) -> int:
        """Send what waits, in order; return how many messages were acknowledged.

        Raises:
            UnavailableError: The platform cannot be reached; what it has not acknowledged waits.
        """
        num, end_s = 0, time.monotonic() + DRAIN_S
        while time.monotonic() < end_s and (waiting := outbox.head()):
            lines = [b'{"seq":%d,"body":%s}' % (each.seq, each.body) for each in waiting]
            answer = self.post("messages", b'{"messages":[%s]}' % b",".join(lines))
            seq = answer.get("acknowledged")
            if not isinstance(seq, int) or not waiting[0].seq <= seq <= waiting[-1].seq:
                expected = f"{waiting[0].seq} to {waiting[-1].seq}"
                message = f"{self.cloud}: expected acknowledged of {expected}, got {seq!r:.40}"
                raise UnavailableError(message)
            outbox.acknowledge(seq)
            num += sum(each.seq <= seq for each in waiting)
        return num

    def post(self, what: str, body: bytes) -> Mapping[str, Any]:
        """Send a JSON object and return the one that answers.

        Raises:
            UnavailableError: The platform cannot be reached, or answers something else.
        """
        path = f"{urlsplit(self.cloud).path.rstrip('/')}/fleet/{quote(self.agent, safe='')}/{what}"
        try:
            with open_connection(self.cloud, STALL_S, time.monotonic() + REQUEST_S) as connection:
                connection.request("POST", path, body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                data = answer.read(MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            message = f"{self.cloud}: expected an answer, got {error!r:.120}"
            raise UnavailableError(message) from error
        if answer.status != http.HTTPStatus.OK:
            message = f"{self.cloud}: expected HTTP 200, got {answer.status}: {data[:120]!r}"
            raise UnavailableError(message)
        try:
            found = json.loads(data)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            message = f"{self.cloud}: expected a JSON object, got {data[:60]!r}"
            raise UnavailableError(message)
        return found
