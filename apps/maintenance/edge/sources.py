"""Where windows come from: a protocol, a CSV file that grows, and this process.

A window is one row: the features of one machine at one time, as the bundle names them.  A
value that is not there stays absent and is never filled: where the model cannot do without
it, the window is counted and left out.
"""

import csv
import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from apps.maintenance.edge.durable import write_whole
from cluster.errors import ConfigurationError

MACHINE, TIME = "machine", "time"


@dataclass(frozen=True, slots=True)
class Window:
    """What is known of a machine at a time.

    Args:
        machine: Its name.
        time: Of the window's end, ISO 8601.
        features: Value by name; a missing one is absent.
    """

    machine: str
    time: str
    features: Mapping[str, float]


class Source(Protocol):
    """Anything that yields windows."""

    def poll(self, limit: int) -> Sequence[Window]:
        """Return windows that have come, oldest first; none if none has.

        Raises:
            ConfigurationError: What came can never be read.
        """
        ...

    def commit(self) -> None:
        """Let go of what was polled: its forecasts are on disk."""
        ...


class MemorySource:
    """Windows of this process, such as those a module for MQTT makes."""

    def __init__(self) -> None:
        self._waiting: deque[Window] = deque()
        self._num_polled = 0

    def add(self, windows: Sequence[Window]) -> None:
        """Add windows; may be called from another thread."""
        self._waiting.extend(windows)

    def poll(self, limit: int) -> Sequence[Window]:
        """Return windows that have come."""
        self._num_polled = min(limit, len(self._waiting))
        return [self._waiting[idx] for idx in range(self._num_polled)]

    def commit(self) -> None:
        """Let go of what was polled."""
        for _ in range(self._num_polled):
            self._waiting.popleft()
        self._num_polled = 0


class CsvTail:
    """Lines that are appended to a CSV file: machine, time, then features by name.

    The place up to which lines were handled is kept beside the state, so a restart neither
    skips nor repeats a line.  A file that was replaced is read from its start.

    Args:
        path: The file; may appear later.
        place: File that keeps the place.
    """

    def __init__(self, path: Path, place: Path) -> None:
        self._path = path
        self._place_path = place
        self._place = _Place(0, 0)
        if place.exists():
            self._place = _Place(**json.loads(place.read_bytes()))
        self._next = self._place

    def poll(self, limit: int) -> Sequence[Window]:
        """Return windows of whole lines that were appended."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            inode = self._path.stat().st_ino
            header = file.readline()
            is_other = inode != self._place.inode or self._path.stat().st_size < self._place.offset
            offset = len(header) if is_other else max(self._place.offset, len(header))
            if not header.endswith(b"\n"):
                return []
            file.seek(offset)
            lines: list[bytes] = []
            while len(lines) < limit and (line := file.readline()).endswith(b"\n"):
                lines.append(line)
                offset += len(line)
        self._next = _Place(inode, offset)
        names = next(csv.reader([header.decode()]))
        return [self._window(names, line) for line in lines]

    def commit(self) -> None:
        """Remember that these lines were handled."""
        if self._next != self._place:
            record = {"inode": self._next.inode, "offset": self._next.offset}
            write_whole(self._place_path, json.dumps(record).encode())
            self._place = self._next

    def _window(self, names: Sequence[str], line: bytes) -> Window:
        cells = dict(zip(names, next(csv.reader([line.decode(errors="replace")])), strict=False))
        if MACHINE not in cells or TIME not in cells:
            message = f"{self._path.name}: expected columns machine and time, got {names}"
            raise ConfigurationError(message)
        machine, time = cells.pop(MACHINE), cells.pop(TIME)
        values = {name: _number(text) for name, text in cells.items()}
        return Window(
            machine, time, {key: each for key, each in values.items() if each is not None}
        )


@dataclass(frozen=True, slots=True)
class _Place:
    inode: int
    offset: int


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
