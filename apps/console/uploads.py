"""What boxes upload, as the pages need it; whatever a box may have sent is checked here.

    {"kind": "forecast", "machine", "time", "version", "hazard": [C][H], "life": [low, median, high]}
        and of the shared deployment "components", "horizons_h", "alert_horizon_h", "threshold"
    {"kind": "alert", ... as a forecast, "component"}
    {"kind": "telemetry", "machine", "time", "values": {sensor: number or null}}
    {"kind": "event", "event", "detail", "time"}       of the box itself; of a machine if "machine"

Legend: C components, H horizons.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeAlias

from apps.console.bundles import Terms

FORECAST, ALERT, TELEMETRY, EVENT = "forecast", "alert", "telemetry", "event"
MAX_NAME = 200  # characters
MAX_VALUES = 200  # sensors of one message
_NUM_LIFE = 3


@dataclass(frozen=True, slots=True)
class Forecast:
    """A forecast of one machine.

    Args:
        kind: ``FORECAST``, or ``ALERT`` if one begins with it.
        machine: Its name.
        moment: The end of its window, seconds since 1970.
        version: Of the model, as responses name it.
        hazard: Probability of a failure by component and horizon.
        life: Remaining useful life, hours: low, median, high.
        component: That an alert is for; empty for a forecast.
        terms: What hazards are of, where the message says so; boxes leave it to their bundle.
    """

    kind: str
    machine: str
    moment: float
    version: str
    hazard: Sequence[Sequence[float]]
    life: Sequence[float]
    component: str = ""
    terms: Terms | None = None

    @property
    def peak(self) -> float:
        """The largest hazard."""
        return max(max(row) for row in self.hazard)


@dataclass(frozen=True, slots=True)
class Telemetry:
    """Values of a machine's sensors at one time.

    Args:
        machine: Its name.
        moment: Seconds since 1970.
        values: By sensor; None where nothing was measured.
    """

    machine: str
    moment: float
    values: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened on a box or to a machine.

    Args:
        moment: By the clock of the box, seconds since 1970.
        name: Of the event.
        detail: What and why.
        machine: That it happened to; empty for the box itself.
    """

    moment: float
    name: str
    detail: str
    machine: str = ""


Upload: TypeAlias = Forecast | Telemetry | Event


def parse_upload(body: Mapping[str, Any]) -> Upload | None:
    """Return what a message says; None if the pages have no use for its kind.

    Raises:
        ValueError: It is not what its kind promises.
    """
    kind = body.get("kind")
    if kind in {FORECAST, ALERT}:
        return Forecast(
            kind,
            _name(body, "machine"),
            moment_of(body.get("time")),
            _name(body, "version"),
            _hazard(body.get("hazard")),
            _numbers(body.get("life"), _NUM_LIFE),
            _name(body, "component") if kind == ALERT else "",
            _terms(body),
        )
    if kind == TELEMETRY:
        return Telemetry(
            _name(body, "machine"), moment_of(body.get("time")), _values(body.get("values"))
        )
    if kind == EVENT:
        detail = str(body.get("detail", ""))
        machine = _name(body, "machine") if "machine" in body else ""
        return Event(moment_of(body.get("time")), _name(body, "event"), detail, machine)
    return None


def moment_of(text: object) -> float:
    """Return seconds since 1970 of an ISO 8601 time; without a zone it is UTC.

    Raises:
        ValueError: It is no such time.
    """
    if not isinstance(text, str):
        message = f"time: expected ISO 8601, got {text!r:.40}"
        raise ValueError(message)  # noqa: TRY004 - one error for all that is malformed
    found = datetime.fromisoformat(text)
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _name(body: Mapping[str, Any], field: str) -> str:
    found = body.get(field)
    if not isinstance(found, str) or not 0 < len(found) <= MAX_NAME:
        message = f"{field}: expected 1 to {MAX_NAME} characters, got {found!r:.40}"
        raise ValueError(message)
    return found


def _hazard(found: object) -> Sequence[Sequence[float]]:
    if not isinstance(found, list) or not found or not isinstance(found[0], list) or not found[0]:
        message = f"hazard: expected rows of probabilities, got {found!r:.40}"
        raise ValueError(message)
    rows = [_numbers(row, len(found[0])) for row in found]
    if any(not 0 <= value <= 1 for row in rows for value in row):
        message = f"hazard: expected probabilities in [0, 1], got {found!r:.60}"
        raise ValueError(message)
    return rows


def _terms(body: Mapping[str, Any]) -> Terms | None:
    components, threshold = body.get("components"), body.get("threshold")
    if components is None:
        return None
    hazard = _hazard(body.get("hazard"))
    horizons = _numbers(body.get("horizons_h"), len(hazard[0]))
    is_named = isinstance(components, list) and all(isinstance(each, str) for each in components)
    if not is_named or len(components) != len(hazard) or not _is_number(threshold):
        message = (
            f"components: expected {len(hazard)} names and a threshold, got {components!r:.60}"
        )
        raise ValueError(message)
    if body.get("alert_horizon_h") not in horizons:
        message = f"alert_horizon_h: expected one of {horizons}"
        raise ValueError(message)
    names = [name[:MAX_NAME] for name in components]
    return Terms(names, horizons, horizons.index(body["alert_horizon_h"]), threshold)


def _numbers(found: object, num: int) -> Sequence[float]:
    if not isinstance(found, list) or len(found) != num or not all(map(_is_number, found)):
        message = f"expected {num} numbers, got {found!r:.60}"
        raise ValueError(message)
    return [float(value) for value in found]


def _values(found: object) -> Mapping[str, float | None]:
    if not isinstance(found, dict) or not 0 < len(found) <= MAX_VALUES:
        message = f"values: expected 1 to {MAX_VALUES} sensors, got {found!r:.40}"
        raise ValueError(message)
    if not all(value is None or _is_number(value) for value in found.values()):
        message = f"values: expected numbers or null, got {found!r:.60}"
        raise ValueError(message)
    return {str(name)[:MAX_NAME]: value for name, value in found.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
