"""Messages of a plant over MQTT: one topic per machine and kind, JSON payloads.

    PREFIX/MACHINE/telemetry    {"time", "values": {sensor: number or null}}
    PREFIX/MACHINE/event        {"time", "error": code}  or  {"time", "failure": component}
    PREFIX/MACHINE/maintenance  {"time", "component"}
    PREFIX/MACHINE/machine      {"time", "model": whole number, "age_years": number}

``time`` is ISO 8601 with its zone.  ``units`` {sensor: unit} and ``period_s`` may be said in
telemetry and must then be those of the plant; ``kind`` and ``machine`` as boxes send them
(``apps.maintenance.edge``) must be those of the topic.  ``null`` is "not measured"; a sensor that
is not named is the same.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from apps.maintenance.telemetry.plant import Plant

MAX_NAME = 64  # characters of a machine's name
MAX_PAYLOAD = 64 * 1024  # bytes
AHEAD_S = 300.0  # by which a sender's clock may be ahead of ours
TELEMETRY, EVENT, MAINTENANCE, MACHINE = KINDS = ("telemetry", "event", "maintenance", "machine")
ERROR, FAILURE = "error", "failure"


@dataclass(frozen=True, slots=True)
class Message:
    """A message that was understood.

    Args:
        kind: One of ``KINDS``.
        machine: Its machine.
        time_s: When it was so, seconds since 1970.
        facts: ``values`` by sensor; or ``what`` (error, failure, maintenance) and its ``name``;
            or ``model`` and ``age_years``.
    """

    kind: str
    machine: str
    time_s: float
    facts: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, str, float, str]:
        """What makes it the same message: kind, machine, moment, and which event."""
        which = f"{self.facts['what']}:{self.facts['name']}" if "what" in self.facts else ""
        return self.kind, self.machine, self.time_s, which


def split_topic(topic: str, prefix: str) -> tuple[str, str]:
    """Return machine and kind.

    Raises:
        ValueError: The topic has neither.
    """
    machine, _, kind = topic.removeprefix(f"{prefix}/").rpartition("/")
    if kind not in KINDS or not 0 < len(machine) <= MAX_NAME or "/" in machine:
        message = f"topic: expected {prefix}/MACHINE/{'|'.join(KINDS)}, got {topic!r:.120}"
        raise ValueError(message)
    return machine, kind


def parse(machine: str, kind: str, payload: bytes, plant: Plant, now_s: float) -> Message:
    """Return what a payload says.

    Raises:
        ValueError: It is not what its kind promises; says what was expected, in one line.
    """
    record = _object(payload)
    for name, expected in (("kind", kind), ("machine", machine)):
        if record.get(name, expected) != expected:
            message = f"{name}: expected {expected!r} of the topic, got {record[name]!r:.60}"
            raise ValueError(message)
    time_s = _time(record.get("time"))
    if time_s > now_s + AHEAD_S:
        message = f"time: expected at most {AHEAD_S:.0f} s ahead of our clock, got {record['time']}"
        raise ValueError(message)
    facts = {
        TELEMETRY: _values,
        EVENT: _event,
        MAINTENANCE: _maintenance,
        MACHINE: _machine,
    }[kind](record, plant)
    return Message(kind, machine, time_s, facts)


def _object(payload: bytes) -> dict[str, Any]:
    if len(payload) > MAX_PAYLOAD:
        message = f"payload: expected {MAX_PAYLOAD} bytes at most, got {len(payload)}"
        raise ValueError(message)
    try:
        record = json.loads(payload)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        message = f"payload: expected a JSON object, got {payload[:40]!r}"
        raise ValueError(message)  # noqa: TRY004 - one error for all that is malformed
    return record


def _time(text: object) -> float:
    try:
        found = datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        message = f"time: expected ISO 8601 with a zone, got {text!r:.60}"
        raise ValueError(message)
    return found.timestamp()


def _values(record: Mapping[str, Any], plant: Plant) -> Mapping[str, Any]:
    values = record.get("values")
    if not isinstance(values, dict) or not values:
        message = f"values: expected numbers by sensor, got {values!r:.60}"
        raise ValueError(message)
    _check_said(record, plant)
    for name, value in values.items():
        if name not in plant.sensors:
            message = f"values: expected sensors {', '.join(plant.sensors)}, got {name!r:.60}"
            raise ValueError(message)
        if value is not None and not _is_number(value):
            message = f"values: expected a finite number or null of {name}, got {value!r:.60}"
            raise ValueError(message)
    return {"values": values}


def _check_said(record: Mapping[str, Any], plant: Plant) -> None:
    """Refuse a unit or period that is not the plant's."""
    if record.get("period_s", plant.period_s) != plant.period_s:
        message = (
            f"period_s: expected {plant.period_s} of the plant, got {record['period_s']!r:.40}"
        )
        raise ValueError(message)
    units = record.get("units", {})
    if not isinstance(units, dict):
        message = f"units: expected a unit by sensor, got {units!r:.60}"
        raise ValueError(message)  # noqa: TRY004 - one error for all that is malformed
    for name, unit in units.items():
        if plant.sensors.get(name) != unit:
            message = f"units: expected {name} in {plant.sensors.get(name)!r}, got {unit!r:.40}"
            raise ValueError(message)


def _event(record: Mapping[str, Any], plant: Plant) -> Mapping[str, Any]:
    said = [what for what in (ERROR, FAILURE) if what in record]
    if len(said) != 1:
        message = f"event: expected an error or a failure, got {', '.join(record)!r:.60}"
        raise ValueError(message)
    (what,) = said
    return _known(what, record[what], plant.errors if what == ERROR else plant.components)


def _maintenance(record: Mapping[str, Any], plant: Plant) -> Mapping[str, Any]:
    return _known(MAINTENANCE, record.get("component"), plant.components)


def _known(what: str, name: object, names: tuple[str, ...]) -> Mapping[str, Any]:
    if name not in names:
        message = f"{what}: expected one of {', '.join(names)}, got {name!r:.60}"
        raise ValueError(message)
    return {"what": what, "name": name}


def _machine(record: Mapping[str, Any], _: Plant) -> Mapping[str, Any]:
    model, age = record.get("model"), record.get("age_years")
    if isinstance(model, bool) or not isinstance(model, int) or not _is_number(age):
        message = f"machine: expected model and age_years, got {model!r:.40} and {age!r:.40}"
        raise ValueError(message)
    return {"model": model, "age_years": age}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
