"""The load generator: open loop, and no memory of what was acknowledged."""

from dataclasses import dataclass, field

import pytest

from apps.fraud.load import Message, send_on_schedule
from apps.fraud.memory import MemoryAck, MemoryLog, MemoryStream
from apps.fraud.stream import Ack, Outgoing


def messages(count: int, *, every_other_is_label: bool = False) -> list[Message]:
    return [
        Message(i, Outgoing("t", 0, None, b"", []), is_label=every_other_is_label and i % 2 == 1)
        for i in range(count)
    ]


@dataclass(slots=True)
class SlowAck:
    """Done from the third look on."""

    failure: Exception | None = None
    looks: int = 0

    @property
    def is_done(self) -> bool:
        self.looks += 1
        return self.looks > 2

    @property
    def exception(self) -> Exception | None:
        return self.failure


@dataclass
class SlowStream(MemoryStream):
    """Acknowledges late; every tenth message fails."""

    acks: list[SlowAck] = field(default_factory=list)

    def send(self, message: Outgoing) -> Ack:
        self.acks.append(SlowAck(OSError("no") if len(self.acks) % 10 == 9 else None))
        return self.acks[-1]


def test_schedule_is_kept_whatever_the_acknowledgements_do() -> None:
    stream = SlowStream(MemoryLog({"t": 1}, lambda: 0), "g")
    sent = send_on_schedule(stream, messages(100), rate_tx_s=1000.0)
    assert (sent.transactions, sent.failed) == (100, 10)
    assert sent.seconds == pytest.approx(0.1, abs=0.05)
    assert all(ack.looks > 2 for ack in stream.acks)


def test_labels_take_their_own_way() -> None:
    log = MemoryLog({"t": 1}, lambda: 0)
    stream, labels = SlowStream(log, "g"), MemoryStream(log, "g")
    sent = send_on_schedule(stream, messages(10, every_other_is_label=True), 1e6, labels)
    assert (sent.transactions, sent.labels, len(stream.acks)) == (5, 5, 5)
    assert len(log.topic("t")) == 5
    assert isinstance(labels.send(messages(1)[0].out), MemoryAck)
