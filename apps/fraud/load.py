"""A load generator process: transactions and labels into Kafka on a fixed schedule.

Open loop: what is due is sent, whether or not anything was answered.  Event times
come from the table, so the rate compresses them; a label is sent when event time
has passed its transaction by ``LABEL_LAG_MS``, before it may be seen (7 days).

    python -m apps.fraud.load --bootstrap-servers S --table T.parquet --rate 1500
"""

import argparse
import gc
import json
import random
import sys
import time
import zlib
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from apps.fraud.settings import Topics
from apps.fraud.stream import Ack, Outgoing, Stream
from apps.fraud.table import LABEL_COLUMN
from apps.fraud.transaction import TransactionSchema
from apps.fraud.transport import KafkaSettings, KafkaStream, read_options

LABEL_LAG_MS = 5 * 86_400_000  # an investigation takes days, fewer than the 7 of the rule
_TICK_S = 0.005
_LINGER_MS = 10  # part of the measured latency; a request to the broker per message costs more
_LABEL_LINGER_MS = 250  # nobody waits for a label
_MALFORMED = (
    b"{not json",
    b'{"TRANSACTION_ID": 1, "TX_DATETIME": "2026-01-01T00:00:00"}',
    b'{"TRANSACTION_ID":2,"TX_DATETIME":"2026-01-01","CUSTOMER_ID":"c","TERMINAL_ID":"t","TX_AMOUNT":NaN}',
)


class Faults(NamedTuple):
    """How many messages of a stream are wrong on purpose, and how many come twice."""

    malformed: int = 0
    duplicates: int = 0


NO_FAULTS = Faults()


class Message(NamedTuple):
    """A message, how many transactions are due before it, and whether it is a label."""

    due: int
    out: Outgoing
    is_label: bool = False


class Sent(NamedTuple):
    """What a load generator did; ``max_late_ms`` is behind its own schedule."""

    transactions: int
    labels: int
    failed: int
    seconds: float
    offered_tx_s: float
    max_late_ms: float


def encode_table(
    table: pd.DataFrame, topics: Topics, num_partitions: int, faults: Faults = NO_FAULTS
) -> list[Message]:
    """Return the messages of a canonical table in event-time order, labels interleaved.

    Args:
        table: Columns of ``apps.fraud.table``; with labels, those are sent too.
        topics: Names of the input topics, equally partitioned.
        num_partitions: Of each; a card's transactions share a partition.
        faults: Spread evenly; a duplicate follows its original by up to 100 messages.
    """
    transactions = list(_transactions(table, topics.transactions, num_partitions))
    messages = [Message(i, out) for i, out in enumerate(transactions)]
    chosen = random.Random(0)  # noqa: S311 - where duplicates go
    for k in range(faults.malformed):
        at = (k + 1) * len(messages) // (faults.malformed + 1)
        value = _MALFORMED[k % len(_MALFORMED)]
        messages.append(
            Message(at, Outgoing(topics.transactions, k % num_partitions, None, value, []))
        )
    for k in range(faults.duplicates):
        at = (k + 1) * len(transactions) // (faults.duplicates + 1)
        messages.append(Message(at + chosen.randrange(100), transactions[at]))
    if LABEL_COLUMN in table:
        messages += _labels(table, topics.labels, num_partitions)
    return sorted(messages, key=lambda message: message.due)


def _transactions(table: pd.DataFrame, topic: str, num_partitions: int) -> Iterator[Outgoing]:
    stamps = pd.to_datetime(table["time_ms"], unit="ms").dt.strftime("%Y-%m-%dT%H:%M:%S.%f")
    for identifier, stamp, card, terminal, minor in zip(
        table["transaction_id"].tolist(),
        stamps.tolist(),
        table["card"].tolist(),
        table["terminal"].tolist(),
        table["amount_minor"].tolist(),
        strict=True,
    ):
        key = str(card).encode()
        value = (
            f'{{"TRANSACTION_ID":{json.dumps(identifier)},"TX_DATETIME":"{stamp}",'
            f'"CUSTOMER_ID":"{card}","TERMINAL_ID":"{terminal}",'
            f'"TX_AMOUNT":{minor // 100}.{minor % 100:02d}}}'
        )
        yield Outgoing(topic, zlib.crc32(key) % num_partitions, key, value.encode(), [])


def _labels(table: pd.DataFrame, topic: str, num_partitions: int) -> Iterator[Message]:
    due = table["time_ms"].searchsorted(table["time_ms"] + LABEL_LAG_MS)
    for k, (identifier, label, at) in enumerate(
        zip(
            table["transaction_id"].tolist(),
            table[LABEL_COLUMN].tolist(),
            due.tolist(),
            strict=True,
        )
    ):
        if at < len(table):
            value = f'{{"TRANSACTION_ID":{json.dumps(identifier)},"TX_FRAUD":{int(label)}}}'
            yield Message(
                at, Outgoing(topic, k % num_partitions, None, value.encode(), []), is_label=True
            )


def send_on_schedule(
    stream: Stream, messages: Sequence[Message], rate_tx_s: float, labels: Stream | None = None
) -> Sent:
    """Send messages at a rate of transactions per second, then wait for the broker.

    Labels go through a stream of their own if there is one.

    Acknowledged messages are forgotten at once: a generator that keeps a hundred thousand of
    them is stopped by its own garbage collector (docs/log.md#stalls).
    """
    acks: deque[Ack] = deque()
    failed = 0
    elapsed_s = latest_s = 0.0
    begin_s = time.perf_counter()
    for message in messages:
        due_s = message.due / rate_tx_s
        if elapsed_s < due_s:
            while (elapsed_s := time.perf_counter() - begin_s) < due_s:
                time.sleep(min(_TICK_S, due_s - elapsed_s))
        latest_s = max(latest_s, elapsed_s - due_s)
        by = labels if labels is not None and message.is_label else stream
        acks.append(by.send(message.out))
        while acks and acks[0].is_done:
            failed += acks.popleft().exception is not None
    seconds = time.perf_counter() - begin_s
    for ack in acks:
        while not ack.is_done:
            time.sleep(_TICK_S)
        failed += ack.exception is not None
    num_labels = sum(message.is_label for message in messages)
    transactions = len(messages) - num_labels
    rate = transactions / max(seconds, _TICK_S)
    return Sent(transactions, num_labels, failed, seconds, rate, 1e3 * latest_s)


def main(arguments: Sequence[str] | None = None) -> int:
    """Send a table; the last line of output is ``Sent`` as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bootstrap-servers", required=True)
    parser.add_argument("--kafka-config", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--table", type=Path, required=True, help="CSV or parquet, handbook columns"
    )
    parser.add_argument("--rate", type=float, required=True, help="transactions per second")
    parser.add_argument("--transactions-topic", default=Topics().transactions)
    parser.add_argument("--labels-topic", default=Topics().labels)
    parser.add_argument("--warm-up", type=int, default=0, help="sent first; then stdin is awaited")
    parser.add_argument("--malformed", type=int, default=0)
    parser.add_argument("--duplicates", type=int, default=0)
    args = parser.parse_args(arguments)
    given = read_options(args.kafka_config)
    stream, labels = (
        KafkaStream(KafkaSettings(args.bootstrap_servers, options={"linger_ms": ms, **given}))
        for ms in (_LINGER_MS, _LABEL_LINGER_MS)
    )
    topics = Topics(args.transactions_topic, args.labels_topic)
    partitions = len(stream.partitions(topics.transactions))
    faults = Faults(args.malformed, args.duplicates)
    table = TransactionSchema().read_table(args.table)
    messages = encode_table(table, topics, partitions, faults)
    gc.freeze()  # the messages stay; the collector need not walk them again and again
    first = bisect_left(messages, args.warm_up, key=lambda message: message.due)
    send_on_schedule(stream, messages[:first], args.rate, labels)
    if args.warm_up:
        sys.stdin.readline()
    rest = [message._replace(due=message.due - args.warm_up) for message in messages[first:]]
    sent = send_on_schedule(stream, rest, args.rate, labels)
    stream.close()
    labels.close()
    sys.stdout.write(json.dumps(sent._asdict()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
