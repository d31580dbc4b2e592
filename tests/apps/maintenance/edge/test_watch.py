"""The health watch: every fault ends it, nothing but a whole window ends it well."""

import pytest

from apps.maintenance.edge.watch import HealthLimits, HealthWatch
from apps.maintenance.sync.outcomes import Outcome

LIMITS = HealthLimits(
    window_s=60, min_forecasts=10, max_error_share=0.1, max_p99_ms=5, min_alert_windows=20
)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def watch_after(
    num: int, *, took_ms: float = 1.0, num_alerts: int = 0, num_insane: int = 0, num_errors: int = 0
) -> tuple[HealthWatch, Clock]:
    clock = Clock()
    watch = HealthWatch(LIMITS, 0.25, clock)
    for _ in range(num):
        watch.note(took_ms, num_windows=4, num_alerts=num_alerts, num_insane=num_insane)
    for _ in range(num_errors):
        watch.note_error()
    return watch, clock


def test_it_ends_well_with_the_window_and_not_before() -> None:
    watch, clock = watch_after(10, num_alerts=1)
    assert watch.verdict() is None
    clock.now_s += 59.9
    assert watch.verdict() is None
    clock.now_s += 0.2
    verdict = watch.verdict()
    assert verdict is not None
    assert verdict[0] is Outcome.CONFIRMED


def test_too_few_requests_are_not_enough_even_after_the_window() -> None:
    watch, clock = watch_after(9)
    clock.now_s += 100
    assert watch.is_over
    assert watch.num_missing == 1
    assert watch.verdict() is None


@pytest.mark.parametrize(
    ("seen", "outcome"),
    [
        ({"num": 1, "num_insane": 1}, Outcome.HEALTH_OUTPUT),
        ({"num": 8, "num_errors": 2}, Outcome.HEALTH_ERRORS),
        ({"num": 5, "num_alerts": 2}, Outcome.HEALTH_ALERTS),
        ({"num": 3, "took_ms": 6.0}, Outcome.HEALTH_LATENCY),
    ],
)
def test_a_fault_ends_it_at_once(seen: dict[str, float], outcome: Outcome) -> None:
    watch, _ = watch_after(**seen)  # type: ignore[arg-type]
    verdict = watch.verdict()
    assert verdict is not None
    assert verdict[0] is outcome


def test_few_windows_count_at_the_end_and_very_few_do_not() -> None:
    watch, clock = watch_after(2, num_alerts=4)
    for _ in range(8):
        watch.note(1.0, num_windows=0, num_alerts=0, num_insane=0)  # the golden batch
    assert watch.verdict() is None
    clock.now_s += 61
    verdict = watch.verdict()
    assert verdict is not None
    assert verdict[0] is Outcome.HEALTH_ALERTS
    watch, clock = watch_after(1, num_alerts=4)
    for _ in range(9):
        watch.note(1.0, num_windows=0, num_alerts=0, num_insane=0)
    clock.now_s += 61
    verdict = watch.verdict()
    assert verdict is not None
    assert verdict[0] is Outcome.CONFIRMED


@pytest.mark.parametrize(
    "seen",
    [
        {"num": 9, "num_errors": 1},  # a tenth may fail
        {"num": 4, "num_alerts": 4},  # 16 windows say nothing yet
        {"num": 2, "took_ms": 6.0},  # the machine, not the model
        {"num": 5, "num_alerts": 1},
    ],
)
def test_what_is_within_the_limits_goes_on(seen: dict[str, float]) -> None:
    watch, _ = watch_after(**seen)  # type: ignore[arg-type]
    assert watch.verdict() is None
