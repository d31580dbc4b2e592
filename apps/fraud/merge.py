"""Merging the partitions of a topic into one stream in event order.

A terminal is used by cards of all partitions, so every worker reads all partitions and takes
the records in the order of their keys (time, id).  For a backlog this order does not depend
on how the broker's answers arrive.  At the live end of the topic a record waits for slower
partitions at most ``reorder_wait_ms`` after the broker's time.

Pure: no Kafka and no clock; both come in as arguments.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from heapq import heappop, heappush
from typing import Generic, NamedTuple, TypeVar

from apps.fraud.transaction import TransactionId

Key = tuple[int, TransactionId]
Item = TypeVar("Item")

_FIRST = (-1,)  # sorts before every key: times are never negative


class _Waiting(NamedTuple, Generic[Item]):
    item: Item
    key: Key | tuple[int]
    broker_time_ms: int


class EventTimeMerge(Generic[Item]):
    """Buffers records of several partitions and releases them in the order of their keys.

    Records of one partition keep their order; if their keys rise, the whole output rises.

    Args:
        partitions: All partitions that are read.
        reorder_wait_ms: How long, by the broker's time, a record waits for an idle partition.
        max_buffered: Records of one partition from which on it should be paused.
    """

    def __init__(
        self, partitions: Iterable[int], reorder_wait_ms: int, max_buffered: int = 20_000
    ) -> None:
        self._buffers: dict[int, deque[_Waiting[Item]]] = {p: deque() for p in partitions}
        self._last_key: dict[int, Key | tuple[int]] = dict.fromkeys(self._buffers, _FIRST)
        self._heads: list[tuple[Key | tuple[int], int]] = []
        self._empty = set(self._buffers)
        self._reorder_wait_ms = reorder_wait_ms
        self._max_buffered = max_buffered

    def push(self, partition: int, item: Item, key: Key | None, broker_time_ms: int) -> None:
        """Append a record to its partition; without a key it follows its predecessor.

        Raises:
            KeyError: The partition is not one of those given.
        """
        buffer = self._buffers[partition]
        own_key = self._last_key[partition] if key is None else key
        self._last_key[partition] = own_key
        buffer.append(_Waiting(item, own_key, broker_time_ms))
        if len(buffer) == 1:
            self._empty.discard(partition)
            heappush(self._heads, (own_key, partition))

    def ready(self, now_ms: int, caught_up: Mapping[int, bool]) -> list[Item]:
        """Return, and forget, all records whose turn has come.

        Args:
            now_ms: The present, on the broker's clock.
            caught_up: Partitions of which the broker has no more records than were pushed; one
                that is left out is not caught up.
        """
        released: list[Item] = []
        while self._heads and self._may_release(now_ms, caught_up):
            _, partition = heappop(self._heads)
            buffer = self._buffers[partition]
            released.append(buffer.popleft().item)
            if buffer:
                heappush(self._heads, (buffer[0].key, partition))
            else:
                self._empty.add(partition)
        return released

    def paused(self) -> list[int]:
        """Return the partitions to read no further for now; never one that others wait for."""
        return [p for p, buffer in self._buffers.items() if len(buffer) >= self._max_buffered]

    @property
    def num_buffered(self) -> int:
        """Records that wait for their turn."""
        return sum(map(len, self._buffers.values()))

    def _may_release(self, now_ms: int, caught_up: Mapping[int, bool]) -> bool:
        if not self._empty:
            return True
        if not all(caught_up.get(partition, False) for partition in self._empty):
            return False
        head = self._buffers[self._heads[0][1]][0]
        return head.broker_time_ms + self._reorder_wait_ms <= now_ms
