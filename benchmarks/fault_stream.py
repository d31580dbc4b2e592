"""The fraud stream under faults: real Kafka, workers on the nodes of a cluster, offline digests.

Every node keeps its workers' snapshots in a folder of its own, which is lost with the node.
Calls of the workers to the model are counted in files, because workers may be killed.
"""

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pandas as pd
import ray

from apps.fraud.decision import load_policy
from apps.fraud.launch import WorkerPlan, default_schemas
from apps.fraud.load import encode_table, send_on_schedule
from apps.fraud.scoring import Scorer
from apps.fraud.service import FraudService
from apps.fraud.settings import ServiceSettings
from apps.fraud.simulate import SimulationConfig, simulate
from apps.fraud.transport import KafkaSettings, KafkaStream
from benchmarks.fraud_rig import NUM_PARTITIONS, Collector, make_topics, offline_digests
from cluster.client import Client
from cluster.errors import TrimoeError
from cluster.handle import connect
from cluster.schemas import InferRequest, InferResponse
from cluster.workers import run_workers

if TYPE_CHECKING:
    from cluster.workers import WorkerGroup

HELD_UP_MS = 4000  # a decision later than this was held up by a fault
_REORDER_WAIT_MS = 2000  # all starve on two cores while nodes start; exactness is the test
_SNAPSHOT_S = 5.0
_PATIENCE_S = 60.0
_DEADLINE_MS = 10_000.0


@dataclass(frozen=True, slots=True)
class Flow:
    """What is sent: a generated table of so many transactions at a rate."""

    transactions: int
    rate_tx_s: float
    num_workers: int = 3
    seed: int = 0

    def table(self) -> pd.DataFrame:
        """Return the transactions, 45 days of a small world, with labels."""
        world = SimulationConfig(num_cards=400, num_terminals=300, num_days=45, seed=self.seed)
        return simulate(world)[: self.transactions]


@dataclass(frozen=True, slots=True)
class CountedClient:
    """Leaves a byte per call and a line per failure in files of its process."""

    client: Client
    folder: Path

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer one request (see ``cluster.client.Client``)."""
        self._note("calls", ".")
        try:
            return await self.client.infer(request)
        except TrimoeError as error:
            self._note("failures", f"{type(error).__name__}: {error}\n")
            raise

    def _note(self, name: str, text: str) -> None:
        with (self.folder / f"{name}-{os.getpid()}").open("a") as file:
            file.write(text)


@dataclass(frozen=True, slots=True)
class NodePlan:
    """Builds workers whose snapshots lie in the folder of their node."""

    plan: WorkerPlan
    folder: Path

    def __call__(self, index: int, num_workers: int, client: Client) -> FraudService:
        """Build one worker."""
        disk = self.folder / ray.get_runtime_context().get_node_id()
        settings = replace(self.plan.settings, state_dir=disk)
        service = replace(self.plan, settings=settings)(index, num_workers, client)
        service.scorer = Scorer(client, deadline_ms=_DEADLINE_MS)
        return service


class FaultStream:
    """A table on its way through the service.

    Args:
        group: The workers.
        collector: Follows the answers.
        folder: Folders of the nodes, and counts.
        table: What is sent.
    """

    def __init__(
        self, group: "WorkerGroup", collector: Collector, folder: Path, table: pd.DataFrame
    ) -> None:
        self.group = group
        self._collector, self._folder, self._table = collector, folder, table

    def read_for(self, seconds: float) -> None:
        """Take in answers for some time."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            self._collector.read()

    def await_flow(self, calm_s: float) -> None:
        """Read answers until every worker has asked the model, and for some time after.

        Raises:
            TimeoutError: A worker does not within a minute.
        """
        deadline_s = time.monotonic() + _PATIENCE_S
        while len(list(self._folder.glob("calls-*"))) < len(self.group.num_restarts):
            if time.monotonic() > deadline_s:
                message = f"expected all workers to ask the model within {_PATIENCE_S:.0f} s"
                raise TimeoutError(message)
            self.read_for(0.2)
        self.read_for(calm_s)

    def forget(self, node_id: str) -> None:
        """Delete the disk of a node."""
        shutil.rmtree(self._folder / node_id, ignore_errors=True)

    def held_up_s(self, since_ms: float, until_ms: float = float("inf")) -> float:
        """Return for how long after a moment decisions were late, seconds."""
        late = [
            at_ms - since_ms
            for at_ms, wait_ms in self._collector.found.waits
            if wait_ms > HELD_UP_MS and since_ms <= at_ms < until_ms
        ]
        return round(max(late, default=0.0) / 1e3, 2)

    def finish(self) -> dict[str, object]:
        """Wait for all decisions and return the counts; the last of them is the verdict."""
        found = self._collector.read_until(len(self._table))
        expected = offline_digests(self._table)
        texts = {
            name: "".join(path.read_text() for path in self._folder.glob(f"{name}-*"))
            for name in ("calls", "failures")
        }
        equal = found.num_equal(expected)
        return {
            "transactions": len(self._table),
            "decided": len(found.digests),
            "dead_letters": found.dead_letters,
            "repeated": found.repeated,
            "equal": equal,
            "worker_calls": len(texts["calls"]),
            "worker_failures": texts["failures"].splitlines()[:5],
            "worker_restarts": sum(self.group.num_restarts),
            "longest_wait_s": round(max((w for _, w in found.waits), default=0) / 1e3, 2),
            "is_exact": equal == len(found.digests) == len(self._table),
        }


@contextmanager
def fault_stream(bootstrap_servers: str, flow: Flow) -> Iterator[FaultStream]:
    """Run workers on the joined cluster and send a table to them while the block runs."""
    table = flow.table()
    name = f"faults-{time.time_ns()}"
    topics, kafka = make_topics(bootstrap_servers, name), KafkaSettings(bootstrap_servers, name)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="trimoe-faults-")))
        settings = ServiceSettings(
            topics=topics, reorder_wait_ms=_REORDER_WAIT_MS, snapshot_period_s=_SNAPSHOT_S
        )
        plan = NodePlan(WorkerPlan(kafka, settings, load_policy(), default_schemas()), folder)
        group = run_workers(plan, flow.num_workers, dial=partial(_dial, folder))
        stack.callback(group.stop)
        collector = Collector(stack.enter_context(closing(KafkaStream(kafka))), topics)
        sender = stack.enter_context(closing(KafkaStream(kafka)))
        messages = encode_table(table, topics, NUM_PARTITIONS)
        sending = threading.Thread(
            target=send_on_schedule, args=(sender, messages, flow.rate_tx_s), daemon=True
        )
        sending.start()
        stack.callback(sending.join)
        yield FaultStream(group, collector, folder, table)


def _dial(folder: Path) -> CountedClient:
    return CountedClient(connect(), folder)
