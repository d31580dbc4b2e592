"""Fair shares of the tenants of one class: who has had more than its part.

Each tenant has a counter of the work done for it over its weight; the lowest counter of
those that wait is the floor, so that idling saves little up (Sheng et al. 2024,
arXiv:2401.00588).  Pure arithmetic.
"""

from collections import Counter
from collections.abc import Mapping, Set


class TenantShares:
    """Counters of one class.

    Args:
        weights: Share of a tenant, 1 if not named.
        lead_ms: Work by which a tenant may be ahead before it yields.  One that had nothing
            waiting for a moment keeps what it is owed up to twice that.
    """

    def __init__(self, weights: Mapping[str, float], lead_ms: float) -> None:
        self._weights = weights
        self._lead_ms = lead_ms
        self._served_ms: dict[str, float] = {}
        self._num_waiting: Counter[str] = Counter()
        self._floor_ms = 0.0

    def enter(self, tenant: str) -> None:
        """A request of a tenant begins to wait."""
        if not self._num_waiting[tenant]:
            served_ms = self._served_ms.get(tenant, self._floor_ms)
            self._served_ms[tenant] = max(served_ms, self._floor_ms - 2 * self._lead_ms)
        self._num_waiting[tenant] += 1

    def leave(self, tenant: str) -> None:
        """A request of a tenant waits no longer."""
        self._num_waiting[tenant] -= 1
        if not self._num_waiting[tenant]:
            del self._num_waiting[tenant]
            self._raise_floor()

    def charge(self, tenant: str, work_ms: float) -> None:
        """Count work done for a waiting tenant."""
        if work_ms > 0:
            self._served_ms[tenant] += work_ms / self._weights.get(tenant, 1.0)
            self._raise_floor()

    def ahead(self) -> Set[str]:
        """Return the waiting tenants whose counter is above the lowest by more than the lead."""
        waiting = [self._served_ms[tenant] for tenant in self._num_waiting]
        limit_ms = min(waiting, default=0.0) + self._lead_ms
        return {tenant for tenant in self._num_waiting if self._served_ms[tenant] > limit_ms}

    def _raise_floor(self) -> None:
        waiting = [self._served_ms[tenant] for tenant in self._num_waiting]
        self._floor_ms = max(self._floor_ms, min(waiting, default=self._floor_ms))
        for tenant, served_ms in list(self._served_ms.items()):
            if tenant not in self._num_waiting and served_ms < self._floor_ms - 2 * self._lead_ms:
                del self._served_ms[tenant]  # nothing that would be remembered
