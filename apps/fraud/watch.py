"""Reads the answer topics from outside: counts, latencies, and who was caught.

Latency of a decision = timestamp of its record in the decisions topic minus
timestamp of its transaction's record, so both clocks are Kafka's.
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from apps.fraud.ledger import DUPLICATE_HEADER
from apps.fraud.rules import APPROVE
from apps.fraud.settings import Topics
from apps.fraud.stream import Record, Stream, TopicPartition
from apps.fraud.transport import KafkaSettings, KafkaStream

# Latency lies between Kafka's timestamps, so a reader may come late; a few large fetches leave
# the processors to what is measured.
LAZY_FETCH: Mapping[str, Any] = {"fetch_max_wait_ms": 500, "fetch_min_bytes": 1 << 20}


@dataclass(slots=True)
class Answers:
    """What was read from the decisions and dead-letter topics so far.

    ``latency_ms`` and ``timestamp_ms`` run parallel: one entry per decision,
    its latency and the timestamp of its transaction.
    """

    by_decision: Counter[str] = field(default_factory=Counter)
    by_error: Counter[str] = field(default_factory=Counter)
    repeats: int = 0
    latency_ms: list[int] = field(default_factory=list)
    timestamp_ms: list[int] = field(default_factory=list)
    flagged: set[int | str] = field(default_factory=set)
    places: Counter[tuple[int, int]] = field(default_factory=Counter)

    @property
    def num_decisions(self) -> int:
        """Decisions that were read."""
        return self.by_decision.total()

    @property
    def num_dead_letters(self) -> int:
        """Dead letters of transactions that were read."""
        return self.by_error.total()

    def quantiles_ms(
        self, *, after_ms: int = 0, before_ms: float = np.inf, last: int | None = None
    ) -> tuple[float, float]:
        """Return p50 and p99 latency of transactions sent in a stretch of time; NaN for none.

        Args:
            after_ms: Kafka timestamp of the first transaction that counts.
            before_ms: Of the first one behind it that does not.
            last: Look at so many of the latest decisions only.
        """
        newest = slice(None if last is None else -last, None)
        latency = np.asarray(self.latency_ms[newest], np.int64)
        sent = np.asarray(self.timestamp_ms[newest], np.int64)
        latency = latency[(sent >= after_ms) & (sent < before_ms)]
        if not latency.size:
            return float("nan"), float("nan")
        p50, p99 = np.quantile(latency, [0.5, 0.99])
        return float(p50), float(p99)

    @property
    def last_ms(self) -> int:
        """Kafka timestamp of the latest decision, 0 if none."""
        return max(map(int.__add__, self.timestamp_ms, self.latency_ms), default=0)

    def num_caught(self, frauds: Collection[int | str]) -> int:
        """Return how many of these transactions were not approved."""
        return len(self.flagged.intersection(frauds))


class Watch:
    """Follows the answer topics through a stream of its own."""

    def __init__(self, stream: Stream, topics: Topics, *, from_start: bool = True) -> None:
        self.answers = Answers()
        self._stream = stream
        self._topics = topics
        start: dict[TopicPartition, int] = {}
        for topic in (topics.decisions, topics.dead_letters):
            for p, (first, after) in stream.bounds(topic).items():
                start[TopicPartition(topic, p)] = first if from_start else after
        stream.assign(start)

    def read(self, timeout_s: float) -> int:
        """Take in what has come; return the number of answers."""
        runs = self._stream.poll(timeout_s)
        for run in runs:
            take = self._decision if run[0].topic == self._topics.decisions else self._dead_letter
            for record in run:
                take(record)
        return sum(map(len, runs))

    def _decision(self, record: Record) -> None:
        answers, decision = self.answers, json.loads(record.value or b"{}")
        answers.by_decision[decision["decision"]] += 1
        repeated = dict(record.headers or ()).get(DUPLICATE_HEADER)
        if repeated is not None:
            answers.repeats += 1
            partition, offset = map(int, repeated.split(b":"))
            answers.places[partition, offset] += 1
            return
        answers.places[_place(decision)] += 1
        sent_ms = decision["input"]["timestamp"]
        answers.latency_ms.append(record.timestamp - sent_ms)
        answers.timestamp_ms.append(sent_ms)
        if decision["decision"] != APPROVE:
            answers.flagged.add(decision["transaction_id"])

    def _dead_letter(self, record: Record) -> None:
        letter = json.loads(record.value or b"{}")
        if letter["input"]["topic"] == self._topics.transactions:
            self.answers.by_error[letter["error_class"]] += 1
            self.answers.places[_place(letter)] += 1


def _place(answer: Mapping[str, Mapping[str, int]]) -> tuple[int, int]:
    return answer["input"]["partition"], answer["input"]["offset"]


def open_watch_stream(kafka: KafkaSettings) -> KafkaStream:
    """Return a stream for a ``Watch``: its fetches are few and large."""
    return KafkaStream(replace(kafka, options={**kafka.options, **LAZY_FETCH}))
