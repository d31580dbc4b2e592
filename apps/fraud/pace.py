"""How soon after one request the next may leave: a multiple of what the model just took.

Every request has a fixed cost, so many small ones keep the model busy without helping
anybody.  Requests that are ``spacing`` round trips apart leave it free for the rest of the
time; when events come faster, requests grow instead of queueing.  The same rule gives some
50 ms on two CPU cores and a few milliseconds on a GPU.
"""

SPACING = 1.0  # round trips; 1,500 tx/s on two cores, docs/log.md#stalls
_FIRST_MS = 10.0  # before anything was measured
_LONGEST_MS = 100.0  # a slow answer must not hold the stream back for long
_MEMORY = 0.8  # weight of the past per request


class Pace:
    """The shortest time between two requests."""

    def __init__(self, spacing: float = SPACING) -> None:
        self._spacing = spacing
        self._round_trip_ms = _FIRST_MS / spacing

    @property
    def gap_ms(self) -> float:
        """Milliseconds from one request to the next, at least."""
        return min(self._spacing * self._round_trip_ms, _LONGEST_MS)

    def observe(self, round_trip_ms: float) -> None:
        """Learn from one answered request."""
        self._round_trip_ms += (1.0 - _MEMORY) * (round_trip_ms - self._round_trip_ms)
