"""Machines: the latest forecast of each, and one machine over time.

Legend: C components, H horizons.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from apps.console.bundles import Bundles
from apps.console.index import MessageIndex, Place
from apps.console.uploads import (
    EVENT,
    FORECAST,
    TELEMETRY,
    Event,
    Forecast,
    Telemetry,
    parse_upload,
)
from apps.maintenance.sync.database import Database
from cluster.errors import InvalidRequestError

MAX_SHOWN = 100  # machines of one answer
MAX_POINTS = 400  # of one line; a screen shows no more
NUM_EVENTS = 30


class Machines:
    """The machines of one fleet.

    Args:
        database: Of the fleet.
        index: Of its messages.
        bundles: Say what hazards are of.
    """

    def __init__(self, database: Database, index: MessageIndex, bundles: Bundles) -> None:
        self._database = database
        self._index = index
        self._bundles = bundles

    def count(self, text: str) -> int:
        """Return how many machines there are whose name, box or group contains a text."""
        return int(self._select("SELECT count(*)", text)[0][0])

    def highest(self, text: str) -> Sequence[Mapping[str, Any]]:
        """Return the machines with the highest hazards, highest first, for JSON."""
        rows = self._select("SELECT agent, machine, console_machines.seq", text)
        return [self._latest(*row) for row in rows]

    def history(self, agent: str, machine: str, hours: float) -> Mapping[str, Any]:
        """Return a machine's forecasts, sensors, events and those of its box, for JSON.

        Args:
            agent: Its box.
            machine: Its name.
            hours: To go back from its newest forecast.

        Raises:
            InvalidRequestError: Nobody has heard of it.
        """
        with self._database.transaction() as db:
            row = db.execute(
                "SELECT moment FROM console_machines WHERE agent = ? AND machine = ?",
                (agent, machine),
            ).fetchone()
        if row is None:
            message = f"machine: expected one with a forecast, got {machine!r:.66} of {agent!r:.66}"
            raise InvalidRequestError(message)
        since = row["moment"] - hours * 3600
        return {
            "latest": self._latest(agent, machine, self._newest(agent, machine)),
            "since": since,
            "until": row["moment"],
            "forecasts": self._forecasts(agent, machine, since),
            "sensors": self._sensors(agent, machine, since),
            "events": self._events(agent, machine),
        }

    def _select(self, what: str, text: str) -> Sequence[tuple[Any, ...]]:
        with self._database.transaction() as db:
            return [
                tuple(row)
                for row in db.execute(
                    f"{what} FROM console_machines JOIN boxes USING (agent) "
                    "WHERE instr(lower(machine || ' ' || agent || ' ' || grp), lower(?)) "
                    "ORDER BY peak DESC, agent, machine LIMIT ?",
                    (text, MAX_SHOWN),
                )
            ]

    def _newest(self, agent: str, machine: str) -> int:
        return self._index.newest(agent, machine, FORECAST, 1)[0]

    def _latest(self, agent: str, machine: str, seq: int) -> Mapping[str, Any]:
        forecast = parse_upload(self._index.bodies(agent, [seq])[0])
        if not isinstance(forecast, Forecast):
            message = f"machine {machine!r:.66}: expected a forecast in message {seq}"
            raise InvalidRequestError(message)
        terms = forecast.terms or self._bundles.terms(forecast.version, forecast.hazard)
        worst = max(range(len(forecast.hazard)), key=lambda idx: forecast.hazard[idx][-1])
        return {
            "agent": agent,
            "machine": machine,
            "moment": forecast.moment,
            "version": forecast.version,
            "component": terms.components[worst],
            "peak": forecast.hazard[worst][-1],
            "peak_horizon_h": terms.horizons_h[-1],
            "life": forecast.life,
            "hazard": forecast.hazard,
            "components": terms.components,
            "horizons_h": terms.horizons_h,
            "alert_horizon_h": terms.horizons_h[terms.alert_idx],
            "threshold": terms.threshold,
            "is_alert": terms.threshold is not None
            and any(row[terms.alert_idx] >= terms.threshold for row in forecast.hazard),
        }

    def _forecasts(self, agent: str, machine: str, since: float) -> Sequence[Mapping[str, Any]]:
        places = thin(self._index.places(agent, machine, FORECAST, since), MAX_POINTS)
        found = []
        for body in self._index.bodies(agent, [place.seq for place in places]):
            each = parse_upload(body)
            if isinstance(each, Forecast):
                terms = each.terms or self._bundles.terms(each.version, each.hazard)
                hazard = dict(zip(terms.components, each.hazard, strict=True))
                facts = {"moment": each.moment, "version": each.version, "hazard": hazard}
                found.append({**facts, "life": each.life, "horizons_h": terms.horizons_h})
        return sorted(found, key=lambda each: float(each["moment"]))

    def _sensors(self, agent: str, machine: str, since: float) -> Mapping[str, Any]:
        """Return [moment, value] by sensor; what was not measured is None, never a zero."""
        places = thin(self._index.places(agent, machine, TELEMETRY, since), MAX_POINTS)
        lines: dict[str, list[tuple[float, float | None]]] = {}
        for body in self._index.bodies(agent, [place.seq for place in places]):
            each = parse_upload(body)
            if isinstance(each, Telemetry):
                for name, value in each.values.items():
                    lines.setdefault(name, []).append((each.moment, value))
        return {name: sorted(lines[name]) for name in sorted(lines)}

    def _events(self, agent: str, machine: str) -> Sequence[Mapping[str, Any]]:
        """Return the newest events of a machine and its box, newest first."""
        numbers = sorted(
            (
                number
                for place in ("", machine)
                for number in self._index.newest(agent, place, EVENT, NUM_EVENTS)
            ),
            reverse=True,
        )[:NUM_EVENTS]
        events = [parse_upload(body) for body in self._index.bodies(agent, numbers)]
        return [
            {"moment": each.moment, "event": each.name, "detail": each.detail}
            for each in events
            if isinstance(each, Event)
        ]


def thin(places: Sequence[Place], limit: int) -> Sequence[Place]:
    """Return at most ``limit`` places: of each run of neighbours the one with the largest peak.

    The newest is always among them.
    """
    if len(places) <= limit:
        return places
    kept = []
    for idx in range(limit - 1):
        first, last = (
            (len(places) - 1) * idx // (limit - 1),
            (len(places) - 1) * (idx + 1) // (limit - 1),
        )
        kept.append(max(places[first:last], key=lambda place: place.peak or 0.0))
    return [*kept, places[-1]]
