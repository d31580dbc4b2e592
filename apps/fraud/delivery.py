"""Answers in order: decisions and dead letters out, then acknowledgements, then offsets.

An input offset is settled only when the broker has acknowledged its answer; an
answer whose delivery failed is sent again as it was.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from apps.fraud.decision import Policy, Provenance, decide, encode_decisions
from apps.fraud.features import Features
from apps.fraud.ledger import DUPLICATE_HEADER, DecisionLedger, answer_partition
from apps.fraud.progress import Progress
from apps.fraud.recovery import Snapshot, write_snapshot
from apps.fraud.rejection import Rejection, encode_rejection
from apps.fraud.scoring import Scores
from apps.fraud.settings import Topics
from apps.fraud.stages import StageClock
from apps.fraud.stream import Ack, Outgoing, Record, Stream, TopicPartition
from apps.fraud.transaction import Transaction

logger = logging.getLogger(__name__)

MAX_KEY_BYTES = 1024  # of a rejected message; a longer key is left to the payload's source
_ACK_LOOK_S = 0.002  # how often acknowledgements are looked at when nothing else happens


@dataclass(slots=True)
class Step:
    """What one turn of the service took in, on its way to being answered."""

    records: list[Record] = field(default_factory=list)
    transactions: list[Transaction] = field(default_factory=list)
    features: Features | None = None
    scores: "asyncio.Task[Scores] | None" = None
    repeats: list[tuple[Transaction, Record]] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    snapshot: Snapshot | None = None


class _Sent(NamedTuple):
    record: Record
    message: Outgoing
    ack: Ack


class _Waiting(NamedTuple):
    sent: list[_Sent]
    snapshot: Snapshot | None


@dataclass
class Delivery:
    """Turns scored steps into acknowledged answers and settled offsets.

    Args:
        stream: Where answers go.
        topics: Names of the answer topics.
        policy: Thresholds and rules.
        ledger: Decisions for duplicates.
        answered: Progress of the owned input partitions.
        worker_dir: Where snapshots go.
        stages: Stage times.
        now_ms: Milliseconds since the epoch.
    """

    stream: Stream
    topics: Topics
    policy: Policy
    ledger: DecisionLedger
    answered: Progress
    worker_dir: Path | None
    stages: StageClock
    now_ms: Callable[[], int]
    num_decisions: int = 0
    num_dead_letters: int = 0
    num_repeats: int = 0
    _waiting: deque[_Waiting] = field(default_factory=deque)
    _unwritten: Snapshot | None = None
    _writing: "asyncio.Task[Path] | None" = None
    _num_partitions: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for topic in (self.topics.decisions, self.topics.dead_letters):
            self._num_partitions[topic] = len(self.stream.partitions(topic))

    async def deliver(self, step: Step) -> None:
        """Send the answers of a step; waits for its scores, not for acknowledgements."""
        answers: list[tuple[Record, Outgoing]] = []
        if step.scores is not None and step.features is not None:
            scores = await step.scores
            with self.stages.measure("decide", len(step.records)):
                answers += self._decisions(step, step.features, scores)
        answers += [self._repeat(*repeat) for repeat in step.repeats]
        answers += [self._dead_letter(rejection) for rejection in step.rejections]
        with self.stages.measure("produce", len(answers)):
            sent = [_Sent(record, out, self.stream.send(out)) for record, out in answers]
        self._waiting.append(_Waiting(sent, step.snapshot))
        self.settle()

    def _decisions(
        self, step: Step, features: Features, scores: Scores
    ) -> list[tuple[Record, Outgoing]]:
        verdicts = decide(self.policy, step.transactions, features.context, scores.outputs)
        provenance = [
            Provenance(version, self.policy.version, features.digest(i))
            for i, version in enumerate(scores.model_versions)
        ]
        values = encode_decisions(
            verdicts, step.records, step.transactions, provenance, self.now_ms()
        )
        return [
            self._dead_letter(Rejection(record, *scores.errors[i]))
            if i in scores.errors
            else self._decision(record, transaction, value)
            for i, (record, transaction, value) in enumerate(
                zip(step.records, step.transactions, values, strict=True)
            )
        ]

    def _decision(
        self, record: Record, transaction: Transaction, value: bytes
    ) -> tuple[Record, Outgoing]:
        self.ledger.remember(transaction.transaction_id, value)
        self.num_decisions += 1
        key = transaction.card.encode()
        return record, self._answer(self.topics.decisions, record, key, value)

    def _repeat(self, transaction: Transaction, record: Record) -> tuple[Record, Outgoing]:
        value = self.ledger.decision_of(transaction.transaction_id)
        if value is None:
            message = f"id {transaction.transaction_id!r} came before and its decision is not kept any more"
            return self._dead_letter(Rejection(record, "DuplicateOfUnknown", message))
        self.num_repeats += 1
        self.num_decisions += 1
        place = f"{record.partition}:{record.offset}".encode()
        out = self._answer(
            self.topics.decisions, record, transaction.card.encode(), value
        )._replace(headers=[(DUPLICATE_HEADER, place)])
        return record, out

    def _dead_letter(self, rejection: Rejection) -> tuple[Record, Outgoing]:
        self.num_dead_letters += 1
        record = rejection.record
        value = encode_rejection(rejection)
        key = record.key if len(record.key or b"") <= MAX_KEY_BYTES else None
        return record, self._answer(self.topics.dead_letters, record, key, value)

    def _answer(self, topic: str, record: Record, key: bytes | None, value: bytes) -> Outgoing:
        partition = answer_partition(record.partition, self._num_partitions[topic])
        return Outgoing(topic, partition, key, value, [])

    def settle(self) -> None:
        """Settle the offsets of acknowledged answers, oldest step first."""
        moved = False
        while self._waiting and all(sent.ack.is_done for sent in self._waiting[0].sent):
            failed = [sent for sent in self._waiting[0].sent if sent.ack.exception is not None]
            if failed:
                self._send_again(failed)
                break
            done = self._waiting.popleft()
            for sent in done.sent:
                tp = TopicPartition(sent.record.topic, sent.record.partition)
                self.answered.settle(tp, sent.record.offset)
            self._unwritten = done.snapshot or self._unwritten
            moved = True
        self._write_newest()
        if moved:
            self.stream.commit(self.answered.moved())

    def _send_again(self, failed: Sequence[_Sent]) -> None:
        logger.warning("%d answers are sent again: %s", len(failed), failed[0].ack.exception)
        sent, snapshot = self._waiting.popleft()
        again = [item._replace(ack=self.stream.send(item.message)) for item in failed]
        kept = [item for item in sent if item.ack.exception is None]
        self._waiting.appendleft(_Waiting(kept + again, snapshot))

    def _write_newest(self) -> None:
        """Begin to write the newest snapshot, unless another is still being written."""
        if self._unwritten is None or self.worker_dir is None:
            return
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(
                asyncio.to_thread(write_snapshot, self.worker_dir, self._unwritten, self.now_ms())
            )
            self._unwritten = None

    async def drain(self) -> None:
        """Wait until every answer is acknowledged and the last snapshot is written."""
        while self._waiting:
            self.settle()
            await asyncio.sleep(_ACK_LOOK_S)
        while self._writing is not None:
            await self._writing
            self._writing = None
            self._write_newest()
