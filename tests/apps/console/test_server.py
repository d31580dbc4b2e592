"""The console over real HTTP, with real agents behind it."""

import http.client
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from apps.console.server import PAGES
from apps.maintenance.sync.triggers import Reading, Trigger
from tests.apps.console.conftest import Plant

ALERTING = {0: 0.9}


def ask(
    plant: Plant, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, Any, Message]:
    """Return status, body and headers."""
    connection = http.client.HTTPConnection(urlsplit(plant.url).netloc, timeout=10)
    connection.request("GET" if body is None else "POST", path, body, dict(headers or {}))
    answer = connection.getresponse()
    data = answer.read()
    found: Any = (
        json.loads(data) if "json" in answer.headers.get("Content-Type", "") else data.decode()
    )
    connection.close()
    return answer.status, found, answer.headers


def own(plant: Plant) -> dict[str, str]:
    """Return the headers of a page of the console."""
    return {
        "Content-Type": "application/json",
        "Origin": plant.url,
        "Sec-Fetch-Site": "same-origin",
    }


def acknowledge(
    plant: Plant, seq: int, name: object, headers: Mapping[str, str] | None = None
) -> tuple[int, Any, Message]:
    body = json.dumps({"name": name}).encode()
    path = f"/console/api/alerts/box0/{seq}/acknowledgement"
    return ask(plant, path, body, headers if headers is not None else own(plant))


def test_every_page_is_strict(alerting_plant: Plant) -> None:
    for path in ("", *PAGES, "static/app.js", "static/console.css", "static/icon.svg"):
        status, text, headers = ask(alerting_plant, f"/console/{path}")
        assert status == 200
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        if path in {"", *PAGES}:
            assert '<script type="module" src=' in text
            assert "style=" not in text
            assert "onclick" not in text


def test_machines_and_boxes(plant: Plant) -> None:
    plant.turn(wear=ALERTING)
    plant.turn(wear=ALERTING)
    plant.ahead_s += 1000
    plant.turn(wear=ALERTING, offline=(2,))
    status, found, _ = ask(plant, "/console/api/fleet")
    assert status == 200
    assert (found["num_boxes"], found["num_offline"], found["num_machines"]) == (4, 1, 8)
    assert [box["agent"] for box in found["boxes"]] == ["box2", "box0", "box1", "box3"]
    assert found["boxes"][0]["is_offline"]
    assert {(box["version"], box["slot"], box["confirmed"]) for box in found["boxes"]} == {
        (1, "a", True)
    }
    worst = found["machines"][0]
    assert (worst["machine"], worst["is_alert"], worst["peak_horizon_h"]) == ("press-0a", True, 48)
    assert worst["life"] == pytest.approx([8.0, 10.0, 12.0], abs=0.1)
    peaks = [each["peak"] for each in found["machines"]]
    assert peaks == sorted(peaks, reverse=True)
    _, found, _ = ask(plant, "/console/api/fleet?find=PRESS-1")
    assert {each["machine"] for each in found["machines"]} == {"press-1a", "press-1b"}
    assert found["boxes"] == []


def test_a_machine_over_time(plant: Plant) -> None:
    before = plant.hour
    for _ in range(3):
        plant.turn(wear=ALERTING)
        plant.telemetry(0, {"vibration": 1.5, "pressure": None})
    plant.turn()
    status, found, _ = ask(plant, "/console/api/machine?agent=box0&machine=press-0a&hours=3")
    assert status == 200
    assert found["latest"]["threshold"] == 0.5
    forecasts = found["forecasts"]
    assert [each["moment"] for each in forecasts] == sorted(each["moment"] for each in forecasts)
    # what was forecast in the last turn waits for the next talk
    assert len(forecasts) == min(before + 3, 4)
    assert set(forecasts[-1]["hazard"]) == {"comp1", "comp2"}
    assert forecasts[-1]["horizons_h"] == [4, 24, 48]
    assert [value for _, value in found["sensors"]["vibration"]] == [1.5, 1.5, 1.5]
    assert [value for _, value in found["sensors"]["pressure"]] == [None, None, None]
    assert {each["event"] for each in found["events"]} >= {"started", "switched", "confirmed"}
    assert {each["component"] for each in found["alerts"]} == {"comp1", "comp2"}


def test_an_alert_is_acknowledged_once_and_for_good(plant: Plant) -> None:
    plant.turn(wear=ALERTING)
    plant.turn(wear=ALERTING)
    _, found, _ = ask(plant, "/console/api/alerts")
    assert len(found["open"]) == found["num_open_alerts"] == 2
    alert = found["open"][0]
    assert alert["horizon_h"] == 48
    assert alert["hazard"] > 0.5
    status, left, _ = acknowledge(plant, alert["seq"], " Grace Hopper ")
    assert status == 200
    assert len(left["open"]) == 1
    (done,) = left["acknowledged"]
    assert (done["seq"], done["acknowledged_by"]) == (alert["seq"], "Grace Hopper")
    assert done["acknowledged_at"] == pytest.approx(plant.clock(), abs=30)
    status, refusal, _ = acknowledge(plant, alert["seq"], "Ada")
    assert (status, refusal["message"]) == (
        409,
        "alert: expected an open one, Grace Hopper has acknowledged it",
    )
    entry = plant.control.audit(1)[0]
    assert (entry.actor, entry.action) == ("console", "acknowledge alert")
    assert json.loads(entry.detail)["said_by"] == "Grace Hopper"
    plant.control.verify_audit()


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
        {"Sec-Fetch-Site": "same-origin", "Origin": "http://evil.example"},
    ],
)
def test_another_origin_changes_nothing(alerting_plant: Plant, headers: Mapping[str, str]) -> None:
    seq = ask(alerting_plant, "/console/api/alerts")[1]["open"][0]["seq"]
    given = {"Content-Type": "application/json", **headers}
    status, refusal, _ = acknowledge(alerting_plant, seq, "Mallory", given)
    assert status == 403
    assert refusal["message"].startswith("origin: expected a request of this console")
    assert ask(alerting_plant, "/console/api/alerts")[1]["num_open_alerts"] == 2


def test_what_cannot_be_acknowledged(alerting_plant: Plant) -> None:
    plant = alerting_plant
    waiting = ask(plant, "/console/api/alerts")[1]["open"]
    seq = waiting[0]["seq"]
    for name in ("", "  ", "x" * 65, "a\nb", None, 5):
        status, refusal, _ = acknowledge(plant, seq, name)
        assert status == 400
        assert refusal["message"].startswith("name: expected")
    forecast = min(each["seq"] for each in waiting) - 1
    assert acknowledge(plant, forecast, "Ada")[0] == 400
    assert acknowledge(plant, 10**6, "Ada")[0] == 400
    form = {**own(plant), "Content-Type": "text/plain"}
    assert acknowledge(plant, seq, "Ada", form)[0] == 400
    assert ask(plant, "/console/api/alerts")[1]["num_open_alerts"] == 2


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/console/api/machine?agent=box0&machine=none", 400),
        ("/console/api/machine?agent=box0", 400),
        ("/console/api/machine?agent=box0&machine=press-0a&hours=nan", 400),
        ("/console/api/machine?agent=box0&machine=press-0a&hours=-1", 400),
        ("/console/api/fleet?find=" + "x" * 201, 400),
        ("/console/nothing", 404),
        ("/console/static/../server.py", 404),
    ],
)
def test_errors_are_one_line(alerting_plant: Plant, path: str, status: int) -> None:
    found, body, _ = ask(alerting_plant, path)
    assert found == status
    assert body["message"]
    assert "\n" not in body["message"]


def test_rollouts_drift_ledger_and_audit(plant: Plant) -> None:
    plant.begin_two()
    plant.settle()
    _, found, _ = ask(plant, "/console/api/rollouts")
    rollout = found["rollouts"][0]
    assert (rollout["status"], rollout["stage"]) == ("awaiting_approval", 0)
    assert [(stage["num"], stage["needs_approval"]) for stage in rollout["stages"]] == [
        (1, True),
        (4, False),
    ]
    assert [each["state"] for each in rollout["assignments"]] == ["succeeded"]
    assert found["operators"].keys() == {"ada"}
    assert "PRIVATE" not in found["operators"]["ada"]
    _, found, _ = ask(plant, "/console/api/drift")
    assert {box["verdict"] for box in found["boxes"]} == {"waiting"}
    assert ask(plant, "/console/api/ledger")[1]["ledger"] is None
    (plant.control.repository.parent / "ledger.json").write_text("{}")
    assert ask(plant, "/console/api/ledger")[0] == 409
    _, found, _ = ask(plant, "/console/api/audit")
    assert (found["end"], found["broken"]) == (plant.control.verify_audit(), "")
    assert found["entries"][0]["action"] == "awaiting_approval"


def test_triggers_and_what_they_led_to_stand_beside_the_drift(plant: Plant) -> None:
    _, found, _ = ask(plant, "/console/api/drift")
    assert (found["triggers"], found["retrainings"]) == ([], [])
    readings = {Trigger.DRIFT: Reading(0.3, "load, 900 windows")}
    plant.control.retrainings.look("another", readings)
    _, found, _ = ask(plant, "/console/api/drift")
    (trigger,), (retraining,) = found["triggers"], found["retrainings"]
    assert (trigger["is_active"], trigger["raise_at"], trigger["unit"]) == (True, 0.25, "PSI")
    assert (retraining["state"], retraining["reasons"]) == ("running", ["drift"])


def test_a_broken_chain_is_said(plant: Plant) -> None:
    with plant.control.database.transaction() as db:
        db.execute("DROP TRIGGER audit_is_final")
        db.execute("UPDATE audit SET actor = 'nobody' WHERE seq = 2")
    _, found, _ = ask(plant, "/console/api/audit")
    assert found["end"] == ""
    assert "entry 2 does not follow" in found["broken"]


def test_the_root_leads_to_the_console(alerting_plant: Plant) -> None:
    status, _, headers = ask(alerting_plant, "/")
    assert (status, headers["Location"]) == (307, "console/")


@pytest.mark.clock
def test_the_command_serves_it(plant: Plant) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fleet = str(plant.control.repository.parent)
    words = ["sync", "serve", "--fleet", fleet, "--port", str(port)]
    program = f"import sys; from apps.cli import main; sys.exit(main({words!r}))"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[3])
    try:
        address, text = open_when_there(f"http://127.0.0.1:{port}/")
    finally:
        process.terminate()
        process.wait(timeout=20)
    assert address.endswith("/console/")
    assert b"trimoe console" in text


def open_when_there(url: str) -> tuple[str, bytes]:
    """Return where a page is in the end, and what it says."""
    end_s = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(url) as answer:
                return answer.url, answer.read()
        except urllib.error.URLError:
            assert time.monotonic() < end_s
            time.sleep(0.1)
