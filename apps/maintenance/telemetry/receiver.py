"""From the broker into the history: judged, on disk, then acknowledged, in this order.

Knows: the order of things.  Does not know: what messages mean, what files look like.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from apps.maintenance.telemetry.history import History
from apps.maintenance.telemetry.intake import Intake
from apps.maintenance.telemetry.mqtt import ACKNOWLEDGE, Connection, Delivery

if TYPE_CHECKING:
    from apps.maintenance.telemetry.messages import Message

LOG = logging.getLogger(__name__)
LOOK_S = 0.2
DISK_PAUSE_S = 1.0


class Receiver:
    """Keeps what a connection brings; ``run`` in one thread, ``seal`` from another.

    Args:
        connection: To the broker.
        intake: Judges payloads.
        history: Takes what is to be kept.
        on_acknowledgement: Told topic and payload of what people acknowledge.
    """

    def __init__(
        self,
        connection: Connection,
        intake: Intake,
        history: History,
        on_acknowledgement: Callable[[str, bytes], None],
    ) -> None:
        self._connection, self._intake, self._history = connection, intake, history
        self._on_acknowledgement = on_acknowledgement
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    @property
    def counts(self) -> Mapping[str, int]:
        """What came and what was odd about it."""
        return dict(self._intake.counts)

    def run(self) -> None:
        """Take what comes until ``stop``."""
        while not self._stopping.is_set():
            if batch := self._connection.arrived(LOOK_S):
                self.take(batch)

    def stop(self) -> None:
        """End ``run`` soon."""
        self._stopping.set()

    def take(self, batch: Sequence[Delivery]) -> None:
        """Keep a batch, however long the disk has no room for it, and acknowledge it."""
        is_said = False
        while not self._stopping.is_set():
            try:
                self._keep(batch)
            except OSError as error:
                if not is_said:
                    LOG.warning("history: expected room on the disk, got %s; waiting", error)
                is_said = True
                self._stopping.wait(DISK_PAUSE_S)
            else:
                self._connection.acknowledge(batch)
                return

    def seal(self, until: datetime) -> None:
        """Make all that has come readable; what comes later about that time is late."""
        with self._lock:
            self._history.seal()
            self._history.compact(until)
            self._intake.forecast_until_s = until.timestamp()

    def _keep(self, batch: Sequence[Delivery]) -> None:
        with self._lock:
            kept: list[Message] = []
            is_kept = False
            try:
                for each in batch:
                    if each.topic.endswith(f"/{ACKNOWLEDGE}"):
                        self._on_acknowledgement(each.topic, each.payload)
                    elif (message := self._intake.take(each.topic, each.payload)) is not None:
                        kept.append(message)
                if kept:
                    self._history.append(kept)
                is_kept = True
            finally:
                self._intake.settle(kept, is_kept=is_kept)
