"""Both brokers carry what the fraud stream needs: order, headers, timestamps, offsets."""

import os
import signal
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.structs import OffsetAndMetadata

from apps.fraud.brokers import (
    EMBEDDED_CLIENT_OPTIONS,
    EmbeddedBroker,
    broker_process,
    create_topics,
    free_ports,
)
from benchmarks.real_kafka import RealKafka, missing_tools
from cluster.errors import ConfigurationError

NUM_PARTITIONS = 3
FIRST_MS = 1_522_540_831_000  # event times of years ago are kept as they are


@pytest.fixture(params=["embedded", pytest.param("apache", marks=pytest.mark.kafka)])
def bootstrap(request: pytest.FixtureRequest) -> str:
    """The address of each kind of broker."""
    fixture = "embedded_broker" if request.param == "embedded" else "real_kafka"
    address: str = request.getfixturevalue(fixture).bootstrap_servers
    return address


def send(bootstrap: str, topic: str, count: int) -> list[int]:
    """Send ``count`` numbered messages, spread over the partitions, and return their offsets."""
    producer = KafkaProducer(bootstrap_servers=bootstrap, acks="all", linger_ms=20)
    sent = [
        producer.send(
            topic,
            str(i).encode(),
            key=b"key",
            headers=[("number", str(i).encode())],
            partition=i % NUM_PARTITIONS,
            timestamp_ms=FIRST_MS + i,
        )
        for i in range(count)
    ]
    producer.flush()
    producer.close()
    return [acknowledged.get(timeout=10).offset for acknowledged in sent]


@pytest.fixture
def consumer(bootstrap: str) -> Iterator[KafkaConsumer]:
    reader = KafkaConsumer(
        bootstrap_servers=bootstrap,
        group_id="readers",
        enable_auto_commit=False,
        consumer_timeout_ms=20_000,
        **EMBEDDED_CLIENT_OPTIONS,
    )
    yield reader
    reader.close(autocommit=False)


def test_messages_come_back_in_order_with_headers_and_event_times(
    bootstrap: str, consumer: KafkaConsumer
) -> None:
    create_topics(bootstrap, {"numbers": NUM_PARTITIONS})
    offsets = send(bootstrap, "numbers", 1000)
    partitions = [TopicPartition("numbers", p) for p in range(NUM_PARTITIONS)]
    consumer.assign(partitions)
    for partition in partitions:
        consumer.seek(partition, 0)
    records = list(islice(consumer, 1000))
    by_number = {int(record.value): record for record in records}
    assert sorted(by_number) == list(range(1000))
    for number, record in by_number.items():
        assert record.partition == number % NUM_PARTITIONS
        assert record.offset == offsets[number]
        assert record.timestamp == FIRST_MS + number
        assert record.headers == [("number", str(number).encode())]
    for partition in partitions:
        seen = [int(r.value) for r in records if r.partition == partition.partition]
        assert seen == sorted(seen)


def test_committed_offsets_outlive_the_consumer(bootstrap: str, consumer: KafkaConsumer) -> None:
    create_topics(bootstrap, {"marked": NUM_PARTITIONS})
    send(bootstrap, "marked", 30)
    first, second = TopicPartition("marked", 0), TopicPartition("marked", 1)
    consumer.assign([first, second])
    consumer.commit({first: OffsetAndMetadata(7, "", -1)})
    later = KafkaConsumer(bootstrap_servers=bootstrap, group_id="readers", enable_auto_commit=False)
    assert later.committed(first) == 7
    assert later.committed(second) is None
    later.close(autocommit=False)


def test_creating_topics_again_changes_nothing(bootstrap: str, consumer: KafkaConsumer) -> None:
    create_topics(bootstrap, {"once": 2, "other": 1})
    create_topics(bootstrap, {"once": 2, "third": 1})
    assert consumer.partitions_for_topic("once") == {0, 1}
    assert consumer.partitions_for_topic("third") == {0}


def test_a_broker_that_cannot_start_is_one_line(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    command = [sys.executable, "-c", "print('bad setting: listeners'); raise SystemExit(3)"]
    starting = broker_process(
        command, port, tmp_path / "log", stop_signal=signal.SIGINT, timeout_s=20.0
    )
    with (
        pytest.raises(ConfigurationError, match=r"ended with status 3: bad setting: listeners$"),
        starting,
    ):
        pass


@pytest.mark.slow
def test_a_broker_that_hangs_on_is_killed(tmp_path: Path) -> None:
    """The stop signal is ignored by this one; what is left after the block is nothing."""
    (port,) = free_ports(1)
    code = (
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "print(os.getpid(), flush=True)\n"
        "signal.pause()"
    )
    with (
        pytest.raises(ConfigurationError, match=r"within 2 s, it runs silently: \d+$"),
        broker_process(
            [sys.executable, "-c", code],
            port,
            tmp_path / "log",
            stop_signal=signal.SIGINT,
            timeout_s=2.0,
            kill_after_s=0.2,
        ),
    ):
        pass
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "log").read_text()), 0)


def test_nobody_listens_after_the_embedded_broker_ended() -> None:
    with EmbeddedBroker() as broker:
        address = broker.bootstrap_servers
    with pytest.raises(ConfigurationError, match=f"cannot create topics .* at {address}"):
        create_topics(address, {"numbers": 1}, timeout_s=0.5)


@pytest.mark.kafka
def test_apache_kafka_creates_no_topic_by_itself(real_kafka: RealKafka) -> None:
    consumer = KafkaConsumer(bootstrap_servers=real_kafka.bootstrap_servers)
    assert consumer.partitions_for_topic("never-created") in (None, set())
    assert "never-created" not in consumer.topics()
    consumer.close()


def test_missing_java_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    assert missing_tools() == ["Java 17", "Maven"]
    with pytest.raises(ConfigurationError, match="missing here: Java 17, Maven"), RealKafka():
        pass
