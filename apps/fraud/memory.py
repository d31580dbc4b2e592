"""A log in memory with Kafka's rules: partitions, offsets, timestamps, commits.

For tests and for measuring the service without a broker.  Nothing is stored on
disk and no bytes cross a socket; every other rule of ``apps.fraud.stream`` holds.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from apps.fraud.stream import Ack, Outgoing, Record, TopicPartition
from cluster.errors import ConfigurationError

_RUN = 64  # records of a partition per poll


class MemoryRecord(NamedTuple):
    """One stored message."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]


class MemoryAck(NamedTuple):
    """An append to memory is durable as soon as it returns."""

    is_done: bool = True
    exception: BaseException | None = None


class MemoryLog:
    """Topics shared by any number of streams, and the committed offsets of groups."""

    def __init__(self, partitions: Mapping[str, int], now_ms: Callable[[], int]) -> None:
        self.records: dict[TopicPartition, list[MemoryRecord]] = {
            TopicPartition(topic, p): []
            for topic, count in partitions.items()
            for p in range(count)
        }
        self.commits: dict[tuple[str, TopicPartition], int] = {}
        self.grown = threading.Condition()
        self.now_ms = now_ms

    def append(self, message: Outgoing, timestamp_ms: int | None = None) -> MemoryAck:
        """Store a message and wake waiting readers."""
        records = self.records[TopicPartition(message.topic, message.partition)]
        stamp = self.now_ms() if timestamp_ms is None else timestamp_ms
        with self.grown:
            records.append(
                MemoryRecord(
                    message.topic,
                    message.partition,
                    len(records),
                    stamp,
                    message.key,
                    message.value,
                    message.headers,
                )
            )
            self.grown.notify_all()
        return MemoryAck()

    def topic(self, name: str) -> list[MemoryRecord]:
        """Return all records of a topic, partition by partition."""
        return [
            record for tp, records in self.records.items() if tp.topic == name for record in records
        ]


@dataclass(slots=True)
class MemoryStream:
    """One reader and writer of a ``MemoryLog``; satisfies ``Stream``."""

    log: MemoryLog
    group: str
    _positions: dict[TopicPartition, int] = field(default_factory=dict)
    _paused: frozenset[TopicPartition] = frozenset()

    def partitions(self, topic: str) -> list[int]:
        """Return the partitions of a topic."""
        found = sorted(tp.partition for tp in self.log.records if tp.topic == topic)
        if not found:
            message = f"expected topic {topic!r}, the log has none of that name; create it"
            raise ConfigurationError(message)
        return found

    def bounds(self, topic: str) -> dict[int, tuple[int, int]]:
        """Return first and next offset of every partition."""
        return {
            p: (0, len(self.log.records[TopicPartition(topic, p)])) for p in self.partitions(topic)
        }

    def committed(self, topic: str) -> dict[int, int]:
        """Return the group's committed offsets."""
        return {
            tp.partition: offset
            for (group, tp), offset in self.log.commits.items()
            if group == self.group and tp.topic == topic
        }

    def assign(self, positions: Mapping[TopicPartition, int]) -> None:
        """Read these partitions from these offsets on."""
        self._positions = dict(positions)

    def poll(self, timeout_s: float) -> list[Sequence[Record]]:
        """Return new records, one run per partition, or nothing in time."""
        runs = self._take()
        if not runs and timeout_s > 0:
            with self.log.grown:
                self.log.grown.wait(timeout_s)
            runs = self._take()
        return runs

    def _take(self) -> list[Sequence[Record]]:
        runs: list[Sequence[Record]] = []
        for tp, position in self._positions.items():
            if tp in self._paused:
                continue
            run = list(islice(self.log.records[tp], position, position + _RUN))
            if run:
                runs.append(run)
                self._positions[tp] = position + len(run)
        return runs

    def caught_up_at(self, partition: TopicPartition) -> int | None:
        """Return as of when nothing lay behind the position, in ms since the epoch."""
        now_ms = self.log.now_ms()
        return now_ms if self._positions[partition] >= len(self.log.records[partition]) else None

    def pause(self, partitions: Sequence[TopicPartition]) -> None:
        """Hold exactly these partitions back."""
        self._paused = frozenset(partitions)

    def commit(self, positions: Mapping[TopicPartition, int]) -> None:
        """Store next offsets for the group, without waiting."""
        for tp, offset in positions.items():
            self.log.commits[self.group, tp] = offset

    def send(self, message: Outgoing) -> Ack:
        """Append a message."""
        return self.log.append(message)

    def tail(self, topic: str, first: Mapping[int, int]) -> Iterator[MemoryRecord]:
        """Yield the records of a topic from these offsets to the present end."""
        for partition, offset in first.items():
            yield from self.log.records[TopicPartition(topic, partition)][offset:]

    def close(self) -> None:
        """Nothing is buffered."""
