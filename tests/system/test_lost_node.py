"""A node is lost under the fraud stream, and nobody who calls the platform notices."""

from typing import Any

import pytest

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]


@pytest.mark.kafka
def test_a_lost_node_costs_no_call_no_decision_and_no_bit_of_a_feature() -> None:
    """Three nodes with a worker each; one with a replica loses its power, and its disk."""
    from benchmarks.fault_nodes import lose_node
    from benchmarks.fault_stream import Flow

    figures: Any = lose_node(Flow(transactions=2500, rate_tx_s=150.0))
    assert (figures["probe"]["failed"], figures["stream"]["worker_failures"]) == (0, [])
    assert figures["stream"]["decided"] == figures["stream"]["equal"] == 2500
    assert figures["stream"]["worker_restarts"] > 0
