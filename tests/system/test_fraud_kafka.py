"""The fraud service on a real Apache Kafka: nothing lost, features exact, also under SIGKILL."""

import base64
import json
import time
from collections.abc import Callable
from contextlib import closing

import pandas as pd
import pytest

from apps.fraud.brokers import create_topics
from apps.fraud.launch import check_topics
from apps.fraud.settings import Topics
from apps.fraud.simulate import SimulationConfig, simulate
from apps.fraud.stream import Outgoing, Record, TopicPartition
from apps.fraud.transport import KafkaSettings, KafkaStream
from benchmarks.fraud_kill import Plan, kill_run
from benchmarks.fraud_parity import Case, check
from benchmarks.fraud_rig import offline_digests
from benchmarks.real_kafka import RealKafka
from cluster.errors import ConfigurationError

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]


@pytest.fixture
def address(real_kafka: RealKafka) -> str:
    return real_kafka.bootstrap_servers


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return simulate(SimulationConfig(num_cards=400, num_terminals=300, num_days=45, seed=3))


@pytest.mark.parametrize("case", [Case(1, is_warm=True), Case(3, is_warm=False)])
def test_online_features_equal_offline_bit_for_bit(
    address: str, table: pd.DataFrame, case: Case
) -> None:
    """Through Kafka, with labels, warm in the middle and on three workers."""
    counts = check(address, table[:12_000], offline_digests(table[:12_000]), case, with_model=False)
    assert counts["equal"] == counts["transactions"] == counts["decisions"]
    assert counts["dead_letters"] == 0


def test_killed_workers_lose_nothing_and_resume_exactly(address: str, table: pd.DataFrame) -> None:
    """Three SIGKILLs at random moments while transactions keep coming."""
    plan = Plan(kills=3, num_workers=2, rate_tx_s=400.0, seed=1, with_model=False)
    counts = kill_run(address, table[:5000], plan)
    assert counts["decided"] == counts["equal"] == 5000


def test_a_stream_closes_at_once_with_a_commit_on_its_way(address: str) -> None:
    """A worker that is moved or restarted must not wait for an answer that nobody reads."""
    topic = f"close-{time.time_ns()}"
    create_topics(address, {topic: 1})
    settings = KafkaSettings(address, topic)
    stream = KafkaStream(settings)
    stream.assign({TopicPartition(topic, 0): 0})
    stream.commit({TopicPartition(topic, 0): 0})
    stream.poll(0.0)  # sends it
    stream.commit({TopicPartition(topic, 0): 5})
    begin_s = time.monotonic()
    stream.close()
    assert time.monotonic() - begin_s < 5.0
    with closing(KafkaStream(settings)) as reader:
        assert reader.committed(topic) == {0: 5}


def test_a_partition_that_is_not_fetched_is_not_taken_for_read(address: str) -> None:
    """Polls alone do not renew what is known of the end of a partition; an answered fetch does."""
    topic = f"ends-{time.time_ns()}"
    create_topics(address, {topic: 2})
    idle = TopicPartition(topic, 1)
    with closing(KafkaStream(KafkaSettings(address, topic))) as stream:
        stream.assign({TopicPartition(topic, 0): 0, idle: 0})
        _poll_until(stream, lambda: stream.caught_up_at(idle) is not None)
        stream.pause([idle])
        _poll_until(stream, lambda: False, patience_s=0.5)  # what was under way is answered
        sent_ms = time.time_ns() // 1_000_000
        stream.send(Outgoing(topic, 1, None, b"{}", []))
        _poll_until(stream, lambda: False, patience_s=0.5)
        assert (stream.caught_up_at(idle) or 0) < sent_ms
        stream.pause([])
        assert len(_poll_until(stream, lambda: (stream.caught_up_at(idle) or 0) >= sent_ms)) == 1


def _poll_until(
    stream: KafkaStream, is_done: Callable[[], bool], patience_s: float = 10.0
) -> list[Record]:
    deadline_s = time.monotonic() + patience_s
    found: list[Record] = []
    while not is_done() and time.monotonic() < deadline_s:
        found += [record for run in stream.poll(0.005) for record in run]
    return found


def test_missing_topic_is_one_clear_line(address: str) -> None:
    """Nothing starts, nothing is created."""
    with pytest.raises(ConfigurationError, match="no-such-topic") as raised:
        check_topics(KafkaSettings(address), Topics(transactions="no-such-topic"))
    assert "\n" not in str(raised.value)


def test_ten_megabyte_message_passes_the_stream_and_commits_survive(address: str) -> None:
    """Messages of any size are read; committed offsets and ends are Kafka's."""
    topic = f"stream-{time.time_ns()}"
    create_topics(address, {topic: 2})
    options = {"max_request_size": 12_000_000}
    settings = KafkaSettings(address, topic, options)
    huge = base64.b64encode(bytes(7_500_000))
    with closing(KafkaStream(settings)) as stream:
        acks = [stream.send(Outgoing(topic, 1, b"k", value, [])) for value in (b"{}", huge)]
        while not all(ack.is_done for ack in acks):
            time.sleep(0.01)
        assert [ack.exception for ack in acks] == [None, None]
        assert stream.bounds(topic) == {0: (0, 0), 1: (0, 2)}
        found = list(stream.tail(topic, {0: 0, 1: 0}))
    assert [len(record.value or b"") for record in found] == [2, len(huge)]
    assert json.loads(found[0].value or b"") == {}
