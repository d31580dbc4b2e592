"""As of when a kafka-python consumer has read a partition to its end.

A high watermark is as old as the last answered fetch, however often the consumer is polled
meanwhile: while a fetch is slow, or a partition is paused, it seems read to its end although the
log has grown.  Whoever merges partitions needs the age of that knowledge too (Kafka Streams:
KIP-695).  kafka-python does not tell it, so its fetcher is listened to: here, and nowhere else.
"""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from kafka import KafkaConsumer
from kafka import TopicPartition as KafkaPartition
from kafka.protocol.consumer import FetchResponse

_NO_ERROR = 0


class Seen(NamedTuple):
    """What the last answered fetch of a partition said.

    Args:
        asked_ms: Milliseconds since the epoch before it was sent: what was in the log by then
            lies before ``highwater``.
        highwater: Offset of the log's next record.
    """

    asked_ms: int
    highwater: int


class FetchWatch:
    """Notes the answered fetches of a consumer; its network thread writes, any may read.

    Args:
        consumer: Not polled yet.
    """

    def __init__(self, consumer: KafkaConsumer) -> None:
        self._seen: dict[KafkaPartition, Seen] = {}
        self._asked_ms: dict[int, int] = {}  # by node, which has one fetch under way at most
        fetcher = consumer._fetcher
        self._create = fetcher._create_fetch_requests
        self._handle = fetcher._handle_fetch_response
        fetcher._create_fetch_requests = self._on_create
        fetcher._handle_fetch_response = self._on_response

    def seen(self, partition: KafkaPartition) -> Seen | None:
        """Return what the last answered fetch of a partition said; None before the first."""
        return self._seen.get(partition)

    def _on_create(self) -> dict[int, Any]:
        now_ms = time.time_ns() // 1_000_000
        requests: dict[int, Any] = self._create()
        self._asked_ms.update(dict.fromkeys(requests, now_ms))
        return requests

    def _on_response(
        self,
        node: int,
        offsets: Mapping[KafkaPartition, int],
        sent_s: float,
        response: FetchResponse,
    ) -> None:
        self._handle(node, offsets, sent_s, response)
        asked_ms = self._asked_ms[node]
        given = {
            KafkaPartition(topic.topic, part.partition_index): part
            for topic in response.responses
            for part in topic.partitions
        }
        goes_on = response.session_id > 0  # then a partition without news is left out
        for tp in offsets:
            if (part := given.get(tp)) is not None:
                if part.error_code == _NO_ERROR and part.high_watermark >= 0:
                    self._seen[tp] = Seen(asked_ms, part.high_watermark)
            elif goes_on and (last := self._seen.get(tp)) is not None:
                self._seen[tp] = Seen(asked_ms, last.highwater)
