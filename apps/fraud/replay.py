"""Re-drive a topic: the messages of one topic, or the payloads of dead letters, sent again.

Keys, order within a partition and headers are kept.  A payload that its dead letter
holds only in part cannot be sent again and is counted.
"""

import argparse
import base64
import json
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

from apps.fraud.stream import Ack, Outgoing, Record, Stream
from apps.fraud.transport import KafkaSettings, KafkaStream, read_options

_TICK_S = 0.005
_MAX_UNACKNOWLEDGED = 10_000


class Replayed(NamedTuple):
    """Messages sent again, and payloads of which only a part was kept."""

    sent: int
    truncated: int


def replay(
    stream: Stream,
    source: str,
    target: str,
    *,
    payloads: bool = False,
    rate_tx_s: float | None = None,
) -> Replayed:
    """Send what a topic holds now to another topic.

    Args:
        stream: Reads the one and writes the other.
        source: Topic to read from its beginning to its present end.
        target: Topic to write.
        payloads: The source holds dead letters; send the payloads they carry.
        rate_tx_s: Messages per second at most.
    """
    num_partitions = len(stream.partitions(target))
    first = {p: first for p, (first, _) in stream.bounds(source).items()}
    truncated, acks, begin_s = 0, list[Ack](), time.perf_counter()
    for value, record in _values(stream.tail(source, first), payloads=payloads):
        if value is None:
            truncated += 1
            continue
        headers = [] if payloads else list(record.headers or ())
        partition = record.partition % num_partitions
        acks.append(stream.send(Outgoing(target, partition, record.key, value, headers)))
        if len(acks) % _MAX_UNACKNOWLEDGED == 0:
            _wait(acks)
        if rate_tx_s is not None:
            time.sleep(max(0.0, begin_s + len(acks) / rate_tx_s - time.perf_counter()))
    _wait(acks)
    return Replayed(len(acks), truncated)


def _values(records: Iterator[Record], *, payloads: bool) -> Iterator[tuple[bytes | None, Record]]:
    for record in records:
        if not payloads:
            yield record.value or b"", record
            continue
        letter = json.loads(record.value or b"{}")
        payload = base64.b64decode(letter["payload"])
        yield (payload if len(payload) == letter["payload_bytes"] else None), record


def _wait(acks: list[Ack]) -> None:
    while not all(ack.is_done for ack in acks):
        time.sleep(_TICK_S)
    for ack in acks:
        if ack.exception is not None:
            raise ack.exception


def main(args: argparse.Namespace) -> int:
    """Run ``trimoe fraud replay``."""
    options = read_options(args.kafka_config, args.kafka_config_file)
    stream = KafkaStream(KafkaSettings(args.bootstrap_servers, options=options))
    try:
        replayed = replay(
            stream,
            args.from_topic,
            args.to_topic,
            payloads=args.payloads,
            rate_tx_s=args.rate,
        )
    finally:
        stream.close()
    sys.stdout.write(f"{replayed.sent} messages sent again, {replayed.truncated} not complete\n")
    return 0 if replayed.truncated == 0 else 1
