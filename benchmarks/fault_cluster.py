"""A Ray cluster of several nodes on this machine, that can lose, gain and drain nodes.

Each node has a loopback address of its own, so that proxies and drivers can tell them apart.
Started through ``ray.cluster_utils``; the environment is prepared before Ray is imported, and
what only this cluster needs of it is taken back at the end.
"""

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from unittest.mock import patch

from apps.fraud.brokers import free_ports
from cluster.errors import ConfigurationError
from cluster.membership import NAMESPACE
from cluster.platform import prepare_environment

if TYPE_CHECKING:
    from ray._private.node import Node

_OBJECT_STORE_BYTES = 100 * 2**20
_CHECKS = {  # a dead node is lost after 3 s, a frozen one after 12; Ray's own 3000, 10000 and 5
    "RAY_health_check_period_ms": 1000,  # make it 15 and 65 (docs/log.md#faults)
    "RAY_health_check_timeout_ms": 3000,
    "RAY_health_check_failure_threshold": 3,
}
_DRAIN_S = 90  # what a node that is drained is given


class FaultCluster:
    """Nodes that start and end with the block.

    Args:
        num_nodes: Nodes at the beginning, the head among them.
        head_cpus: Logical CPUs of the head; without any it gets no work.
        redis_address: HOST:PORT of a Redis that keeps the state of the head; None keeps it there.

    Attributes:
        http_ports: Port of the proxy of each node but the head, by Ray's id.
    """

    def __init__(
        self,
        num_nodes: int,
        *,
        head_cpus: int = 4,
        redis_address: str | None = None,
    ) -> None:
        self._environment = {name: os.environ.get(name, str(n)) for name, n in _CHECKS.items()}
        if redis_address is not None:
            self._environment["RAY_REDIS_ADDRESS"] = redis_address
        self._num_nodes, self._head_cpus = num_nodes, head_cpus
        (self._gcs_port,) = free_ports(1)
        self._num_started = 0
        self._frozen: dict[str, list[int]] = {}
        self.http_ports: dict[str, int] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            prepare_environment()
            stack.enter_context(patch.dict(os.environ, self._environment))
            from ray.cluster_utils import Cluster  # noqa: PLC0415 - reads the environment

            self._cluster = Cluster()
            stack.callback(self._cluster.shutdown)
            stack.callback(lambda: [self.lose(node_id) for node_id in list(self._frozen)])
            self.start_head()
            for _ in range(self._num_nodes - 1):
                self.add()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def address(self) -> str:
        """HOST:PORT of the head."""
        return f"127.0.0.1:{self._gcs_port}"

    @property
    def workers(self) -> dict[str, "Node"]:
        """The nodes beside the head, by Ray's id."""
        return {node.node_id: node for node in self._cluster.worker_nodes}

    def start_head(self) -> None:
        """Start the head, at the same address each time."""
        self._add("127.0.0.1", num_cpus=self._head_cpus, gcs_server_port=self._gcs_port)

    def lose_head(self) -> None:
        """Kill all processes of the head at once."""
        head: Any = self._cluster.head_node
        self._cluster.remove_node(head, allow_graceful=False)

    def add(self) -> str:
        """Start one more node and return its id."""
        self._num_started += 1
        (port,) = free_ports(1)
        with patch.dict(os.environ, {"RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(port)}):
            node = self._add(f"127.0.0.{self._num_started + 1}", num_cpus=4)
        self.http_ports[node.node_id] = port
        return str(node.node_id)

    def _add(self, host: str, **options: Any) -> Any:  # noqa: ANN401 - Ray's nodes have no type
        return self._cluster.add_node(
            node_ip_address=host,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            **options,
        )

    def lose(self, node_id: str) -> None:
        """Kill all processes of a node at once."""
        for pid in self._frozen.pop(node_id, ()):  # they cannot see the end of their raylet
            os.kill(pid, signal.SIGKILL)
        self._cluster.remove_node(self.workers[node_id], allow_graceful=False)

    def freeze(self, node_id: str) -> None:
        """Stop all processes of a node: nothing answers, and no connection is closed.

        That is what others see of a power cut or of a network that is cut.
        """
        infos = [info for each in self.workers[node_id].all_processes.values() for info in each]
        pids = [pid for info in infos for pid in _family(info.process.pid)]
        self._frozen[node_id] = pids
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)

    def drain(self, node_id: str) -> None:
        """Tell Ray that a node will go, as an autoscaler does before it takes a machine away.

        Raises:
            ConfigurationError: Ray refuses.
        """
        from ray._raylet import GcsClient  # type: ignore[attr-defined]  # noqa: PLC0415 - compiled
        from ray.core.generated import autoscaler_pb2  # noqa: PLC0415

        reason = autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION  # type: ignore[attr-defined]
        until_ms = int(1000 * (time.time() + _DRAIN_S))
        client = GcsClient(address=self.address)
        is_accepted, why = client.drain_node(node_id, reason, "replaced", until_ms)
        if not is_accepted:
            message = f"node {node_id}: expected Ray to drain it, got {why}"
            raise ConfigurationError(message)

    def remove(self, node_id: str) -> None:
        """End a node in the orderly way."""
        self._cluster.remove_node(self.workers[node_id], allow_graceful=True)

    @contextmanager
    def driver_on(self, node_id: str) -> Iterator[None]:
        """Connect this process through a node that is not the head."""
        import ray  # noqa: PLC0415 - as above

        ray.init(
            address=self.address,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address=self.workers[node_id].node_ip_address,
        )
        try:
            yield
        finally:
            ray.shutdown()


def _family(pid: int) -> list[int]:
    """Return a process and its descendants."""
    listed = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for path in listed for child in path.read_text().split()]
    return [pid, *(each for child in children for each in _family(child))]
