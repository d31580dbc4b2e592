"""What follows from the forecasts of a moment: alerts, and who is told.

FOLDER/alerts.json       the book
FOLDER/webhook.db, mqtt.db, dashboard.db    what waits to go out
"""

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from apps.maintenance.alerts import Alert
from apps.maintenance.fleet import Fleet
from apps.maintenance.forecasts.book import (
    load_book,
    message_of,
    rule_of,
    save_book,
    see_moment,
    see_repairs,
)
from apps.maintenance.forecasts.calibration import Calibration
from apps.maintenance.forecasts.courier import Courier, Send
from apps.maintenance.forecasts.dashboard import Dashboard
from apps.maintenance.forecasts.moment import Moment
from cluster.client import Client
from cluster.errors import UnavailableError

LOG = logging.getLogger(__name__)
BOOK = "alerts.json"
TALK_S = 60.0  # between two talks with the console


class Dispatch:
    """The alerts of one plant and their ways out.

    Args:
        folder: As above; made if there is none.
        calibration: Of the model.
        ways: How to deliver an alert, by name.
        dashboard: URL of the console; empty for none.
    """

    def __init__(
        self, folder: Path, calibration: Calibration, ways: Mapping[str, Send], dashboard: str = ""
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        rule = rule_of(calibration)
        self._path, self._calibration = folder / BOOK, calibration
        self._book = load_book(rule, self._path)
        self._lock = threading.Lock()
        self.couriers = [Courier(name, folder, send) for name, send in ways.items()]
        self._dashboard = Dashboard(dashboard, folder, calibration, rule) if dashboard else None
        self._stopping = threading.Event()
        runs = [courier.run for courier in self.couriers] + [self._talk] * bool(dashboard)
        self._threads = [threading.Thread(target=run, daemon=True) for run in runs]

    def start(self) -> None:
        """Begin to deliver, first of all what has waited since the last run."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop delivering; what waits stays on disk."""
        self._stopping.set()
        for courier in self.couriers:
            courier.stop()
        for thread in self._threads:
            thread.join()
        for courier in self.couriers:
            courier.close()
        if self._dashboard is not None:
            self._dashboard.close()

    async def take(
        self, moment: Moment, fleet: Fleet, hours: Sequence[int], client: Client
    ) -> Sequence[Mapping[str, object]]:
        """Move the alerts on; return the messages of those that have begun or ended.

        Args:
            moment: The forecasts.
            fleet: That they are of, with the model's names.
            hours: On its grid, that the dashboard has not seen.
            client: The one door to the model, for contributions.

        Raises:
            InvalidRequestError, UnknownModelError, UnavailableError: Nothing was changed, or
                what was queued is queued once more by the next call, under the same ids.
        """
        with self._lock:
            book = load_book(self._book.rule, self._path)
            changed = [*see_repairs(book, fleet, fleet.num_hours - 1)]
            changed += await see_moment(book, moment, self._calibration, client)
            messages = [message_of(alert) for alert in changed]
            for message in messages:
                for courier in self.couriers:
                    courier.post(message)
            if self._dashboard is not None:
                self._dashboard.put(moment, fleet, hours, changed)
            save_book(book, self._path)
            self._book = book
        return messages

    def acknowledge(self, machine: str, component: str, who: str) -> None:
        """Note that somebody has seen an alert, and tell everybody.

        Raises:
            KeyError: There is no such open alert.
        """
        with self._lock:
            self._tell(self._book.acknowledge(machine, component, who))

    def acknowledge_by_message(self, topic: str, payload: bytes) -> None:
        """Do the same from ``PREFIX/MACHINE/acknowledge`` {"component", "name"}."""
        try:
            record = json.loads(payload)
            machine = topic.split("/")[-2]
            self.acknowledge(machine, str(record["component"]), str(record["name"])[:64])
        except (KeyError, TypeError, ValueError) as error:
            LOG.warning("%s: expected an open alert and who has seen it, got %.100r", topic, error)

    def _tell(self, alert: Alert) -> None:
        for courier in self.couriers:
            courier.post(message_of(alert))
        save_book(self._book, self._path)

    def _talk(self) -> None:
        """Talk with the console now and then."""
        while not self._stopping.is_set():
            try:
                self._talk_once()
            except UnavailableError as error:
                LOG.warning("dashboard: %s; what waits stays on disk", error)
            self._stopping.wait(TALK_S)

    def _talk_once(self) -> None:
        if self._dashboard is None:
            return
        self._dashboard.talk()
        for machine, component, moment_s, who in self._dashboard.acknowledged():
            with self._lock:
                for alert in self._book.open:
                    is_this = alert.key == (machine, component) and alert.raised_s == moment_s
                    if is_this and not alert.acknowledged_by:
                        self._tell(self._book.acknowledge(machine, component, who))
