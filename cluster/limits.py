"""How much a tenant may ask for: token buckets over requests and rows, bytes in flight.

Pure policy: numbers in, a refusal out; no HTTP, no ray.  A bucket holds what
``BURST_S`` seconds of its rate allow.  What costs more than a bucket holds waits for a
full one and leaves it in debt, so that it passes at last and the average still holds.

The counts live in one process.  The gateway is one replica for that reason
(docs/adr/0006).
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from cluster.caller import Caller, Rate
from cluster.errors import QueueFullError, RateLimitError

BURST_S: Final = 2.0  # a client that sends once a second, a little late, is not refused
MIN_BURST: Final = 1.0
Clock = Callable[[], float]


class TokenBucket:
    """A rate with some room for bursts.

    Args:
        per_s: What flows in.
        clock: Returns now, seconds, monotonic.
    """

    def __init__(self, per_s: float, clock: Clock) -> None:
        self._per_s = per_s
        self._capacity = max(per_s * BURST_S, MIN_BURST)
        self._level = self._capacity
        self._clock = clock
        self._filled_at = clock()

    def take(self, cost: float) -> float:
        """Take that much and return 0, or take nothing and return the seconds to wait."""
        now = self._clock()
        flown_in = (now - self._filled_at) * self._per_s
        self._level = min(self._capacity, self._level + flown_in)
        self._filled_at = now
        needed = min(cost, self._capacity)
        if self._level >= needed:
            self._level -= cost
            return 0.0
        return (needed - self._level) / self._per_s


class RateLimits:
    """The buckets of all tenants.

    Args:
        clock: Returns now, seconds, monotonic.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[Rate, TokenBucket, TokenBucket]] = {}

    def take_request(self, caller: Caller) -> None:
        """Count one request of a caller.

        Raises:
            RateLimitError: The tenant has none left.
        """
        if caller.tenant is not None and caller.rate is not None:
            requests, _ = self._buckets_of(caller.tenant, caller.rate)
            _refuse_above(
                requests.take(1), caller.tenant, f"{caller.rate.requests_per_s:g} requests"
            )

    def take_rows(self, caller: Caller, num_rows: int) -> None:
        """Count the rows of a caller's request.

        Raises:
            RateLimitError: The tenant has not as many left.
        """
        if caller.tenant is not None and caller.rate is not None:
            _, rows = self._buckets_of(caller.tenant, caller.rate)
            _refuse_above(rows.take(num_rows), caller.tenant, f"{caller.rate.rows_per_s:g} rows")

    def _buckets_of(self, tenant: str, rate: Rate) -> tuple[TokenBucket, TokenBucket]:
        found = self._buckets.get(tenant)
        if found is None or found[0] != rate:  # the key file may have changed
            requests = TokenBucket(rate.requests_per_s, self._clock)
            rows = TokenBucket(rate.rows_per_s, self._clock)
            found = self._buckets[tenant] = (rate, requests, rows)
        return found[1], found[2]


class BytesInFlight:
    """The bodies that are held in memory at once, in total and per tenant.

    Args:
        total: Bytes of all at most.
        per_tenant: Bytes of one tenant at most.
    """

    def __init__(self, total: int, per_tenant: int) -> None:
        self._total = total
        self._per_tenant = per_tenant
        self._held: Counter[str] = Counter()

    @contextmanager
    def reserve(self, tenant: str) -> Iterator[Callable[[int], None]]:
        """Yield a function that takes bytes; all are given back at the end.

        It raises ``QueueFullError`` when there is no room.
        """
        taken = 0

        def take(num_bytes: int) -> None:
            nonlocal taken
            theirs = self._held[tenant] + num_bytes
            if theirs > self._per_tenant or self._held.total() + num_bytes > self._total:
                message = (
                    f"tenant {tenant}: expected at most {self._per_tenant} bytes of bodies at once "
                    f"and {self._total} of all tenants, got more; send fewer at once"
                )
                raise QueueFullError(message)
            self._held[tenant] = theirs
            taken += num_bytes

        try:
            yield take
        finally:
            self._held[tenant] -= taken
            if not self._held[tenant]:
                del self._held[tenant]


def _refuse_above(wait_s: float, tenant: str, rate: str) -> None:
    if wait_s > 0:
        message = f"tenant {tenant}: expected at most {rate} per second, got more"
        raise RateLimitError(message + f"; come back in {wait_s:.1f} s", wait_s)
