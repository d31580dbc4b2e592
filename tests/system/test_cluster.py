"""The fraud service on a running cluster: it joins, uses what is deployed, drains and moves."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from apps.fraud.brokers import EMBEDDED_CLIENT_OPTIONS, EmbeddedBroker
from apps.fraud.simulate import SimulationConfig, simulate
from apps.fraud.transport import KafkaSettings, KafkaStream
from benchmarks.fault_cluster import FaultCluster
from benchmarks.fraud_rig import Collector, make_topics, offline_digests, send_table
from benchmarks.steady_client import SteadyClient
from cluster.client import Client

if TYPE_CHECKING:
    from cluster.workers import WorkerGroup

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]
TRANSACTIONS = 1500


@pytest.fixture(scope="module")
def cluster() -> Iterator[FaultCluster]:
    """Two nodes with the smallest model on them; gone before another module starts Ray."""
    from benchmarks.tiny_model import TINY
    from cluster.platform import PlatformConfig, start

    with FaultCluster(2) as nodes:
        platform = start(PlatformConfig(address=nodes.address, port=None), TINY)
        yield nodes
        platform.stop()


def test_fraud_run_joins_the_cluster_answers_and_drains_at_sigterm(
    cluster: FaultCluster, embedded_broker: EmbeddedBroker, tmp_path: Path
) -> None:
    """Two workers on two nodes; the command starts no Ray and ends none."""
    table = simulate(SimulationConfig(num_cards=200, num_terminals=100, num_days=30, seed=5))
    table = table[:TRANSACTIONS]
    servers = embedded_broker.bootstrap_servers
    topics, kafka = make_topics(servers, "joined"), KafkaSettings(servers, "reader")
    command = [sys.executable, "-m", "apps.cli", "fraud", "run", "--address", cluster.address]
    command += ["--bootstrap-servers", servers, "--workers", "2", "--replay"]
    command += ["--state", str(tmp_path), "--transactions-topic", topics.transactions]
    command += ["--labels-topic", topics.labels, "--decisions-topic", topics.decisions]
    command += ["--dead-letters-topic", topics.dead_letters]
    for name, value in EMBEDDED_CLIENT_OPTIONS.items():
        command += ["--kafka-config", f"{name}={value}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        try:
            with closing(KafkaStream(kafka)) as stream:
                collector = Collector(stream, topics)
                send_table(kafka, table, table, topics)
                found = collector.read_until(TRANSACTIONS)
        finally:
            running.send_signal(signal.SIGTERM)
            _, said = running.communicate(timeout=60)
    assert running.returncode == 0, said
    assert found.num_equal(offline_digests(table)) == TRANSACTIONS
    assert (found.repeated, found.dead_letters) == (0, 0)
    with closing(KafkaStream(KafkaSettings(servers, "trimoe-fraud"))) as stream:
        ends = {p: after for p, (_, after) in stream.bounds(topics.transactions).items()}
        assert stream.committed(topics.transactions) == ends


class NotingService:
    """Says in a file when it begins and when it ends, and where."""

    def __init__(self, path: Path, index: int) -> None:
        import ray

        self.path, self.node_id = path / f"{index}.txt", ray.get_runtime_context().get_node_id()
        self.stopping = asyncio.Event()

    async def run(self) -> None:
        self.note("begins")
        await self.stopping.wait()
        self.note("ends")

    def note(self, what: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{what} {self.node_id} {os.getpid()}\n")

    def request_stop(self) -> None:
        self.stopping.set()


def build_noting(folder: Path, index: int, _num_workers: int, _client: Client) -> NotingService:
    return NotingService(folder, index)


def settled_nodes(group: "WorkerGroup") -> list[str]:
    """The node of each worker, once all are up."""
    from cluster.errors import ReplicaLostError

    deadline_s = time.monotonic() + 60
    while True:
        try:
            return [place.node_id for place in group.places()]
        except ReplicaLostError:
            assert time.monotonic() < deadline_s
            time.sleep(0.1)


def test_workers_are_spread_and_leave_a_node_that_is_drained(
    cluster: FaultCluster, tmp_path: Path
) -> None:
    """One on each node; the one whose node will go ends in order and begins on the new node."""
    from functools import partial

    from cluster.workers import run_workers

    group = run_workers(partial(build_noting, tmp_path), 2, dial=SteadyClient)
    try:
        before = settled_nodes(group)
        (old,) = cluster.workers
        assert len(set(before)) == 2
        assert old in before
        new = cluster.add()
        cluster.drain(old)
        index = before.index(old)
        deadline_s = time.monotonic() + 60
        while settled_nodes(group)[index] == old:
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        assert settled_nodes(group)[index] == new
        assert sum(group.num_restarts) == 1
    finally:
        assert group.stop(drain_s=20)
    lines = [line.split()[:2] for line in (tmp_path / f"{index}.txt").read_text().splitlines()]
    assert lines == [["begins", old], ["ends", old], ["begins", new], ["ends", new]]
