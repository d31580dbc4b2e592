"""The health watch after a switch: what a model must show before it is kept.

The window is measured on a monotonic clock, so a jump of the calendar neither ends nor extends
it.  A restart begins it anew; how often that may happen is counted in ``slots``.

Knows: counts and times.  Does not know: models, slots, where forecasts come from.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from apps.maintenance.sync.outcomes import Outcome

MIN_SLOW = 2  # requests above the limit that are an accident of the machine, however few there are
MIN_WINDOWS = 5  # of the plant, below which their share of alerts says nothing even at the end
SLOW_SHARE = 0.01  # beyond that, the limit is one of the 99th percentile


@dataclass(frozen=True, slots=True)
class HealthLimits:
    """What a model may do while it is watched.

    Args:
        window_s: How long it is watched; a bad model is gone by the end of it.
        min_forecasts: Requests to be seen in it; missing ones are made up from the golden batch.
        max_error_share: Requests that may fail.
        max_p99_ms: Latency of a request, 99th percentile.
        min_alert_windows: Windows from which the share of alerts ends the watch at once.
    """

    window_s: float = 600.0
    min_forecasts: int = 30
    max_error_share: float = 0.0
    max_p99_ms: float = 10.0
    min_alert_windows: int = 20


class HealthWatch:
    """What was seen since a switch.

    Args:
        limits: What is allowed.
        max_alert_share: Share of windows with an alert, as the bundle states it.
        clock: Returns now, seconds, monotonic.
    """

    def __init__(
        self,
        limits: HealthLimits,
        max_alert_share: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._max_alert_share = max_alert_share
        self._clock = clock
        self._end_s = clock() + limits.window_s
        self._num_answers = 0
        self._num_slow = 0
        self._num_errors = 0
        self._num_windows = 0
        self._num_alerts = 0
        self._num_insane = 0

    def note(self, took_ms: float, *, num_windows: int, num_alerts: int, num_insane: int) -> None:
        """Take in a request that was answered.

        Args:
            took_ms: By the model.
            num_windows: Of the plant; none of the golden batch, whose alerts are known.
            num_alerts: Windows with an alert.
            num_insane: Windows without a usable forecast.
        """
        self._num_answers += 1
        self._num_slow += took_ms > self._limits.max_p99_ms
        self._num_windows += num_windows
        self._num_alerts += num_alerts
        self._num_insane += num_insane

    def note_error(self) -> None:
        """Take in a request that failed."""
        self._num_errors += 1

    @property
    def num_missing(self) -> int:
        """Requests to be seen yet."""
        return max(0, self._limits.min_forecasts - self._num_answers - self._num_errors)

    @property
    def is_over(self) -> bool:
        """Whether the window has ended."""
        return self._clock() >= self._end_s

    def verdict(self) -> tuple[Outcome, str] | None:
        """Return how the watch ends, and why; None while it goes on.

        A fault ends it as soon as it is one; it ends well only with the window.
        """
        limits, seen = self._limits, self._num_answers + self._num_errors
        if self._num_insane:
            return Outcome.HEALTH_OUTPUT, f"{self._num_insane} windows without a usable forecast"
        if self._num_errors > limits.max_error_share * max(seen, limits.min_forecasts):
            return Outcome.HEALTH_ERRORS, f"{self._num_errors} of {seen} requests failed"
        share = self._num_alerts / max(self._num_windows, 1)
        enough = MIN_WINDOWS if self.is_over else limits.min_alert_windows
        if self._num_windows >= enough and share > self._max_alert_share:
            detail = f"alerts in {share:.0%} of {self._num_windows} windows"
            return Outcome.HEALTH_ALERTS, f"{detail}, expected {self._max_alert_share:.0%} at most"
        if self._num_slow > max(MIN_SLOW, SLOW_SHARE * seen):
            detail = f"{self._num_slow} of {seen} requests took more than {limits.max_p99_ms:g} ms"
            return Outcome.HEALTH_LATENCY, detail
        if self.is_over and not self.num_missing:
            return Outcome.CONFIRMED, f"{seen} requests, alerts in {share:.0%} of windows"
        return None
