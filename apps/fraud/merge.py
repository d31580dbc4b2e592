"""Merging the partitions of a topic into one stream in event order.

A terminal is used by cards of all partitions, so every worker reads all partitions and takes
the records in the order of their keys (time, id).  For a backlog this order does not depend
on how the broker's answers arrive.  At the live end of the topic a record is passed on when every
other partition was read to its end ``reorder_wait_ms`` after the broker took the record; one that
enters the log later than that comes out of order, and is counted.

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
_NEVER = -1


class _Waiting(NamedTuple, Generic[Item]):
    item: Item
    key: Key | tuple[int]
    broker_time_ms: int


class EventTimeMerge(Generic[Item]):
    """Buffers records of several partitions and releases them in the order of their keys.

    Records of one partition keep their order; if their keys rise, the whole output rises.

    Args:
        partitions: All partitions that are read.
        reorder_wait_ms: How much later than a record those before it may enter the log.
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
        self._released: Key | tuple[int] = _FIRST
        self.num_late = 0  # records that came after later ones had left

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

    def ready(self, caught_up_at: Mapping[int, int]) -> list[Item]:
        """Return, and forget, all records whose turn has come.

        Args:
            caught_up_at: Milliseconds by the broker's clock as of which a partition had no more
                records than were pushed; one that may have more is left out.
        """
        released: list[Item] = []
        while self._heads and self._may_release(caught_up_at):
            key, partition = heappop(self._heads)
            self.num_late += key < self._released
            self._released = max(key, self._released)
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

    def _may_release(self, caught_up_at: Mapping[int, int]) -> bool:
        head = self._buffers[self._heads[0][1]][0]
        needed_ms = head.broker_time_ms + self._reorder_wait_ms
        return all(caught_up_at.get(p, _NEVER) >= needed_ms for p in self._empty)
