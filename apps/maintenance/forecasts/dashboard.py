"""Forecasts, hours of telemetry, events and alerts to the console of the fleet.

The deployment speaks as one more box, ``AGENT`` of group ``GROUP``, over the same way and in the
same messages as edge boxes; what it could not send waits on disk.  Names of components and
horizons go along, because its model is no bundle of the repository.

Legend: C components, H horizons.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from apps.maintenance.alerts import Alert, AlertRule, Stage
from apps.maintenance.edge.outbox import Outbox, Priority
from apps.maintenance.edge.uplink import Uplink
from apps.maintenance.fleet import Fleet
from apps.maintenance.forecasts.calibration import Calibration
from apps.maintenance.forecasts.moment import Moment
from apps.maintenance.protocol import HORIZONS
from apps.maintenance.sync.connection import open_connection
from cluster.errors import UnavailableError

AGENT, GROUP = "deployment", "platform"
CAP_BYTES = 256 * 2**20
STALL_S, TOTAL_S = 5.0, 15.0
MAX_ANSWER_BYTES = 4 * 2**20


class Dashboard:
    """The way to the console.

    Args:
        url: Root of ``trimoe sync serve``.
        folder: Holds the queue.
        calibration: Of the model.
        rule: When alerts begin.

    Raises:
        ConfigurationError: The URL is not an http(s) one.
    """

    def __init__(self, url: str, folder: Path, calibration: Calibration, rule: AlertRule) -> None:
        self._url, self._calibration, self._rule = url, calibration, rule
        self._uplink = Uplink(url, AGENT)
        self._outbox = Outbox(folder / "dashboard.db", CAP_BYTES)

    def put(
        self, moment: Moment, fleet: Fleet, hours: Sequence[int], begun: Sequence[Alert]
    ) -> None:
        """Queue what a moment has brought.

        Args:
            moment: The forecasts.
            fleet: That they are of.
            hours: Whose telemetry and events have not been sent.
            begun: Alerts of this moment.

        Raises:
            UnavailableError: The disk has no room.
        """
        messages = [(Priority.TELEMETRY, body) for body in self._record(fleet, hours)]
        forecasts = {name: self._forecast(moment, n) for n, name in enumerate(moment.machines)}
        messages += [(Priority.FORECAST, {"kind": "forecast", **f}) for f in forecasts.values()]
        for alert in begun:
            if alert.stage is Stage.RAISED:
                machine, component = alert.key
                body = {"kind": "alert", **forecasts[machine], "component": component}
                messages.append((Priority.ALERT, body))
        self._outbox.put([(p, json.dumps(b, separators=(",", ":")).encode()) for p, b in messages])

    def talk(self) -> None:
        """Report and send what waits.

        Raises:
            UnavailableError: The console cannot be reached; what waits stays.
        """
        self._uplink.report(
            {
                "agent": AGENT,
                "group": GROUP,
                "version": 0,
                "digest": "",
                "confirmed": True,
                "failed": {},
                "outcome": self._calibration.version,
                "waiting": self._outbox.num_waiting,
            }
        )
        self._uplink.drain(self._outbox)

    def acknowledged(self) -> Iterator[tuple[str, str, float, str]]:
        """Yield machine, component, moment and who, of alerts acknowledged at the console.

        Raises:
            UnavailableError: The console cannot be reached, or answers something else.
        """
        path = f"{urlsplit(self._url).path.rstrip('/')}/console/api/alerts"
        try:
            with open_connection(self._url, STALL_S, time.monotonic() + TOTAL_S) as connection:
                connection.request("GET", path)
                found = json.loads(connection.getresponse().read(MAX_ANSWER_BYTES))
            for each in found["acknowledged"]:
                if each["agent"] == AGENT:
                    who = str(each["acknowledged_by"])
                    yield each["machine"], each["component"], float(each["moment"]), who
        except (OSError, HTTPException, KeyError, TypeError, ValueError) as error:
            message = f"console: expected its alerts, got {error!r:.100}"
            raise UnavailableError(message) from error

    def close(self) -> None:
        """Close the queue."""
        self._outbox.close()

    def _forecast(self, moment: Moment, n: int) -> Mapping[str, Any]:
        low, middle, high = moment.answers.hours[n].tolist()
        cap = self._calibration.cap_hours
        return {
            "machine": moment.machines[n],
            "time": f"{moment.time.isoformat()}Z",
            "version": moment.answers.version,
            "variant": moment.variants[n],
            "hazard": moment.answers.chance[n].T.round(4).tolist(),
            "life": [round(min(hours, cap), 1) for hours in (low, middle, high)],
            "components": list(self._calibration.components),
            "horizons_h": list(HORIZONS),
            "alert_horizon_h": self._rule.horizon_hours,
            "threshold": self._rule.raise_at,
        }

    def _record(self, fleet: Fleet, hours: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        """Yield telemetry and events of hours, in the messages of boxes."""
        times = {hour: f"{np.datetime64(fleet.start, 's') + 3600 * hour}Z" for hour in hours}
        for hour in hours:
            for m, machine in enumerate(fleet.machines):
                measured = fleet.telemetry[m, hour]
                if not np.isnan(measured).all():
                    values = {
                        name: None if np.isnan(value) else round(float(value), 4)
                        for name, value in zip(fleet.sensors, measured, strict=True)
                    }
                    head = {"kind": "telemetry", "machine": machine, "time": times[hour]}
                    yield {**head, "values": values}
        sorts = (
            ("error", fleet.errors, fleet.error_names),
            ("failure", fleet.failures, fleet.components),
            ("replaced", fleet.maintenance, fleet.components),
        )
        for sort, records, names in sorts:
            for k in np.flatnonzero(np.isin(records.hour, list(hours))):
                yield {
                    "kind": "event",
                    "machine": fleet.machines[records.machine[k]],
                    "event": sort,
                    "detail": str(names[records.kind[k]]),
                    "time": times[int(records.hour[k])],
                }
