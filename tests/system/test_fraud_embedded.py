"""The service on the embedded broker: one worker restarted between two halves of a stream."""

import asyncio
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from apps.fraud.brokers import EmbeddedBroker
from apps.fraud.decision import load_policy
from apps.fraud.launch import default_schemas
from apps.fraud.replay import replay
from apps.fraud.scoring import Scorer
from apps.fraud.service import FraudService
from apps.fraud.settings import ServiceSettings
from apps.fraud.simulate import SimulationConfig, simulate
from apps.fraud.stream import Outgoing
from apps.fraud.transport import KafkaSettings, KafkaStream
from benchmarks.fraud_rig import Collector, make_topics, offline_digests, send_table
from benchmarks.steady_client import SteadyClient

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]


def test_restart_in_the_middle_loses_nothing_and_keeps_features_exact(tmp_path: Path) -> None:
    """Snapshot, commits and ledger meet on a broker that lists too low ends."""
    table = simulate(SimulationConfig(num_cards=200, num_terminals=100, num_days=30, seed=5))[:4000]
    with EmbeddedBroker() as broker:
        topics = make_topics(broker.bootstrap_servers, "embedded")
        kafka = KafkaSettings(broker.bootstrap_servers, "embedded")
        settings = ServiceSettings(topics=topics, state_dir=tmp_path)
        with closing(KafkaStream(kafka)) as stream:
            collector = Collector(stream, topics)
            for half in (table[:2000], table[2000:]):
                send_table(kafka, half, half, topics)
                asyncio.run(_serve(kafka, replace(settings), collector, int(half.index[-1]) + 1))
            assert replay(stream, topics.transactions, topics.labels).sent == 4000
        found = collector.found
    assert found.num_equal(offline_digests(table)) == 4000
    assert (found.repeated, found.dead_letters) == (0, 0)


async def _serve(
    kafka: KafkaSettings, settings: ServiceSettings, collector: Collector, num_ids: int
) -> None:
    service = FraudService(
        settings, default_schemas(), load_policy(), Scorer(SteadyClient()), KafkaStream(kafka)
    )
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        tasks.create_task(service.run())
        await asyncio.to_thread(collector.read_until, num_ids, 30.0)
        service.request_stop()


def test_dead_letters_can_be_sent_again(tmp_path: Path) -> None:
    """A payload kept whole comes back as it was."""
    with EmbeddedBroker() as broker:
        topics = make_topics(broker.bootstrap_servers, "again")
        kafka = KafkaSettings(broker.bootstrap_servers, "again")
        settings = ServiceSettings(topics=topics, state_dir=tmp_path)
        with closing(KafkaStream(kafka)) as stream:
            ack = stream.send(Outgoing(topics.transactions, 0, b"k", b"{bad", []))
            collector = Collector(stream, topics)
            asyncio.run(_serve_until_rejected(kafka, settings, collector))
            assert ack.exception is None
            replay(stream, topics.dead_letters, topics.labels, payloads=True)
            (record,) = stream.tail(topics.labels, dict.fromkeys(range(4), 0))
        assert record.value == b"{bad"


async def _serve_until_rejected(
    kafka: KafkaSettings, settings: ServiceSettings, collector: Collector
) -> None:
    service = FraudService(
        settings, default_schemas(), load_policy(), Scorer(SteadyClient()), KafkaStream(kafka)
    )
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        tasks.create_task(service.run())
        while not collector.found.dead_letters:
            await asyncio.to_thread(collector.read)
        service.request_stop()
