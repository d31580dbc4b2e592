"""Who is alive: every driver and worker holds a lease, a locked file that it writes to.

A process that ends, however, loses the kernel's lock on its file, and all others see it at
once.  One that is stopped, swapped out or cut off keeps the lock, but its file no longer
changes: it is presumed dead after a while, and what it still does is fenced off (``claims``).
How long a file has not changed is measured by the observer's clock, so clocks may differ.
"""

import fcntl
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

BEATS_PER_LEASE = 5


class Lease:
    """Held while the block runs; the file is gone behind it.

    Args:
        folder: Of all leases; made if there is none.
        name: Of this process, never used before.
        lease_s: How long others believe in a file that does not change.
    """

    def __init__(self, folder: Path, name: str, lease_s: float) -> None:
        self._path = folder / name
        self._period_s = lease_s / BEATS_PER_LEASE
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        self._fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.rename(self._path)  # so nobody ever sees it without the lock
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)
        os.close(self._fd)

    def _beat(self) -> None:
        count = 0
        while True:
            count += 1
            os.pwrite(self._fd, b"%012d" % count, 0)
            os.fsync(self._fd)  # or a file server would not know
            if self._ending.wait(self._period_s):
                return


class _Seen(NamedTuple):
    """Content of a lease file, and since when it has been that."""

    content: bytes
    since_s: float


class LeaseWatch:
    """Tells who holds a lease.

    Args:
        folder: Of all leases.
        lease_s: A file that has not changed for longer is believed in no more.
        clock: Returns now, seconds, monotonic.
    """

    def __init__(
        self, folder: Path, lease_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = folder
        self._lease_s = lease_s
        self._clock = clock
        self._seen: dict[str, _Seen] = {}

    def is_held(self, name: str) -> bool:
        """Tell whether a process is alive, as far as this one has seen."""
        try:
            content = _content_if_locked(self._folder / name)
        except FileNotFoundError:
            content = None
        if content is None:
            self._seen.pop(name, None)
            return False
        now = self._clock()
        seen = self._seen.get(name)
        if seen is None or seen.content != content:
            self._seen[name] = _Seen(content, now)
            return True
        return now - seen.since_s <= self._lease_s

    def sweep(self) -> None:
        """Remove the files of processes that ended without doing so."""
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):  # another driver sweeps too
                if _content_if_locked(path) is None:
                    path.unlink()


def _content_if_locked(path: Path) -> bytes | None:
    with path.open("rb", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read()
        return None
