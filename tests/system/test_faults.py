"""Parts of the platform are lost under load, and nobody who calls it notices."""

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


@pytest.mark.kafka
def test_a_lost_node_costs_no_call_no_decision_and_no_bit_of_a_feature() -> None:
    """Three nodes with a worker each; one with a replica loses its power, and its disk."""
    from benchmarks.fault_nodes import lose_node
    from benchmarks.fault_stream import Flow

    figures: Any = lose_node(Flow(transactions=2500, rate_tx_s=150.0))
    assert (figures["probe"]["failed"], figures["stream"]["worker_failures"]) == (0, [])
    assert figures["stream"]["decided"] == figures["stream"]["equal"] == 2500
    assert figures["stream"]["worker_restarts"] > 0
