"""Alerts on their way out: a queue on disk, one after the other, retried within bounds.

Rules:
    1. What ``post`` has returned from is on disk and goes out, over restarts too, in order.
    2. A message goes again after pauses that grow to ``LAST_PAUSE_S``, until it is taken, until
       the other side refuses it for good, or for ``GIVE_UP_S`` since it was queued.
    3. What was given up is set aside in a file with its reason, counted, and said in one line.

A message that was taken just before a crash goes out once more; its ``id`` is the same.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from apps.maintenance.edge.outbox import Outbox, Priority
from cluster.errors import InvalidRequestError, UnavailableError

LOG = logging.getLogger(__name__)
CAP_BYTES = 64 * 2**20  # some 100,000 alerts
FIRST_PAUSE_S, LAST_PAUSE_S = 1.0, 300.0
GIVE_UP_S = 72 * 3600.0
IDLE_S = 0.5
Send = Callable[[Mapping[str, object]], None]


class Courier:
    """Delivers what is posted; ``run`` in a thread of its own.

    Args:
        name: For its files and log lines.
        folder: Holds ``NAME.db`` and ``NAME-refused.jsonl``.
        send: Delivers a message, or raises ``UnavailableError`` (go again) or
            ``InvalidRequestError`` (never).
        first_pause_s: After the first failure.
    """

    def __init__(
        self, name: str, folder: Path, send: Send, first_pause_s: float = FIRST_PAUSE_S
    ) -> None:
        self._name, self._send, self._first_pause_s = name, send, first_pause_s
        self._outbox = Outbox(folder / f"{name}.db", CAP_BYTES)
        self._refused = folder / f"{name}-refused.jsonl"
        self._stopping = threading.Event()
        self.num_sent = self.num_refused = 0

    @property
    def num_waiting(self) -> int:
        """Messages that wait."""
        return self._outbox.num_waiting

    def post(self, message: Mapping[str, object]) -> None:
        """Queue a message.

        Raises:
            UnavailableError: The disk has no room.
        """
        body = json.dumps({"queued": time.time(), "message": message}).encode()
        self._outbox.put([(Priority.ALERT, body)])

    def run(self) -> None:
        """Deliver until ``stop``."""
        pause_s = self._first_pause_s
        while not self._stopping.is_set():
            try:
                was_any = self.deliver_one()
            except UnavailableError as error:
                LOG.warning("%s: %s; again in %.0f s", self._name, error, pause_s)
                self._stopping.wait(pause_s)
                pause_s = min(2 * pause_s, LAST_PAUSE_S)
            else:
                pause_s = self._first_pause_s
                if not was_any:
                    self._stopping.wait(IDLE_S)

    def stop(self) -> None:
        """End ``run`` soon; what waits stays on disk."""
        self._stopping.set()

    def close(self) -> None:
        """Close the queue, after ``run`` has ended."""
        self._outbox.close()

    def deliver_one(self) -> bool:
        """Deliver the oldest message; say whether there was one.

        Raises:
            UnavailableError: It was not taken and waits.
        """
        waiting = self._outbox.head(limit=1)
        if not waiting:
            return False
        record = json.loads(waiting[0].body)
        try:
            self._send(record["message"])
            self.num_sent += 1
        except InvalidRequestError as error:
            self._set_aside(record, str(error))
        except UnavailableError as error:
            if time.time() - record["queued"] < GIVE_UP_S:
                raise
            self._set_aside(record, f"given up after {GIVE_UP_S / 3600:.0f} h: {error}")
        self._outbox.acknowledge(waiting[0].seq)
        return True

    def _set_aside(self, record: Mapping[str, object], reason: str) -> None:
        with self._refused.open("ab") as file:
            file.write(json.dumps({**record, "reason": reason}).encode() + b"\n")
        self.num_refused += 1
        LOG.error("%s: message set aside: %s", self._name, reason)
