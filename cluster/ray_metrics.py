"""Metrics through Ray: recorded in any process of the cluster, read from the node's agent.

Every Ray node has an agent, with the dashboard or without, that gathers what the node's
processes record and serves it on the port ``MetricsExportPort`` of its node; measured on
Ray 2.60 with ``include_dashboard=False``: there within 10 s, 300 KB with Ray's own
metrics.  So the page is fetched from there rather than made a second time.  It is one
node's page: Prometheus scrapes every agent of a cluster, or this door on one machine.
"""

import asyncio
import http.client
from collections.abc import Mapping
from typing import Any

import ray
from ray.util import metrics

from cluster.errors import UnavailableError
from cluster.metrics import METRICS, Kind

TIMEOUT_S = 5.0
MAX_PAGE_BYTES = 32 * 2**20


class RayRecorder:
    """Records through Ray, inside any process of the cluster.

    Each node's metric agent serves what its processes recorded, a few seconds late and
    with the prefix ``ray_``.
    """

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def record(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """Record the measurement (see ``Recorder``)."""
        made = self._made.get(name)
        if made is None:
            made = self._made[name] = _make(name)
        match METRICS[name].kind:
            case Kind.COUNTER:
                made.inc(value, dict(labels))
            case Kind.GAUGE:
                made.set(value, dict(labels))
            case Kind.HISTOGRAM:
                made.observe(value, dict(labels))


async def fetch_metrics_page() -> bytes:
    """Return the page.

    Raises:
        UnavailableError: The agent does not answer.
    """
    return await asyncio.to_thread(_fetch)


def _fetch() -> bytes:
    node = _this_node()
    address = f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        page = answer.read(MAX_PAGE_BYTES)
    except (OSError, http.client.HTTPException) as error:
        message = f"metric agent {address}: expected a page, got {type(error).__name__}"
        raise UnavailableError(message) from error
    finally:
        connection.close()
    if answer.status != http.client.OK:
        message = f"metric agent {address}: expected a page, got HTTP {answer.status}"
        raise UnavailableError(message)
    return page


def _this_node() -> Mapping[str, Any]:
    here = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == here:
            found: Mapping[str, Any] = node
            return found
    message = "metric agent: expected this node among Ray's nodes, it is not"
    raise UnavailableError(message)


def _make(name: str) -> Any:  # noqa: ANN401 - three kinds without a common type
    metric = METRICS[name]
    match metric.kind:
        case Kind.COUNTER:
            return metrics.Counter(name, metric.help, metric.labels)
        case Kind.GAUGE:
            return metrics.Gauge(name, metric.help, metric.labels)
        case Kind.HISTOGRAM:
            return metrics.Histogram(name, metric.help, list(metric.bounds), metric.labels)
