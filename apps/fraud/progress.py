"""Offsets that are settled: the position of a partition is its first open record."""

from collections.abc import Mapping

from apps.fraud.stream import TopicPartition


class Progress:
    """Positions of partitions whose records are settled out of order.

    Args:
        positions: Offset of the first record that will be opened, per partition.
    """

    def __init__(self, positions: Mapping[TopicPartition, int]) -> None:
        self._next: dict[TopicPartition, int] = dict(positions)
        self._told: dict[TopicPartition, int] = dict(positions)
        self._open: dict[TopicPartition, dict[int, None]] = {tp: {} for tp in positions}

    def open(self, partition: TopicPartition, offset: int) -> None:
        """Note a record that was read; offsets rise within a partition."""
        self._open[partition][offset] = None
        self._next[partition] = offset + 1

    def settle(self, partition: TopicPartition, offset: int) -> None:
        """Note that nothing more is to be done for an open record."""
        del self._open[partition][offset]

    def num_open(self, partition: TopicPartition) -> int:
        """Return how many records of a partition are read but not settled."""
        return len(self._open[partition])

    def positions(self) -> dict[TopicPartition, int]:
        """Return the first offset of each partition that is not settled yet."""
        return {tp: next(iter(waiting), self._next[tp]) for tp, waiting in self._open.items()}

    def moved(self) -> dict[TopicPartition, int]:
        """Return the positions that changed since the last call."""
        now = self.positions()
        changed = {tp: offset for tp, offset in now.items() if offset != self._told[tp]}
        self._told = now
        return changed
