"""The least value noted lately: a sliding minimum.  Pure arithmetic."""

from collections import deque

import numpy as np


class RecentMinimum:
    """The least of the values noted within a stretch of time.

    A value stays only until a later one is as low, so a read is the first that is not too old.

    Args:
        memory_s: Length of the stretch.
    """

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._rising: deque[tuple[float, float]] = deque()  # value, when; both rise

    def note(self, value: float, now: float) -> None:
        """Add a value."""
        while self._rising and self._rising[-1][0] >= value:
            self._rising.pop()
        self._rising.append((value, now))

    def least(self, now: float) -> float:
        """Return the least value of the stretch that ends now, infinite if there is none."""
        while self._rising and now - self._rising[0][1] >= self._memory_s:
            self._rising.popleft()
        return self._rising[0][0] if self._rising else np.inf
