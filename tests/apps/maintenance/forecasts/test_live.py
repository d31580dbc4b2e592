"""A plant live: a real broker, a real receiver of alerts, the real console."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from apps.console.server import add_console
from apps.maintenance.fleet import Fleet
from apps.maintenance.forecasts import dispatch as dispatches
from apps.maintenance.forecasts.calibration import Calibration
from apps.maintenance.forecasts.dispatch import Dispatch
from apps.maintenance.forecasts.live import Live
from apps.maintenance.forecasts.moment import Moment
from apps.maintenance.forecasts.webhook import Webhook
from apps.maintenance.sync.control import Control
from apps.maintenance.sync.server import create_app
from apps.maintenance.telemetry.history import History
from apps.maintenance.telemetry.intake import REJECTED, Intake
from apps.maintenance.telemetry.messages import KINDS
from apps.maintenance.telemetry.mqtt import ACKNOWLEDGE, Address, Connection, Delivery
from apps.maintenance.telemetry.plant import Plant
from apps.maintenance.telemetry.receiver import Receiver
from benchmarks.edge_rig import serving
from cluster.local import LocalClient
from tests.apps.maintenance.forecasts.conftest import write_model_folder
from tests.apps.maintenance.forecasts.test_courier import SECRET
from tests.apps.maintenance.forecasts.test_courier import Receiver as Webpage
from tests.apps.maintenance.running_broker import USER, RunningBroker

HOURS = 49


def send_plant(connection: Connection, fleet: Fleet, begin: datetime) -> int:
    """Send the first hours of a fleet as its machines would; return the number of messages."""
    num = 0
    for m, machine in enumerate(fleet.machines):
        facts = {"time": begin.isoformat(), "model": int(fleet.models[m]), "age_years": 3.0}
        connection.publish(f"{machine}/machine", json.dumps(facts).encode())
        replaced = {"time": begin.isoformat(), "component": fleet.components[m % 4]}
        connection.publish(f"{machine}/maintenance", json.dumps(replaced).encode())
        num += 2
        for hour in range(HOURS):
            values = dict(zip(fleet.sensors, fleet.telemetry[m, hour].tolist(), strict=True))
            moment = (begin + timedelta(hours=hour)).isoformat()
            body = json.dumps({"time": moment, "values": values}).encode()
            connection.publish(f"{machine}/telemetry", body)
            num += 1
    return num


@dataclass
class LivePlant:
    """Everything that runs, and the hour that is forecast."""

    until: datetime
    url: str
    webpage: Webpage
    sensors: Connection
    operator: Connection
    receiver: Receiver
    folder: Path
    now_s: float
    shown: list[Moment]
    num_looks: int = 0

    def clock(self) -> float:
        """As the forecasting process looks at it, once before each forecast and after it."""
        self.num_looks += 1
        return self.now_s

    def alerts(self, stage: str) -> list[dict[str, Any]]:
        return [each for each in self.webpage.taken if each["stage"] == stage]


@pytest.fixture
def plant(
    broker: RunningBroker,
    client: LocalClient,
    fleet: Fleet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[LivePlant]:
    """Broker, console, receiver of alerts, and the process that forecasts."""
    monkeypatch.setattr(dispatches, "TALK_S", 0.1)
    calibration = Calibration.read(write_model_folder(tmp_path / "model", 1e-6))
    until = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    units = dict.fromkeys(fleet.sensors, "1")
    named = Plant(3600, units, tuple(fleet.error_names), tuple(fleet.components))
    address = Address.parse(f"mqtt://{USER}@127.0.0.1:{broker.port}/plant")
    control = Control(tmp_path / "fleet")
    control.repository.mkdir()
    app = create_app(control, control.repository)
    add_console(app, control)
    stopping = threading.Event()
    with (
        Webpage() as webpage,
        serving(app) as url,
        Connection(address, "test", [*KINDS, ACKNOWLEDGE]) as connection,
        Connection(address, "sensors") as sensors,
        Connection(address, "operator", ["alert"]) as operator,
    ):
        page = threading.Thread(target=webpage.serve_forever, args=(0.01,))
        page.start()

        def publish(alert: Mapping[str, object]) -> None:
            connection.publish(f"{alert['machine']}/alert", json.dumps(alert).encode())

        ways = {"webhook": Webhook(webpage.url, SECRET).send, "mqtt": publish}
        dispatch = Dispatch(tmp_path, calibration, ways, url)
        intake = Intake(named, "plant", tmp_path / REJECTED, time.time)
        history = History(tmp_path / "history", named)
        receiver = Receiver(connection, intake, history, dispatch.acknowledge_by_message)
        assert connection.wait_until_listening(5)
        assert operator.wait_until_listening(5)
        assert sensors.wait_until_connected(5)
        now_s = until.timestamp()
        found = LivePlant(until, url, webpage, sensors, operator, receiver, tmp_path, now_s, [])
        live = Live(tmp_path / "history", receiver, dispatch, client, calibration, found.clock)
        running = threading.Thread(target=live.run, args=(stopping, found.shown.append))
        running.start()
        wait_until(lambda: found.num_looks > 1)  # else the first one seals what is being sent
        yield found
        stopping.set()
        running.join()
        webpage.shutdown()
        page.join()
    control.close()


@pytest.mark.clock
def test_from_telemetry_to_an_acknowledged_alert(plant: LivePlant, fleet: Fleet) -> None:
    begin = plant.until - timedelta(hours=HOURS - 1)
    num = send_plant(plant.sensors, fleet, begin)
    wait_until(lambda: plant.receiver.counts.get("kept", 0) >= num)
    plant.now_s += 150.0  # the hour and its grace are over
    wait_until(lambda: len(plant.alerts("raised")) == 16)
    assert plant.shown[0].time == plant.until.replace(tzinfo=None)
    assert plant.shown[0].variants == ["both"] * 4
    said = [json.loads(each.payload) for each in collect(plant.operator, 16)]
    assert {each["id"] for each in said} == {each["id"] for each in plant.webpage.taken}

    alerts = wait_until(lambda: ask(f"{plant.url}/console/api/alerts")["open"])
    chosen = next(each for each in alerts if each["component"] == "pump")
    assert (len(alerts), chosen["horizon_h"]) == (16, 48)
    place = f"agent=deployment&machine={chosen['machine']}&hours=72"
    page = ask(f"{plant.url}/console/api/machine?{place}")
    assert page["latest"]["components"] == list(fleet.components)
    assert list(page["sensors"]) == sorted(fleet.sensors)

    path = f"/console/api/alerts/{chosen['agent']}/{chosen['seq']}/acknowledgement"
    ask(plant.url + path, {"name": "Ada"})
    body = b'{"component": "drive", "name": "Bob"}'
    plant.sensors.publish(f"{fleet.machines[0]}/{ACKNOWLEDGE}", body)
    wait_until(lambda: len(plant.alerts("acknowledged")) == 2)
    seen = {(e["component"], e["acknowledged_by"]) for e in plant.alerts("acknowledged")}
    assert seen == {("pump", "Ada"), ("drive", "Bob")}
    assert plant.receiver.counts["kept"] == num
    assert not (plant.folder / REJECTED).exists()


def wait_until(is_so: Callable[[], Any], timeout_s: float = 15.0) -> Any:  # noqa: ANN401 - as it finds
    end_s = time.monotonic() + timeout_s
    while not (found := is_so()):
        assert time.monotonic() < end_s
        time.sleep(0.02)
    return found


def collect(connection: Connection, num: int) -> list[Delivery]:
    found: list[Delivery] = []
    while len(found) < num:
        batch = connection.arrived(5.0)
        assert batch
        connection.acknowledge(batch)
        found += batch
    return found


def ask(url: str, body: dict[str, str] | None = None) -> Any:  # noqa: ANN401 - JSON
    headers = {"Content-Type": "application/json", "Sec-Fetch-Site": "same-origin"}
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, headers)) as answer:
        return json.loads(answer.read())
