"""Payloads: what is understood, and what is refused in one line."""

import json

import pytest

from apps.maintenance.telemetry.messages import parse, split_topic
from apps.maintenance.telemetry.plant import Plant
from cluster.errors import ConfigurationError

NOW_S = 1767225600.0  # 2026-01-01T00:00:00Z
TIME = "2026-01-01T01:00:00+01:00"


def payload(**facts: object) -> bytes:
    return json.dumps({"time": TIME, **facts}).encode()


def test_a_topic_names_machine_and_kind() -> None:
    assert split_topic("plant/hall/M1/telemetry", "plant/hall") == ("M1", "telemetry")
    for topic in ("plant/hall/M1/other", "plant/hall/telemetry", "plant/hall/a/b/event"):
        with pytest.raises(ValueError, match="topic: expected plant/hall/MACHINE"):
            split_topic(topic, "plant/hall")


def test_telemetry_keeps_what_was_not_measured_apart_from_zero(plant: Plant) -> None:
    body = payload(values={"vibration": None, "current": 0}, units={"current": "A"}, period_s=600)
    found = parse("M1", "telemetry", body, plant, NOW_S)
    assert found.time_s == NOW_S
    assert found.facts == {"values": {"vibration": None, "current": 0}}


def test_the_message_of_an_edge_box_is_the_same_message(plant: Plant) -> None:
    body = payload(kind="telemetry", machine="M1", values={"vibration": 4.0})
    plain = parse("M1", "telemetry", payload(values={"vibration": 4.0}), plant, NOW_S)
    assert parse("M1", "telemetry", body, plant, NOW_S) == plain


@pytest.mark.parametrize(
    ("kind", "body", "expected"),
    [
        ("telemetry", b"\xff{", "payload: expected a JSON object"),
        ("telemetry", b"[1]", "payload: expected a JSON object"),
        ("telemetry", b" " * 70_000, "payload: expected 65536 bytes at most"),
        ("telemetry", payload(values={}), "values: expected numbers by sensor"),
        ("telemetry", payload(values={"vibration": "4"}), "a finite number or null of vibration"),
        ("telemetry", payload(values={"vibration": True}), "a finite number or null of vibration"),
        ("telemetry", payload(values={"vibration": float("nan")}), "a finite number or null"),
        ("telemetry", payload(values={"vibrat": 4.0}), "values: expected sensors vibration"),
        ("telemetry", payload(values={"current": 1}, units={"current": "mA"}), "current in 'A'"),
        ("telemetry", payload(values={"current": 1}, period_s=60), "period_s: expected 600"),
        ("telemetry", payload(values={"current": 1}, machine="M2"), "machine: expected 'M1'"),
        ("telemetry", payload(time="2026-01-01T00:00:00", values={"current": 1}), "with a zone"),
        ("telemetry", payload(time=5, values={"current": 1}), "with a zone"),
        ("telemetry", payload(time="2026-01-01T00:06:00Z", values={"current": 1}), "ahead of our"),
        ("event", payload(error="E9"), "error: expected one of E1, E2"),
        ("event", payload(error="E1", failure="drive"), "an error or a failure"),
        ("maintenance", payload(component=["drive"]), "maintenance: expected one of bearing"),
        ("machine", payload(model="2", age_years=3), "machine: expected model and age_years"),
    ],
)
def test_what_is_malformed_is_refused_in_one_line(
    plant: Plant, kind: str, body: bytes, expected: str
) -> None:
    with pytest.raises(ValueError, match=expected) as refusal:
        parse("M1", kind, body, plant, NOW_S)
    assert "\n" not in str(refusal.value)


def test_two_events_of_one_moment_are_two(plant: Plant) -> None:
    found = [parse("M1", "event", payload(error=e), plant, NOW_S).key for e in ("E1", "E2", "E1")]
    assert found[0] != found[1]
    assert found[0] == found[2]


@pytest.mark.parametrize("period_s", [0, 7, 7200])
def test_a_period_that_does_not_divide_an_hour_is_refused(plant: Plant, period_s: int) -> None:
    with pytest.raises(ConfigurationError, match="period_s"):
        Plant(period_s, plant.sensors, plant.errors, plant.components)
