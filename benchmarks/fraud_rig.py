"""Parts that the fraud benchmarks and system tests share: topics, bulk sending, digests."""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from apps.fraud.brokers import create_topics
from apps.fraud.launch import WorkerPlan, running_service
from apps.fraud.load import encode_table
from apps.fraud.offline import HistoryIndex, offline_context
from apps.fraud.settings import Topics
from apps.fraud.stream import Outgoing, Stream, TopicPartition
from apps.fraud.table import LABEL_COLUMN
from apps.fraud.transport import KafkaSettings, KafkaStream
from benchmarks.steady_client import SteadyClient

if TYPE_CHECKING:
    from cluster.workers import WorkerGroup

NUM_PARTITIONS = 4
_BATCH = 4096
_MAX_UNACKNOWLEDGED = 20_000


def make_topics(
    bootstrap_servers: str, prefix: str, num_partitions: int = NUM_PARTITIONS
) -> Topics:
    """Create four topics whose names begin with ``prefix``."""
    topics = Topics(*(f"{prefix}-{name}" for name in ("tx", "labels", "decisions", "dead")))
    names = (topics.transactions, topics.labels, topics.decisions, topics.dead_letters)
    create_topics(bootstrap_servers, dict.fromkeys(names, num_partitions))
    return topics


def send_all(stream: Stream, messages: Iterable[Outgoing]) -> int:
    """Send messages as fast as it goes and wait for the broker; return how many."""
    acks = []
    for message in messages:
        acks.append(stream.send(message))
        if len(acks) % _MAX_UNACKNOWLEDGED == 0:
            while not acks[-1].is_done:
                time.sleep(0.002)
    while not all(ack.is_done for ack in acks):
        time.sleep(0.002)
    failed = [ack.exception for ack in acks if ack.exception is not None]
    if failed:
        raise failed[0]
    return len(acks)


def send_table(
    kafka: KafkaSettings, table: pd.DataFrame, labels: pd.DataFrame, topics: Topics
) -> None:
    """Send the labels of one table, then the transactions of another."""
    with closing(KafkaStream(kafka)) as stream:
        send_all(stream, label_messages(labels, topics.labels))
        plain = table.drop(columns=LABEL_COLUMN)
        send_all(stream, (each.out for each in encode_table(plain, topics, NUM_PARTITIONS)))


def label_messages(table: pd.DataFrame, topic: str) -> Iterator[Outgoing]:
    """Yield every label of a table."""
    columns = (table["transaction_id"].tolist(), table[LABEL_COLUMN].tolist())
    for identifier, label in zip(*columns, strict=True):
        value = f'{{"TRANSACTION_ID":{json.dumps(identifier)},"TX_FRAUD":{label}}}'.encode()
        yield Outgoing(topic, hash(identifier) % NUM_PARTITIONS, None, value, [])


def offline_digests(table: pd.DataFrame) -> dict[int | str, str]:
    """Return the digest of every transaction's offline features, by id."""
    context, index = offline_context(table), HistoryIndex(table)
    ids, digests = table["transaction_id"].tolist(), dict[int | str, str]()
    for start in range(0, len(table), _BATCH):
        rows = np.arange(start, min(start + _BATCH, len(table)))
        features = index.features(rows, context)
        digests.update((ids[row], features.digest(i)) for i, row in enumerate(rows.tolist()))
    return digests


@dataclass(slots=True)
class Found:
    """Digests of the decisions of a topic, and what came more than once.

    Args:
        digests: Of the decisions, by transaction.
        waits: When each decision was made, and how long after its transaction, ms.
        decisions: Of any transaction, repeated ones too.
        dead_letters: Messages on that topic.
    """

    digests: dict[int | str, set[str]] = field(default_factory=dict)
    waits: list[tuple[int, int]] = field(default_factory=list)
    decisions: int = 0
    dead_letters: int = 0

    @property
    def repeated(self) -> int:
        """Decisions beyond the first of their id."""
        return self.decisions - len(self.digests)

    def num_equal(self, expected: dict[int | str, str]) -> int:
        """Return how many ids have exactly the expected digest."""
        return sum(self.digests.get(key) == {digest} for key, digest in expected.items())


class Collector:
    """Follows the answers to transactions."""

    def __init__(self, stream: Stream, topics: Topics) -> None:
        self.found = Found()
        self._stream, self._topics = stream, topics
        self._stream.assign(
            {
                TopicPartition(topic, p): 0
                for topic in (topics.decisions, topics.dead_letters)
                for p in range(NUM_PARTITIONS)
            }
        )

    def read(self, timeout_s: float = 0.1) -> int:
        """Take in what has come; return the number of answers."""
        runs = self._stream.poll(timeout_s)
        for run in runs:
            for record in run:
                if record.topic == self._topics.dead_letters:
                    self.found.dead_letters += 1
                    continue
                decision = json.loads(record.value or b"{}")
                self.found.decisions += 1
                key, digest = decision["transaction_id"], decision["features_digest"]
                self.found.digests.setdefault(key, set()).add(digest)
                wait_ms = record.timestamp - decision["input"]["timestamp"]
                self.found.waits.append((record.timestamp, wait_ms))
        return sum(map(len, runs))

    def read_until(self, num_ids: int, patience_s: float = 60.0) -> Found:
        """Read until so many ids are decided, or nothing comes for ``patience_s``."""
        last_s = time.monotonic()
        while len(self.found.digests) < num_ids and time.monotonic() < last_s + patience_s:
            if self.read():
                last_s = time.monotonic()
        return self.found


@contextmanager
def running_workers(
    plan: WorkerPlan, num_workers: int, *, with_model: bool
) -> Iterator["WorkerGroup"]:
    """Run workers on the whole platform, or on Ray alone with ``SteadyClient``."""
    if with_model:
        with running_service(plan, num_workers) as group:
            yield group
        return
    from cluster.platform import prepare_environment  # noqa: PLC0415 - only this path needs it

    prepare_environment()
    import ray  # noqa: PLC0415 - reads the environment when imported

    from cluster.workers import run_workers  # noqa: PLC0415 - imports ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        group = run_workers(plan, num_workers, dial=SteadyClient)
        try:
            yield group
        finally:
            group.stop()
    finally:
        ray.shutdown()
