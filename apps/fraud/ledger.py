"""The decisions of the last transactions, so that a duplicate repeats its own.

Also knows, after a restart, which messages were answered although their offsets
were not committed: their answers stand in the decisions and dead-letter topics.
"""

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping

from apps.fraud.stream import Record, Stream, TopicPartition

DUPLICATE_HEADER = "duplicate"  # value: "partition:offset" of the repeated message
CAPACITY = 50_000  # decisions; 10 s at 5,000 transactions/s, about 25 MB


class DecisionLedger:
    """Bounded map from transaction id to the bytes of its decision, oldest out first."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._decisions: OrderedDict[int | str, bytes] = OrderedDict()  # finds its oldest at once
        self._answered: set[tuple[str, int, int]] = set()

    def remember(self, transaction_id: int | str, decision: bytes) -> None:
        """Keep a decision, and forget the oldest one when full."""
        self._decisions[transaction_id] = decision
        if len(self._decisions) > self._capacity:
            self._decisions.popitem(last=False)

    def decision_of(self, transaction_id: int | str) -> bytes | None:
        """Return the decision of an id, or None if it is not known any more."""
        return self._decisions.get(transaction_id)

    def was_answered(self, record: Record) -> bool:
        """Tell whether an earlier run answered this message, by its place in the log."""
        place = (record.topic, record.partition, record.offset)
        return bool(self._answered) and place in self._answered

    def recover(self, records: Iterable[Record], open_from: Mapping[TopicPartition, int]) -> None:
        """Take over the answers of an earlier run.

        Args:
            records: Tail of the decisions or dead-letter topic.
            open_from: Committed offset per owned input partition; answers to
                earlier messages need no mark.
        """
        for record in records:
            answer = json.loads(record.value or b"{}")
            place = answer["input"]
            tp, offset = TopicPartition(place["topic"], place["partition"]), place["offset"]
            repeated = dict(record.headers or ()).get(DUPLICATE_HEADER)
            if repeated is not None:
                partition, offset = map(int, repeated.split(b":"))
                tp = TopicPartition(tp.topic, partition)
            elif "transaction_id" in answer and tp in open_from:
                self.remember(answer["transaction_id"], record.value or b"")
            if offset >= open_from.get(tp, offset + 1):
                self._answered.add((*tp, offset))


def recover_ledger(
    stream: Stream,
    topics: Iterable[str],
    open_from: Mapping[TopicPartition, int],
    capacity: int = CAPACITY,
) -> DecisionLedger:
    """Rebuild the ledger of some input partitions from the ends of the answer topics.

    An answer goes to the partition of its input modulo the number of partitions,
    so only those are read, ``capacity`` records in all.
    """
    ledger = DecisionLedger(capacity)
    for topic in topics:
        bounds = stream.bounds(topic)
        wanted = {answer_partition(tp.partition, len(bounds)) for tp in open_from}
        share = -(-capacity // max(1, len(wanted)))
        first = {p: max(bounds[p][0], bounds[p][1] - share) for p in wanted}
        ledger.recover(stream.tail(topic, first), open_from)
    return ledger


def answer_partition(input_partition: int, num_partitions: int) -> int:
    """Return where the answer to a message of this input partition is written."""
    return input_partition % num_partitions
