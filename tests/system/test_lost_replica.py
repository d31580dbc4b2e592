"""A replica is lost under load, and nobody who calls the platform notices."""

from typing import Any

import pytest

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]


def test_a_killed_replica_costs_no_call_and_is_replaced() -> None:
    """SIGKILL of one of two replicas while a client with retries goes on calling."""
    from benchmarks.fault_replica import lose_replicas

    figures: Any = lose_replicas(1, calm_s=1.5)
    assert (figures["failed"], figures["errors"]) == (0, {})
    assert figures["calls"] > 60
    assert figures["recovery_s"][0] < 30
