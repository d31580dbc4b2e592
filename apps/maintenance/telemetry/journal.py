"""What came in, on disk before it is acknowledged: numbered segments of JSON lines.

Rules:
    1. What ``append`` has returned from survives a kill and a power cut.
    2. A segment is read only once it is closed, and its number is never used again.
    3. A line that a crash has cut short was never acknowledged; it is left out.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apps.maintenance.edge.durable import sync_directory
from apps.maintenance.telemetry.messages import Message

SUFFIX = ".jsonl"


class Journal:
    """The segments of one folder; of one thread.

    Args:
        folder: Theirs; made if there is none.
        first: Smallest number that may be used.
    """

    def __init__(self, folder: Path, first: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._fd: int | None = None
        self._number = max([first - 1, *self.segments()]) + 1

    def segments(self) -> list[int]:
        """Return the numbers of the segments on disk, in order."""
        return sorted(int(path.stem) for path in self._folder.glob(f"*{SUFFIX}"))

    def append(self, messages: Sequence[Message]) -> None:
        """Put messages on disk.

        Raises:
            OSError: The disk is full or closed to us; none of them counts as taken.
        """
        if self._fd is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            self._fd = os.open(self._path(self._number), flags, 0o644)
            sync_directory(self._folder)
        lines = [_encode(each) for each in messages]
        try:
            _write_all(self._fd, b"".join(lines))
            os.fsync(self._fd)
        except OSError:
            self.close()  # what was written of them ends this segment
            raise

    def close(self) -> None:
        """End the segment; the next message begins another."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            self._number += 1

    def read(self, number: int) -> tuple[list[Message], int]:
        """Return the messages of a segment, and how many lines could not be read."""
        found, damaged = [], 0
        for line in self._path(number).read_bytes().split(b"\n")[:-1]:
            try:
                record: dict[str, Any] = json.loads(line)
                found.append(Message(**record))
            except (TypeError, ValueError):
                damaged += 1
        return found, damaged

    def drop(self, number: int) -> None:
        """Let go of a segment that lies elsewhere by now."""
        self._path(number).unlink()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}{SUFFIX}"


def _encode(message: Message) -> bytes:
    record = {
        "kind": message.kind,
        "machine": message.machine,
        "time_s": message.time_s,
        "facts": dict(message.facts),
    }
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
