"""Messages through a real broker into the history: nothing lost, nothing silent."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from apps.maintenance.telemetry import receiver as receivers
from apps.maintenance.telemetry.history import History
from apps.maintenance.telemetry.intake import REJECTED, Intake
from apps.maintenance.telemetry.messages import KINDS, Message
from apps.maintenance.telemetry.mqtt import ACKNOWLEDGE, Address, Connection, Delivery
from apps.maintenance.telemetry.plant import Plant
from apps.maintenance.telemetry.receiver import Receiver
from apps.maintenance.telemetry.records import read_history
from cluster.errors import ConfigurationError, UnavailableError
from tests.apps.maintenance.running_broker import PASSWORD, USER, RunningBroker

START = datetime(2026, 1, 1, tzinfo=UTC)


def values(minutes: int, value: float) -> bytes:
    moment = (START + timedelta(minutes=minutes)).isoformat()
    return json.dumps({"time": moment, "values": {"vibration": value}}).encode()


@contextmanager
def sender(broker: RunningBroker) -> Iterator[paho.Client]:
    client = paho.Client(CallbackAPIVersion.VERSION2)
    client.username_pw_set(USER, PASSWORD)
    client.connect("127.0.0.1", broker.port)
    client.loop_start()
    try:
        yield client
    finally:
        client.disconnect()
        client.loop_stop()


def send(client: paho.Client, topic: str, payload: bytes) -> None:
    client.publish(f"plant/{topic}", payload, 1).wait_for_publish(5)


def connect(broker: RunningBroker) -> Connection:
    address = Address.parse(f"mqtt://{USER}@127.0.0.1:{broker.port}/plant")
    return Connection(address, "test", [*KINDS, ACKNOWLEDGE])


@contextmanager
def receiving(connection: Connection, folder: Path, plant: Plant) -> Iterator[Receiver]:
    intake = Intake(plant, "plant", folder / REJECTED, START.timestamp)
    said: list[bytes] = []
    history = History(folder / "history", plant)
    found = Receiver(connection, intake, history, lambda _, payload: said.append(payload))
    thread = threading.Thread(target=found.run)
    thread.start()
    try:
        assert connection.wait_until_listening(5)
        yield found
    finally:
        found.stop()
        thread.join()


def wait_for(receiver: Receiver, what: str, num: int) -> None:
    end_s = time.monotonic() + 10
    while receiver.counts.get(what, 0) < num:
        assert time.monotonic() < end_s, receiver.counts
        time.sleep(0.01)


@pytest.mark.clock
def test_what_is_odd_is_counted_kept_or_set_aside(
    broker: RunningBroker, tmp_path: Path, plant: Plant
) -> None:
    with (
        connect(broker) as connection,
        receiving(connection, tmp_path, plant) as receiver,
        sender(broker) as client,
    ):
        for minutes in (-60, -40, -50, -40):  # one out of order, one twice
            send(client, "M1/telemetry", values(minutes, 1.0))
        send(client, "M1/telemetry", values(-40, 2.0))
        send(client, "M1/telemetry", b"{")
        send(client, "M1/event", b'{"time": "2025-12-31T23:30:00Z", "error": "E1"}')
        wait_for(receiver, "received", 7)
        receiver.seal(START)
        send(client, "M1/telemetry", values(-30, 1.0))
        wait_for(receiver, "kept", 5)
        assert receiver.counts == {
            "received": 8,
            "kept": 5,
            "out_of_order": 1,
            "duplicate": 1,
            "conflicting": 1,
            "malformed": 1,
            "late": 1,
        }
        receiver.seal(START)
    lines = [json.loads(line) for line in (tmp_path / REJECTED).read_text().splitlines()]
    assert [line["why"] for line in lines] == ["conflicting", "malformed"]
    assert lines[1]["payload_base64"] == "ew=="
    fleet = read_history(tmp_path / "history", datetime(2026, 1, 1))
    assert fleet.telemetry[0, -1, 0] == 1.0
    assert fleet.errors.hour.tolist() == [fleet.num_hours - 1]


@pytest.mark.clock
def test_what_came_while_nobody_listened_comes_to_the_next_process(
    broker: RunningBroker, tmp_path: Path, plant: Plant
) -> None:
    with connect(broker) as connection, receiving(connection, tmp_path, plant):
        pass
    with sender(broker) as client:
        for minutes in (-30, -20):
            send(client, "M1/telemetry", values(minutes, 1.0))
    with connect(broker) as connection, receiving(connection, tmp_path, plant) as receiver:
        wait_for(receiver, "kept", 2)


@pytest.mark.clock
def test_nothing_is_acknowledged_before_it_is_on_disk(
    broker: RunningBroker, tmp_path: Path, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    append = History.append

    def full_at_first(history: History, messages: list[Message]) -> None:
        order.append("disk")
        if len(order) == 1:
            raise OSError(28, "No space left on device")
        append(history, messages)

    acknowledge = Connection.acknowledge

    def told(connection: Connection, deliveries: list[Delivery]) -> None:
        order.append("broker")
        acknowledge(connection, deliveries)

    monkeypatch.setattr(History, "append", full_at_first)
    monkeypatch.setattr(Connection, "acknowledge", told)
    monkeypatch.setattr(receivers, "DISK_PAUSE_S", 0.05)
    with (
        connect(broker) as connection,
        receiving(connection, tmp_path, plant) as receiver,
        sender(broker) as client,
    ):
        send(client, "M1/telemetry", values(-30, 1.0))
        wait_for(receiver, "kept", 1)
        while order[-1] != "broker":
            time.sleep(0.01)
    assert order == ["disk", "disk", "broker"]


@pytest.mark.clock
def test_a_broker_that_went_away_is_found_again(
    broker: RunningBroker, tmp_path: Path, plant: Plant
) -> None:
    with connect(broker) as connection, receiving(connection, tmp_path, plant) as receiver:
        broker.stop()
        with pytest.raises(UnavailableError, match=r"127\.0\.0\.1: expected"):
            connection.publish("M1/alert", b"{}")
        broker.start()
        end_s = time.monotonic() + 20
        while True:  # until the session listens again
            try:
                connection.publish("M1/telemetry", values(-10, 1.0))
                wait_for(receiver, "kept", 1)
                break
            except (UnavailableError, AssertionError):
                assert time.monotonic() < end_s
                time.sleep(0.1)


@pytest.mark.parametrize(
    "url", ["http://host/plant", "mqtt://host", "mqtt://u:secret@host/plant", "mqtt://host/a/+"]
)
def test_an_address_that_cannot_be_used_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigurationError, match="mqtt: expected") as refusal:
        Address.parse(url)
    assert "secret" not in str(refusal.value)


def test_a_disk_that_is_full_costs_no_message(tmp_path: Path, plant: Plant) -> None:
    intake = Intake(plant, "plant", tmp_path / REJECTED, START.timestamp)
    first = intake.take("plant/M1/telemetry", values(-10, 1.0))
    assert first is not None
    intake.settle([first], is_kept=False)
    again = intake.take("plant/M1/telemetry", values(-10, 1.0))
    assert again == first  # not taken for a duplicate of what is not on disk
    intake.settle([first], is_kept=True)
    assert intake.take("plant/M1/telemetry", values(-10, 1.0)) is None
