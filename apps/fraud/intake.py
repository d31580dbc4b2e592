"""From polled records to events in time order, labels in the state, and rejections."""

import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from apps.fraud.delivery import Step
from apps.fraud.labels import LabelSchema
from apps.fraud.ledger import DecisionLedger
from apps.fraud.merge import EventTimeMerge
from apps.fraud.pace import Pace
from apps.fraud.progress import Progress
from apps.fraud.recovery import Start
from apps.fraud.rejection import Rejection
from apps.fraud.settings import ServiceSettings
from apps.fraud.stages import StageClock
from apps.fraud.stream import Record, Stream, TopicPartition
from apps.fraud.transaction import DecodeError, Transaction, TransactionSchema

logger = logging.getLogger(__name__)

_MAX_BUFFERED = 20_000  # records of one partition that wait for the others, before it is held
_MAX_ADVANCE = 4096  # events per call of the state when few of them need an answer
_SHORT_POLL_S = 0.005  # while records wait for their turn
_IDLE_POLL_S = 0.02  # while none does; kafka-python now and then sleeps through an arrival


class Arrival(NamedTuple):
    """A transaction that waits for its turn, and whether this worker owes it an answer."""

    transaction: Transaction
    record: Record
    is_wanted: bool


class Polled(NamedTuple):
    """One poll: runs of records, and as of when which partitions are read to their end."""

    runs: Sequence[Sequence[Record]]
    caught_up_at: Mapping[TopicPartition, int]


@dataclass(frozen=True, slots=True)
class Schemas:
    """How messages of the two input topics are read."""

    transactions: TransactionSchema
    labels: LabelSchema


class Intake:
    """Reads records into the feature state and makes steps of what needs an answer.

    Args:
        settings: Of the worker.
        schemas: How messages are read.
        start: State and positions to begin with.
        ledger: Knows what an earlier run answered.
        stages: Stage times.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        schemas: Schemas,
        start: Start,
        ledger: DecisionLedger,
        stages: StageClock,
    ) -> None:
        self.state = start.state
        self.read = Progress(start.positions)
        self.answered = Progress(start.open_from)
        self.pace = Pace()
        self._settings = settings
        self._schemas = schemas
        self._open_from = start.open_from
        self._ledger = ledger
        self._stages = stages
        self._rejections: list[Rejection] = []
        self._labels = settings.topics.labels
        self._partitions = tuple(start.positions)
        self._caught_up_at: Mapping[TopicPartition, int] = {}
        self._merge = EventTimeMerge[Arrival](
            (tp.partition for tp in start.positions if tp.topic == settings.topics.transactions),
            settings.reorder_wait_ms,
            _MAX_BUFFERED,
        )
        self._ready: deque[Arrival] = deque()
        self._released_at_ms = 0
        self._warn_at = 1  # late ones; doubles
        self.num_inputs = 0

    def poll(self, stream: Stream) -> Polled:
        """Read what is there; blocks for a short time, and touches no state."""
        topics = self._settings.topics
        labels = [tp for tp in self._partitions if tp.topic == topics.labels]
        if all(tp in self._caught_up_at for tp in labels):
            held = [TopicPartition(topics.transactions, p) for p in self._merge.paused()]
        else:  # labels come first
            held = [tp for tp in self._partitions if tp.topic == topics.transactions]
        stream.pause(held)
        runs = stream.poll(self._wait_s())
        found = {tp: stream.caught_up_at(tp) for tp in self._partitions}
        return Polled(runs, {tp: at_ms for tp, at_ms in found.items() if at_ms is not None})

    def take(self, polled: Polled) -> None:
        """Decode records: labels go into the state, transactions wait for their turn."""
        self._caught_up_at = polled.caught_up_at
        for run in polled.runs:
            tp = TopicPartition(run[0].topic, run[0].partition)
            if tp.topic == self._labels:
                with self._stages.measure("labels", len(run)):
                    self._take_labels(tp, run)
            else:
                with self._stages.measure("decode", len(run)):
                    self._take_transactions(tp, run)

    def _take_labels(self, tp: TopicPartition, run: Sequence[Record]) -> None:
        for record in run:
            wanted = self._open(tp, record)
            try:
                self.state.add_label(self._schemas.labels.decode(record.value))
            except DecodeError as error:
                self._reject(tp, record, wanted, Rejection(record, error.error_class, str(error)))
                continue
            self.read.settle(tp, record.offset)
            if wanted:
                self.answered.settle(tp, record.offset)

    def _take_transactions(self, tp: TopicPartition, run: Sequence[Record]) -> None:
        decode, ahead_ms = self._schemas.transactions.decode, self._settings.max_ahead_ms
        for record in run:
            wanted = self._open(tp, record)
            try:
                transaction = decode(record.value)
            except DecodeError as error:
                self._reject(tp, record, wanted, Rejection(record, error.error_class, str(error)))
                continue
            if ahead_ms is not None and transaction.time_ms > record.timestamp + ahead_ms:
                message = (
                    f"expected an event time at most {ahead_ms} ms after the record's "
                    f"{record.timestamp}, got {transaction.time_ms}; replays opt out"
                )
                self._reject(tp, record, wanted, Rejection(record, "EventTimeAhead", message))
                continue
            key = (transaction.time_ms, transaction.transaction_id)
            arrival = Arrival(transaction, record, wanted)
            self._merge.push(tp.partition, arrival, key, record.timestamp)

    def _open(self, tp: TopicPartition, record: Record) -> bool:
        """Note a record; tell whether this worker owes it an answer."""
        self.read.open(tp, record.offset)
        open_from = self._open_from.get(tp)
        if open_from is None or record.offset < open_from:
            return False
        self.answered.open(tp, record.offset)
        if self._ledger.was_answered(record):
            self.answered.settle(tp, record.offset)
            return False
        self.num_inputs += tp.topic == self._settings.topics.transactions
        return True

    def _reject(
        self,
        tp: TopicPartition,
        record: Record,
        wanted: bool,
        rejection: Rejection,
    ) -> None:
        self.read.settle(tp, record.offset)
        if wanted:
            self._rejections.append(rejection)

    def _wait_s(self) -> float:
        return _SHORT_POLL_S if self._merge.num_buffered else _IDLE_POLL_S

    def steps(self, now_ms: int) -> Iterator[Step]:
        """Advance the state by all events whose turn has come; yield what needs answers."""
        waited_ms = now_ms - self._released_at_ms
        is_full = self._merge.num_buffered >= self._settings.max_request_size
        if is_full or not 0 <= waited_ms < self.pace.gap_ms:  # clocks may step back
            self._released_at_ms = now_ms
            with self._stages.measure("merge"):
                self._ready.extend(self._merge.ready(self._transactions_caught_up_at()))
            self._warn_of_late()
        while self._ready:
            yield self._next_step()
        if self._rejections:
            yield self._take_rejections(Step())

    def _transactions_caught_up_at(self) -> dict[int, int]:
        topic = self._settings.topics.transactions
        return {tp.partition: at for tp, at in self._caught_up_at.items() if tp.topic == topic}

    def _warn_of_late(self) -> None:
        if self._merge.num_late >= self._warn_at:
            self._warn_at = 2 * self._merge.num_late
            logger.warning(
                "%d transactions so far came after later ones had been taken in: expected within "
                "%d ms; a replay may give them other features; see --reorder-wait-ms",
                self._merge.num_late,
                self._settings.reorder_wait_ms,
            )

    def _take_rejections(self, step: Step) -> Step:
        step.rejections, self._rejections = self._rejections, []
        return step

    def _next_step(self) -> Step:
        step = self._take_rejections(Step())
        transactions: list[Transaction] = []
        wanted: list[bool] = []
        taken: set[int | str] = set()
        limit = self._settings.max_request_size
        while self._ready and len(step.records) < limit and len(transactions) < _MAX_ADVANCE:
            transaction, record, is_wanted = self._ready.popleft()
            self.read.settle(TopicPartition(record.topic, record.partition), record.offset)
            identifier = transaction.transaction_id
            if identifier in taken or self.state.seen(identifier):
                if is_wanted:
                    step.repeats.append((transaction, record))
                continue
            taken.add(identifier)
            transactions.append(transaction)
            wanted.append(is_wanted)
            if is_wanted:
                step.records.append(record)
                step.transactions.append(transaction)
        with self._stages.measure("state", len(transactions)):
            features = self.state.advance(transactions, wanted)
        step.features = features if step.records else None
        return step
