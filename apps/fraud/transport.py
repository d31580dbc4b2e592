"""Kafka through kafka-python: one hand-assigned consumer and one acks=all producer.

Knows kafka-python and its settings, all of which pass through except those the
delivery promise rests on.  Knows nothing of transactions.  Consumer groups are
used for committed offsets alone, so there are no rebalances.
"""

import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, KafkaProducer
from kafka import TopicPartition as KafkaPartition
from kafka.consumer.fetcher import ConsumerRecord
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata

from apps.fraud.fetches import FetchWatch
from apps.fraud.stream import Ack, Outgoing, Record, TopicPartition
from cluster.errors import ConfigurationError

_CONSUMER: Mapping[str, Any] = {
    "auto_offset_reset": "earliest",
    "fetch_max_wait_ms": 20,  # the broker gathers this long; few large fetches cost little CPU
    "fetch_min_bytes": 16_384,
    "max_partition_fetch_bytes": 131_072,  # a poll takes whole fetches: keeps it to some 1000 rows
    "bootstrap_timeout_ms": 10_000,
}
_PRODUCER: Mapping[str, Any] = {
    "linger_ms": 2,  # one decision batch is sent in one burst anyway
    "batch_size": 65_536,
    "bootstrap_timeout_ms": 10_000,
    "max_block_ms": 10_000,
}
_FIXED: Mapping[str, Mapping[str, Any]] = {  # the delivery promise rests on these
    "consumer": {"enable_auto_commit": False, "allow_auto_create_topics": False},
    "producer": {"acks": "all", "allow_auto_create_topics": False},
}
_TAKEN = frozenset(
    {"bootstrap_servers", "group_id", "enable_auto_commit", "acks", "retries", "transactional_id"}
    | {"key_serializer", "value_serializer", "key_deserializer", "value_deserializer"}
)
_WHOLE_FETCHES = 1 << 30  # records; see KafkaStream.poll
_COMMIT_PERIOD_S = 0.05  # at most 20 commits a second; each is a round trip
_CONNECT_S = 5.0  # per bootstrap server
_CLOSE_S = 10.0  # how long closing may wait for acknowledgements


@dataclass(frozen=True, slots=True)
class KafkaSettings:
    """Where the cluster is and how to talk to it.

    Args:
        bootstrap_servers: host:port, several separated by commas.
        group_id: Group whose committed offsets are used.
        options: Any other kafka-python setting, such as ``security_protocol``.
    """

    bootstrap_servers: str
    group_id: str = "trimoe-fraud"
    options: Mapping[str, Any] = field(default_factory=dict)

    def for_client(self, kind: str) -> dict[str, Any]:
        """Return keyword arguments of ``KafkaConsumer`` or ``KafkaProducer``."""
        client, chosen = (
            (KafkaConsumer, _CONSUMER) if kind == "consumer" else (KafkaProducer, _PRODUCER)
        )
        known = client.DEFAULT_CONFIG
        passed = {key: value for key, value in self.options.items() if key in known}
        return {
            "bootstrap_servers": self.bootstrap_servers.split(","),
            **chosen,
            **passed,
            **_FIXED[kind],
        }


def read_options(pairs: Sequence[str], file: Path | None = None) -> dict[str, Any]:
    """Return kafka-python settings from a file and from KEY=VALUE pairs, pairs last.

    The file is a JSON object or lines ``key=value``; dots in names become underscores,
    so that a Java client's file can be used as far as the names agree.

    Raises:
        ConfigurationError: Unknown setting, one that is fixed, or a value of a wrong type.
    """
    found: dict[str, Any] = {}
    if file is not None:
        text = file.read_text()
        if text.lstrip().startswith("{"):
            found |= {_known(key): value for key, value in json.loads(text).items()}
        else:
            lines = (line.strip() for line in text.splitlines())
            found |= dict(_pair(line) for line in lines if line and not line.startswith("#"))
    return found | dict(_pair(text) for text in pairs)


def _known(name: str) -> str:
    key = name.strip().replace(".", "_")
    settings = KafkaConsumer.DEFAULT_CONFIG.keys() | KafkaProducer.DEFAULT_CONFIG.keys()
    if key not in settings or key in _TAKEN:
        reason = "is set by the scorer itself" if key in _TAKEN else "is unknown to kafka-python"
        message = f"Kafka setting {name!r} {reason}; see kafka-python's KafkaConsumer"
        raise ConfigurationError(message)
    return key


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        message = f"expected a Kafka setting KEY=VALUE, got {text!r}"
        raise ConfigurationError(message)
    key = _known(name)
    default = KafkaConsumer.DEFAULT_CONFIG.get(key, KafkaProducer.DEFAULT_CONFIG.get(key))
    try:
        return key, _typed(value.strip(), default)
    except ValueError:
        message = f"Kafka setting {key}: expected {type(default).__name__}, got {value.strip()!r}"
        raise ConfigurationError(message) from None


def _typed(text: str, default: object) -> object:
    if isinstance(default, bool):
        if text.lower() not in {"true", "false"}:
            raise ValueError(text)
        return text.lower() == "true"
    if isinstance(default, int | float):
        return int(text) if isinstance(default, int) else float(text)
    return text


class KafkaStream:
    """One consumer and one producer; satisfies ``apps.fraud.stream.Stream``.

    Raises:
        ConfigurationError: No broker answers, or a setting is refused.
    """

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        try:
            _reach(settings)  # a refused connection is known at once, not after a time-out
            self._consumer = KafkaConsumer(
                group_id=settings.group_id, **settings.for_client("consumer")
            )
            self._producer = KafkaProducer(**settings.for_client("producer"))
        except (KafkaError, OSError, ValueError, RuntimeError) as error:
            message = (
                f"expected a Kafka broker at {settings.bootstrap_servers}, "
                f"got {error}; check the address and the TLS/SASL settings"
            )
            raise ConfigurationError(message) from error
        self._fetches = FetchWatch(self._consumer)
        self._positions: dict[TopicPartition, int] = {}
        self._paused: frozenset[TopicPartition] = frozenset()
        self._lock = threading.Lock()
        self._to_commit: dict[TopicPartition, int] = {}
        self._committing: dict[TopicPartition, int] = {}
        self._committed_at_s = 0.0

    def partitions(self, topic: str) -> list[int]:
        """Return the partitions of a topic."""
        found = sorted(self._consumer.partitions_for_topic(topic))
        if not found:
            message = (
                f"expected topic {topic!r} at {self._settings.bootstrap_servers}, there is none; "
                "create it or name another one"
            )
            raise ConfigurationError(message)
        return found

    def bounds(self, topic: str) -> dict[int, tuple[int, int]]:
        """Return first and next offset of every partition."""
        partitions = [KafkaPartition(topic, p) for p in self.partitions(topic)]
        first = self._consumer.beginning_offsets(partitions)
        after = self._ends(self._consumer.end_offsets(partitions))
        return {tp.partition: (first[tp], after[tp]) for tp in partitions}

    def _ends(self, listed: Mapping[KafkaPartition, int]) -> dict[KafkaPartition, int]:
        """Return the ends as fetches see them; the embedded broker lists too low ones."""
        reader = KafkaConsumer(**self._settings.for_client("consumer"))
        ends = dict(listed)
        deadline_s = time.monotonic() + _CONNECT_S
        try:
            reader.assign(list(listed))
            for tp, offset in listed.items():
                reader.seek(tp, offset)
            while None in (seen := {tp: reader.highwater(tp) for tp in listed}).values():
                if time.monotonic() > deadline_s:
                    break
                reader.poll(timeout_ms=20, max_records=1)
            ends |= {tp: max(offset, seen[tp] or 0) for tp, offset in listed.items()}
        finally:
            reader.close(autocommit=False)
        return ends

    def committed(self, topic: str) -> dict[int, int]:
        """Return the group's committed offsets."""
        offsets = {
            p: self._consumer.committed(KafkaPartition(topic, p)) for p in self.partitions(topic)
        }
        return {p: offset for p, offset in offsets.items() if offset is not None}

    def assign(self, positions: Mapping[TopicPartition, int]) -> None:
        """Read these partitions from these offsets on."""
        self._consumer.assign([KafkaPartition(*tp) for tp in positions])
        for tp, offset in positions.items():
            self._consumer.seek(KafkaPartition(*tp), offset)
        self._positions = dict(positions)

    def poll(self, timeout_s: float) -> list[Sequence[Record]]:
        """Return new records, one run per partition, or nothing in time.

        Whole fetches: when kafka-python 3.0 pauses a partition
        of which a fetch is half consumed, it may never hand out the rest after the resume.
        """
        self._send_commits()
        runs = self._consumer.poll(timeout_ms=1000 * timeout_s, max_records=_WHOLE_FETCHES)
        for tp, run in runs.items():
            self._positions[TopicPartition(*tp)] = run[-1].offset + 1
        return list(runs.values())

    def caught_up_at(self, partition: TopicPartition) -> int | None:
        """Return as of when nothing lay behind the position, in ms since the epoch."""
        seen = self._fetches.seen(KafkaPartition(*partition))
        if seen is None:
            return None
        if self._positions[partition] < seen.highwater:
            # behind, not fetched yet, or only transaction markers are left
            position = self._consumer.position(KafkaPartition(*partition), timeout_ms=1000)
            if position is not None:
                self._positions[partition] = position
        return seen.asked_ms if self._positions[partition] >= seen.highwater else None

    def pause(self, partitions: Sequence[TopicPartition]) -> None:
        """Hold exactly these partitions back."""
        wanted = frozenset(partitions)
        if wanted != self._paused:
            self._consumer.resume(*(KafkaPartition(*tp) for tp in self._paused - wanted))
            self._consumer.pause(*(KafkaPartition(*tp) for tp in wanted - self._paused))
            self._paused = wanted

    def commit(self, positions: Mapping[TopicPartition, int]) -> None:
        """Store next offsets for the group, without waiting."""
        with self._lock:
            self._to_commit.update(positions)

    def _send_commits(self) -> None:
        now_s = time.monotonic()
        with self._lock:
            too_early = now_s < self._committed_at_s + _COMMIT_PERIOD_S
            if self._committing or too_early or not self._to_commit:
                return
            offsets, self._to_commit = self._to_commit, {}
            self._committing, self._committed_at_s = offsets, now_s

        def answered(_offsets: object, response: object) -> None:
            with self._lock:
                self._committing = {}
                if isinstance(response, Exception):  # again, unless a later offset waits
                    self._to_commit = offsets | self._to_commit

        self._consumer.commit_async(_kafka_offsets(offsets), callback=answered)

    def send(self, message: Outgoing) -> Ack:
        """Append a message."""
        ack: Ack = self._producer.send(
            message.topic, message.value, message.key, message.headers, message.partition
        )
        return ack

    def tail(self, topic: str, first: Mapping[int, int]) -> Iterator[ConsumerRecord]:
        """Yield the records of a topic from these offsets to the present end."""
        ends = {p: after for p, (_, after) in self.bounds(topic).items()}
        left = {KafkaPartition(topic, p) for p, offset in first.items() if offset < ends[p]}
        if not left:
            return
        reader = KafkaConsumer(**self._settings.for_client("consumer"))
        try:
            reader.assign(sorted(left))
            for tp in left:
                reader.seek(tp, first[tp.partition])
            while left:
                for tp, run in reader.poll(timeout_ms=100, max_records=5000).items():
                    yield from (record for record in run if record.offset < ends[tp.partition])
                left = {tp for tp in left if reader.position(tp) < ends[tp.partition]}
        finally:
            reader.close(autocommit=False)

    def close(self) -> None:
        """Send what is buffered, commit, and leave.

        A commit on its way is repeated rather than awaited: its answer is read only in a poll.
        """
        self._producer.close(timeout=_CLOSE_S)
        with self._lock:
            offsets = self._committing | self._to_commit
            self._to_commit = {}
        if offsets:
            self._consumer.commit(_kafka_offsets(offsets), timeout_ms=1000 * _CLOSE_S)
        self._consumer.close(autocommit=False)


def _reach(settings: KafkaSettings) -> None:
    """Raise the last ``OSError`` when no bootstrap server accepts a connection."""
    if settings.options.get("proxy_url") or settings.options.get("socks5_proxy"):
        return
    last = OSError("no server is named")
    for server in settings.bootstrap_servers.split(","):
        host, _, port = server.strip().rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
        except OSError as error:
            last = error
        else:
            return
    raise last


def _kafka_offsets(
    offsets: Mapping[TopicPartition, int],
) -> dict[KafkaPartition, OffsetAndMetadata]:
    return {
        KafkaPartition(*tp): OffsetAndMetadata(offset, "", -1) for tp, offset in offsets.items()
    }
