"""Token buckets and bytes in flight, with a clock of their own."""

import pytest

from cluster.caller import OPEN_CALLER, Caller, Rate
from cluster.errors import QueueFullError, RateLimitError
from cluster.limits import BURST_S, BytesInFlight, RateLimits, TokenBucket


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_allows_a_burst_then_its_rate() -> None:
    clock = Clock()
    bucket = TokenBucket(10.0, clock)
    assert [bucket.take(1) for _ in range(int(10 * BURST_S))] == [0.0] * 20
    assert bucket.take(1) == pytest.approx(0.1)
    clock.now += 0.1
    assert bucket.take(1) == 0.0
    assert bucket.take(1) > 0
    clock.now += 1000.0
    assert sum(bucket.take(1) == 0.0 for _ in range(100)) == 20  # a rest is not saved up


def test_waiting_as_long_as_was_said_is_enough() -> None:
    clock = Clock()
    bucket = TokenBucket(3.0, clock)
    bucket.take(6)
    clock.now += bucket.take(2)
    assert bucket.take(2) == 0.0


def test_more_than_a_bucket_holds_waits_for_a_full_one_and_is_paid_for() -> None:
    clock = Clock()
    bucket = TokenBucket(10.0, clock)
    assert bucket.take(100) == 0.0
    assert bucket.take(1) == pytest.approx(8.1)  # 80 in debt, 1 more
    clock.now += 8.1
    assert bucket.take(1) == pytest.approx(0.0)


def test_a_refused_request_costs_nothing() -> None:
    clock = Clock()
    bucket = TokenBucket(1.0, clock)
    bucket.take(2)
    waits = {bucket.take(1) for _ in range(50)}
    assert waits == {1.0}


def caller(tenant: str, requests: float = 1.0, rows: float = 10.0) -> Caller:
    return Caller(f"key of {tenant}", tenant, frozenset(), rate=Rate(requests, rows))


def test_tenants_have_their_own_buckets_and_all_keys_of_one_share_them() -> None:
    rates = RateLimits(Clock())
    for _ in range(2):
        rates.take_request(caller("alpha"))
    with pytest.raises(RateLimitError, match=r"tenant alpha: expected at most 1 requests") as full:
        rates.take_request(Caller("another key", "alpha", frozenset(), rate=Rate(1.0, 10.0)))
    assert full.value.retry_after_s == 1.0
    rates.take_request(caller("beta"))


def test_rows_are_counted_apart_from_requests() -> None:
    rates = RateLimits(Clock())
    rates.take_rows(caller("alpha"), 20)
    with pytest.raises(RateLimitError, match="at most 10 rows per second"):
        rates.take_rows(caller("alpha"), 1)
    rates.take_request(caller("alpha"))


def test_a_changed_rate_counts_at_once_and_open_access_is_not_counted() -> None:
    rates = RateLimits(Clock())
    for _ in range(2):
        rates.take_request(caller("alpha"))
    rates.take_request(caller("alpha", requests=5.0))
    for _ in range(1000):
        rates.take_request(OPEN_CALLER)
        rates.take_rows(OPEN_CALLER, 10**9)


def test_bytes_in_flight_are_bounded_per_tenant_and_in_total_and_given_back() -> None:
    room = BytesInFlight(total=100, per_tenant=60)
    with room.reserve("alpha") as take_alpha:
        take_alpha(60)
        with room.reserve("alpha") as take_more, pytest.raises(QueueFullError, match="got more"):
            take_more(1)
        with room.reserve("beta") as take_beta:
            take_beta(40)
            with pytest.raises(QueueFullError, match="100 of all tenants"):
                take_beta(1)
    with room.reserve("alpha") as take:
        take(60)
