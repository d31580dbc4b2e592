"""On the wire: no acknowledgement before the disk has it, and the broker's repetition kept once.

The broker of the other tests forgets what was on its way when a connection ends, so here a socket
says the few packets of MQTT 3.1.1 that matter.
"""

import json
import socket
import threading
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from apps.maintenance.telemetry import receiver as receivers
from apps.maintenance.telemetry.history import TELEMETRY_TABLE, History, parts
from apps.maintenance.telemetry.intake import REJECTED, Intake
from apps.maintenance.telemetry.messages import KINDS, Message
from apps.maintenance.telemetry.mqtt import Address, Connection
from apps.maintenance.telemetry.plant import Plant
from apps.maintenance.telemetry.receiver import Receiver

NOW_S = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
CONNECT, PUBLISH_1, PUBACK, SUBSCRIBE = 0x10, 0x32, 0x40, 0x82
DUPLICATE = 0x08
PACKET = 7  # number of the message


class Wire:
    """The broker's end of one connection."""

    def __init__(self, listener: socket.socket, *, is_resumed: bool) -> None:
        self.socket, _ = listener.accept()
        self.socket.settimeout(10)
        self.expect(CONNECT)
        self.socket.sendall(bytes([0x20, 2, int(is_resumed), 0]))

    def expect(self, kind: int) -> bytes:
        """Return the body of the next packet of a kind."""
        while True:
            first = self.read(1)[0]
            body = self.read(self.read(1)[0])
            if first == kind:
                return body

    def read(self, num: int) -> bytes:
        data = b""
        while len(data) < num:
            part = self.socket.recv(num - len(data))
            assert part, "the client went away"
            data += part
        return data

    def publish(self, payload: bytes, flags: int) -> None:
        topic = b"plant/M1/telemetry"
        body = len(topic).to_bytes(2) + topic + PACKET.to_bytes(2) + payload
        assert len(body) < 128
        self.socket.sendall(bytes([PUBLISH_1 | flags, len(body)]) + body)


@pytest.mark.clock
def test_a_message_is_repeated_until_it_is_on_disk_and_kept_once(
    tmp_path: Path, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receivers, "DISK_PAUSE_S", 0.05)
    is_full, append = threading.Event(), History.append
    is_full.set()
    tried = threading.Event()

    def limited(history: History, messages: list[Message]) -> None:
        tried.set()
        if is_full.is_set():
            raise OSError(28, "No space left on device")
        append(history, messages)

    monkeypatch.setattr(History, "append", limited)
    moment = datetime.fromtimestamp(NOW_S, UTC).isoformat()
    payload = json.dumps({"time": moment, "values": {"vibration": 4.0}}).encode()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        connection = Connection(Address.parse(f"mqtt://127.0.0.1:{port}/plant"), "test", KINDS)
        intake = Intake(plant, "plant", tmp_path / REJECTED, lambda: NOW_S)
        receiver = Receiver(
            connection, intake, History(tmp_path / "history", plant), lambda *_: None
        )
        running = threading.Thread(target=receiver.run)
        with connection:
            running.start()
            wire = Wire(listener, is_resumed=False)
            wire.expect(SUBSCRIBE)
            wire.publish(payload, 0)
            assert tried.wait(5)
            wire.socket.settimeout(0.3)
            with pytest.raises(TimeoutError):
                wire.expect(PUBACK)  # the disk is full
            wire.socket.close()
            again = Wire(listener, is_resumed=True)
            is_full.clear()
            again.publish(payload, DUPLICATE)
            assert again.expect(PUBACK) == PACKET.to_bytes(2)
            receiver.stop()
            running.join()
            again.socket.close()
    receiver.seal(datetime(2026, 1, 1, tzinfo=UTC))
    assert receiver.counts["kept"] == 1
    (file,) = parts(tmp_path / "history", TELEMETRY_TABLE)
    assert pq.read_table(file).num_rows == 1
