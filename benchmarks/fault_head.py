"""The head restarts under load: its state is kept by Redis, and callers do not need it.

Three nodes: the head without work, two nodes with a replica each, a proxy each and the
workers of the fraud stream.  While the head is away, one replica is killed as well.
"""

import multiprocessing
import os
import signal
import time
from contextlib import ExitStack
from functools import partial

from benchmarks.fault_cluster import FaultCluster
from benchmarks.fault_probe import Probe, figures_of
from benchmarks.fault_replicas import await_replicas, running_replicas
from benchmarks.fault_stream import Flow, fault_stream
from benchmarks.real_kafka import RealKafka
from benchmarks.real_redis import real_redis
from benchmarks.tiny_model import TINY
from cluster.client import HttpClient
from cluster.errors import ConfigurationError
from cluster.handle import connect_blocking
from cluster.platform import PlatformConfig, start

NUM_NODES = 3
NUM_REPLICAS = 2
PROBE_RATE = 10.0
_CALM_S = 6.0


def restart_head(flow: Flow, outage_s: float) -> dict[str, object]:
    """Kill the head, kill a replica, start the head again; return the counts.

    Args:
        flow: What is sent to the fraud stream meanwhile.
        outage_s: How long the head is away.
    """
    with ExitStack() as stack:
        kafka = stack.enter_context(RealKafka())
        redis = stack.enter_context(real_redis())
        cluster = stack.enter_context(FaultCluster(NUM_NODES, head_cpus=0, redis_address=redis))
        config = PlatformConfig(
            address=cluster.address, num_replicas=NUM_REPLICAS, max_replicas_per_node=1
        )
        _deploy_from_elsewhere(config)
        home = min(cluster.workers)
        stack.enter_context(cluster.driver_on(home))
        url = f"http://127.0.0.1:{cluster.http_ports[home]}"
        handle = stack.enter_context(Probe(connect_blocking, PROBE_RATE))
        http = stack.enter_context(Probe(partial(HttpClient, url), PROBE_RATE))
        stream = stack.enter_context(fault_stream(kafka.bootstrap_servers, flow))
        stream.await_flow(_CALM_S)

        before = running_replicas()
        victim = next(replica for replica in before if replica.node_id != home)
        lost_ms, lost_s = 1e3 * time.time(), time.monotonic()
        cluster.lose_head()
        stream.read_for(outage_s / 2)
        os.kill(victim.pid, signal.SIGKILL)
        stream.read_for(outage_s / 2)
        starting_s = time.monotonic()
        cluster.start_head()
        head_s = round(time.monotonic() - starting_s, 2)
        whole_s = await_replicas(
            NUM_REPLICAS, [victim], since_s=starting_s, meanwhile=stream.read_for
        )
        kept = running_replicas() & before
        counts = stream.finish()
        outage = [lost_s, starting_s]
        return {
            "probe": handle.figures(),
            "http": http.figures(),
            "stream": counts,
            "outage": {
                "seconds": round(starting_s - lost_s, 2),
                "handle": figures_of(handle.calls, *outage),
                "http": figures_of(http.calls, *outage),
            },
            "recovery": {
                "head_s": head_s,
                "two_replicas_s": whole_s,
                "replicas_kept": len(kept),
                "stream_s": stream.held_up_s(lost_ms),
            },
        }


def _deploy_from_elsewhere(config: PlatformConfig) -> None:
    """Deploy in another process, which may join through the head: this one must outlive the head.

    Raises:
        ConfigurationError: It failed; what it says stands on stderr.
    """
    process = multiprocessing.get_context("spawn").Process(target=start, args=(config, TINY))
    process.start()
    process.join()
    if process.exitcode:
        message = f"platform: expected to be deployed, got status {process.exitcode}; see above"
        raise ConfigurationError(message)
