"""What happened on a box, by name: on its disk for who stands before it, and on its way home."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from apps.maintenance.edge.outbox import Outbox, Priority
from cluster.errors import UnavailableError

MAX_LOG_BYTES = 2**20  # of the file; the one before it is kept too


class EventLog:
    """Appends events to a file and to the outbox.

    Args:
        path: The file, one JSON object per line.
        outbox: Takes what is to be uploaded.
        now: Returns the time of the local clock.
    """

    def __init__(
        self, path: Path, outbox: Outbox, now: Callable[[], datetime] | None = None
    ) -> None:
        self._path = path
        self._outbox = outbox
        self._now = now or (lambda: datetime.now(UTC))

    def add(self, event: str, detail: str = "", **facts: object) -> None:
        """Record an event; a disk without room costs the record, not the caller."""
        record = {"kind": "event", "event": event, "detail": detail, **facts}
        record["time"] = self._now().isoformat(timespec="seconds")
        line = json.dumps(record).encode()
        try:
            self._append(line + b"\n")
            self._outbox.put([(Priority.EVENT, line)])
        except (OSError, UnavailableError):
            return

    def tail(self, limit: int) -> Sequence[Mapping[str, Any]]:
        """Return the newest events, oldest first."""
        return read_events(self._path)[-limit:]

    def _append(self, line: bytes) -> None:
        if self._path.exists() and self._path.stat().st_size > MAX_LOG_BYTES:
            self._path.replace(self._path.with_suffix(".old"))
        with self._path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def read_events(path: Path) -> Sequence[Mapping[str, Any]]:
    """Return the events in a file; a line that a kill cut short is passed over."""
    found: list[Mapping[str, Any]] = []
    if not path.exists():
        return found
    for line in path.read_bytes().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
