"""A plant live: telemetry over MQTT into the history, a forecast each hour, alerts out.

    STATE/history/     what came in (``telemetry.history``)
    STATE/rejected.jsonl    payloads that could not be read, with reasons
    STATE/alerts.json and queues (``forecasts.dispatch``)

An hour is forecast ``GRACE_S`` after it is over, so that what is on its way is part of it.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from apps.maintenance.forecasts.calibration import Calibration
from apps.maintenance.forecasts.dispatch import Dispatch
from apps.maintenance.forecasts.moment import TELEMETRY_HOURS, Moment, forecast_hour
from apps.maintenance.telemetry.receiver import Receiver
from apps.maintenance.telemetry.records import read_history
from cluster.client import Client
from cluster.errors import ConfigurationError, UnavailableError

LOG = logging.getLogger(__name__)
GRACE_S = 120.0
LOOK_S = 0.5
RETRY_S = 10.0
HOUR = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Live:
    """The parts of a running plant.

    Args:
        history: Folder of the history.
        receiver: Fills it.
        dispatch: Takes the forecasts.
        client: The one door to the model.
        calibration: Of the model.
        clock: Returns now, seconds since 1970.
    """

    history: Path
    receiver: Receiver
    dispatch: Dispatch
    client: Client
    calibration: Calibration
    clock: Callable[[], float] = time.time

    def run(self, stopping: threading.Event, show: Callable[[Moment], None]) -> None:
        """Forecast hour by hour until told to stop."""
        thread = threading.Thread(target=self.receiver.run, name="receiver", daemon=True)
        thread.start()
        self.dispatch.start()
        done: datetime | None = None
        try:
            while not stopping.is_set():
                due = self.due()
                if due == done:
                    stopping.wait(LOOK_S)
                    continue
                try:
                    moment = self.forecast(due, done)
                except (OSError, UnavailableError) as error:
                    LOG.warning("forecast of %s: %s; again in %.0f s", due, error, RETRY_S)
                    stopping.wait(RETRY_S)
                    continue
                if moment is not None:
                    show(moment)
                done = due
        finally:
            self.receiver.stop()
            thread.join()
            self.dispatch.stop()

    def due(self) -> datetime:
        """Return the last hour whose grace is over, UTC without a zone."""
        now = datetime.fromtimestamp(self.clock() - GRACE_S, UTC)
        return now.replace(minute=0, second=0, microsecond=0, tzinfo=None)

    def forecast(self, until: datetime, before: datetime | None) -> Moment | None:
        """Forecast one hour; None if nothing is known of any machine yet.

        Args:
            until: The hour.
            before: The one forecast before it by this process; None if there was none.

        Raises:
            OSError, UnavailableError: The disk or the deployment is not there for us now.
        """
        self.receiver.seal(until.replace(tzinfo=UTC))
        try:
            fleet = self.calibration.align(read_history(self.history, until, TELEMETRY_HOURS))
        except ConfigurationError as error:
            LOG.warning("forecast of %s: %s", until, error)
            return None
        missed = 1 if before is None else min((until - before) // HOUR, TELEMETRY_HOURS)
        hours = range(fleet.num_hours - missed, fleet.num_hours)

        async def both() -> Moment | None:
            moment = await forecast_hour(self.client, fleet, fleet.num_hours - 1, self.calibration)
            if moment is not None:
                for message in await self.dispatch.take(moment, fleet, hours, self.client):
                    LOG.info("alert %s", message["id"])
            return moment

        return asyncio.run(both())

    @property
    def counts(self) -> Mapping[str, int]:
        """What came in and what was odd about it."""
        return self.receiver.counts
