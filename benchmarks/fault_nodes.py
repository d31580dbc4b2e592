"""Nodes that are lost or replaced under the fraud stream, on three nodes of this machine.

Each node carries a worker of the stream, two of them a replica.  Checked: calls of a probe
and of the workers, a decision for every transaction, its features against the offline ones.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from benchmarks.fault_cluster import FaultCluster
from benchmarks.fault_probe import Probe
from benchmarks.fault_replicas import await_replicas, running_replicas
from benchmarks.fault_stream import FaultStream, Flow, fault_stream
from benchmarks.real_kafka import RealKafka
from benchmarks.tiny_model import TINY
from cluster.errors import ReplicaLostError
from cluster.handle import connect_blocking
from cluster.platform import PlatformConfig, start

NUM_NODES = 3
NUM_REPLICAS = 2
PROBE_RATE = 10.0
_CALM_S = 6.0  # before the first fault, for snapshots to exist
_PATIENCE_S = 60.0


class Scene(NamedTuple):
    """Everything that runs."""

    cluster: FaultCluster
    probe: Probe
    stream: FaultStream

    def worker_nodes(self) -> list[str]:
        """Return the node of each worker; reads answers while one of them is being started."""
        while True:
            try:
                return [place.node_id for place in self.stream.group.places()]
            except ReplicaLostError:
                self.stream.read_for(0.2)

    def is_free(self, node_id: str) -> bool:
        """Tell whether neither a worker nor a replica runs on a node."""
        replica_nodes = {replica.node_id for replica in running_replicas()}
        return node_id not in replica_nodes and node_id not in self.worker_nodes()


def lose_node(flow: Flow, *, by_freezing: bool = False) -> dict[str, object]:
    """Lose a node with a worker and a replica; return the counts.

    Args:
        flow: What is sent meanwhile.
        by_freezing: Its processes fall silent instead of being killed.
    """
    with scene(flow) as now:
        now.stream.await_flow(_CALM_S)
        carriers = {replica.node_id for replica in running_replicas()} & set(now.worker_nodes())
        victim = min(carriers & now.cluster.workers.keys())
        lost = [replica for replica in running_replicas() if replica.node_id == victim]
        fault_ms, fault_s = 1e3 * time.time(), time.monotonic()
        if by_freezing:
            now.cluster.freeze(victim)
        else:
            now.cluster.lose(victim)
        now.stream.forget(victim)
        workers_s = _seconds_until(lambda: victim not in now.worker_nodes(), now, fault_s)
        replicas_s = await_replicas(
            NUM_REPLICAS, lost, since_s=fault_s, meanwhile=now.stream.read_for
        )
        counts = now.stream.finish()
        recovery = {
            "two_replicas_s": replicas_s,
            "workers_s": workers_s,
            "stream_s": now.stream.held_up_s(fault_ms),
        }
        return {"probe": now.probe.figures(), "stream": counts, "recovery": recovery}


def replace_nodes(flow: Flow) -> dict[str, object]:
    """Replace every node beside the head: add one, drain one, take it away; return the counts."""
    with scene(flow) as now:
        now.stream.await_flow(_CALM_S)
        rounds = []
        for old in list(now.cluster.workers):
            begin_ms, begin_s = 1e3 * time.time(), time.monotonic()
            now.cluster.add()
            now.cluster.drain(old)
            drained_s = _seconds_until(partial(now.is_free, old), now, begin_s)
            now.cluster.remove(old)
            now.stream.forget(old)
            now.stream.read_for(_CALM_S)
            stream_s = now.stream.held_up_s(begin_ms)
            rounds.append({"drained_s": drained_s, "stream_s": stream_s})
        counts = now.stream.finish()
        return {"probe": now.probe.figures(), "stream": counts, "rounds": rounds}


def _seconds_until(condition: Callable[[], bool], now: Scene, since_s: float) -> float:
    """Read answers until a condition holds; return how long after a moment that was.

    Raises:
        TimeoutError: It takes longer than a minute.
    """
    while not condition():
        if time.monotonic() > since_s + _PATIENCE_S:
            message = f"expected the workers elsewhere, got {now.worker_nodes()}"
            raise TimeoutError(message)
        now.stream.read_for(0.2)
    return round(time.monotonic() - since_s, 2)


@contextmanager
def scene(flow: Flow) -> Iterator[Scene]:
    """Start Kafka, cluster, platform, workers, probe and sender."""
    with RealKafka() as kafka, FaultCluster(NUM_NODES) as cluster:
        config = PlatformConfig(
            address=cluster.address,
            port=None,
            num_replicas=NUM_REPLICAS,
            max_replicas_per_node=1,
        )
        platform = start(config, TINY)
        try:
            with (
                Probe(connect_blocking, PROBE_RATE) as probe,
                fault_stream(kafka.bootstrap_servers, flow) as stream,
            ):
                yield Scene(cluster, probe, stream)
        finally:
            platform.stop()
