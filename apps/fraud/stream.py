"""What the scorer needs of a log of messages: records, acknowledgements, positions.

Two things satisfy it: ``apps.fraud.transport`` (kafka-python) and
``apps.fraud.memory`` (one process, for tests and measurements).  All calls may
block and are made from one thread at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol


class TopicPartition(NamedTuple):
    """One partition of one topic."""

    topic: str
    partition: int


class Record(Protocol):
    """A message as it was read; kafka-python's ``ConsumerRecord`` is one."""

    @property
    def topic(self) -> str:
        """Its topic."""

    @property
    def partition(self) -> int:
        """Its partition."""

    @property
    def offset(self) -> int:
        """Its offset."""

    @property
    def timestamp(self) -> int:
        """Milliseconds since the epoch, by the broker or by the sender."""
        ...

    @property
    def key(self) -> bytes | None:
        """Its key, if any."""

    @property
    def value(self) -> bytes | None:
        """Its value, if any."""

    @property
    def headers(self) -> Sequence[tuple[str, bytes]]:
        """Its headers."""


class Outgoing(NamedTuple):
    """A message to send; kept until it is acknowledged, so that it can be sent again."""

    topic: str
    partition: int
    key: bytes | None
    value: bytes
    headers: list[tuple[str, bytes]]


class Ack(Protocol):
    """The broker's word on one sent message; kafka-python's future is one."""

    @property
    def is_done(self) -> bool:
        """Whether the broker has answered."""

    @property
    def exception(self) -> BaseException | None:
        """Why it failed, if it did."""


class Stream(Protocol):
    """One consumer with hand-assigned partitions and one producer with acks=all."""

    def partitions(self, topic: str) -> list[int]:
        """Return the partitions of a topic.

        Raises:
            ConfigurationError: There is no such topic.
        """
        ...

    def bounds(self, topic: str) -> dict[int, tuple[int, int]]:
        """Return first and next offset of every partition of a topic."""
        ...

    def committed(self, topic: str) -> dict[int, int]:
        """Return the group's committed offsets; partitions without one are left out."""
        ...

    def assign(self, positions: Mapping[TopicPartition, int]) -> None:
        """Read these partitions from these offsets on."""
        ...

    def poll(self, timeout_s: float) -> list[Sequence[Record]]:
        """Return new records, one run of rising offsets per partition, or nothing in time.

        How many is the stream's affair; ``pause`` is how a reader holds it back.
        """
        ...

    def caught_up_at(self, partition: TopicPartition) -> int | None:
        """Return as of when the log held nothing behind the position, in ms since the epoch.

        None while it is known to hold more, or was not asked yet.
        """
        ...

    def pause(self, partitions: Sequence[TopicPartition]) -> None:
        """Hold exactly these partitions back until the next call."""
        ...

    def commit(self, positions: Mapping[TopicPartition, int]) -> None:
        """Store next offsets for the group, without waiting."""
        ...

    def send(self, message: Outgoing) -> Ack:
        """Append a message."""
        ...

    def tail(self, topic: str, first: Mapping[int, int]) -> Iterator[Record]:
        """Yield the records of a topic from these offsets to the present end."""
        ...

    def close(self) -> None:
        """Send what is buffered, wait for commits, and leave."""
        ...
