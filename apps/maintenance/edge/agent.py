"""The agent of an edge box: windows in, forecasts queued, models taken, alone for weeks.

Two threads: one forecasts, one talks to the platform.  Neither waits for the other: a network
that hangs costs no forecast, and a forecast never waits for an upload.

Knows: the order of things.  Does not know: sensors (``sources``), TUF, HTTP, SQLite.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from apps.maintenance.edge.drift import Sketch
from apps.maintenance.edge.eventlog import EventLog
from apps.maintenance.edge.forecast import Forecasts
from apps.maintenance.edge.outbox import Outbox, Priority
from apps.maintenance.edge.serving import Serving
from apps.maintenance.edge.settings import ROOT, Settings
from apps.maintenance.edge.slots import Slots
from apps.maintenance.edge.sources import Source, Window
from apps.maintenance.edge.stick import arrived_stick
from apps.maintenance.edge.update import Membership, Updates
from apps.maintenance.edge.uplink import Uplink
from apps.maintenance.sync.fetcher import FolderFetcher, HttpFetcher, Patience
from apps.maintenance.sync.outcomes import Outcome, RefusedError
from apps.maintenance.sync.trust import Mirror, TrustStore
from cluster.errors import TrimoeError, UnavailableError

LOG = logging.getLogger(__name__)
MAX_WINDOWS = 64  # of one request; at 55 us each (2026-11-28, x86-64) far within the watch's 10 ms
POLL_S = 0.5
EVENTS = "events.jsonl"


@dataclass(slots=True)
class Counts:
    """What was done since the start of the process."""

    windows: int = 0
    alerts: int = 0
    incomplete: int = 0
    failed: int = 0
    uploaded: int = 0


@dataclass(frozen=True, slots=True)
class Clocks:
    """Where time comes from.

    Args:
        monotonic: Seconds; for whatever lasts.
        now: The calendar; for whatever expires.
    """

    monotonic: Callable[[], float] = time.monotonic
    now: Callable[[], datetime] | None = None


class Agent:
    """One box; owns everything in its state folder.

    Args:
        state: Its folder, set up by ``trimoe edge init``.
        source: Yields windows.
        patience: How long an update is borne with.
        clocks: Where time comes from.

    Raises:
        FileNotFoundError, ConfigurationError: The folder is not that of a box.
    """

    def __init__(
        self,
        state: Path,
        source: Source,
        *,
        patience: Patience | None = None,
        clocks: Clocks | None = None,
    ) -> None:
        clocks = clocks or Clocks()
        self.settings = Settings.read(state)
        self._state = state
        self._source = source
        self._patience = patience or Patience()
        self.outbox = Outbox(state / "outbox.db", self.settings.cap_bytes)
        self.events = EventLog(state / EVENTS, self.outbox, clocks.now)
        self.slots = Slots(state)
        self.serving = Serving(self.slots, self.settings.limits, self.events.add, clocks.monotonic)
        self._trust = TrustStore(state / "trust", (state / ROOT).read_bytes(), clocks.now)
        membership = Membership(self.settings.group, self.settings.pin)
        self._updates = Updates(self.slots, self._trust, membership, self.events.add, clocks.now)
        self.counts = Counts()
        self.drift = Sketch()
        self.last_outcome: Outcome | None = None
        self._said: dict[str, tuple[str, str]] = {}
        self._last_contact = ""
        self._alerting: set[tuple[str, str]] = set()
        self._stopping = threading.Event()

    def start(self) -> None:
        """Load the model; from here on the box serves, with or without a network."""
        if self.outbox.was_damaged:
            self.events.add("outbox_damaged", "the file was set aside; what waited in it is lost")
        if self.slots.was_damaged:
            self.events.add("pointer_damaged", "it was made anew from the slots")
        self.serving.start()
        self.events.add("started", f"version {self.slots.pointer.version}")

    def run(self) -> None:
        """Forecast and talk until ``stop``."""
        talking = threading.Thread(target=self._talk, name="sync", daemon=True)
        talking.start()
        try:
            while not self._stopping.is_set():
                if not self._forecast_surely():
                    self._stopping.wait(POLL_S)
        finally:
            self._stopping.set()
            talking.join(self._patience.total_s)
            self.outbox.close()

    def stop(self) -> None:
        """End ``run`` soon."""
        self._stopping.set()

    def forecast_once(self) -> int:
        """Forecast what has come; return the number of windows."""
        self.serving.tick()
        forecaster = self.serving.forecaster
        if forecaster is None:
            return 0
        windows = self._source.poll(MAX_WINDOWS)
        if not windows:
            return 0
        names, required = forecaster.info.features, forecaster.info.required
        whole = [each for each in windows if all(name in each.features for name in required)]
        try:
            if whole:
                features = np.array(
                    [[each.features.get(name, np.nan) for name in names] for each in whole],
                    np.float32,
                )
                found = self.serving.forecast(features)
                self._queue(whole, found)
                self.drift.note(forecaster.info, features, found)
        except UnavailableError as error:
            self.counts.failed += len(whole)
            self._say("forecast", "forecast_failed", str(error))
            return 0  # the windows stay where they are
        self._source.commit()
        self.counts.windows += len(whole)
        if len(whole) < len(windows):
            self.counts.incomplete += len(windows) - len(whole)
            self._say(
                "windows", "windows_incomplete", f"expected {', '.join(required)}, some had less"
            )
        return len(windows)

    def sync_once(self) -> Outcome | None:
        """Report, upload and update; return how the update ended, None if none was due."""
        wanted = None
        if self.settings.cloud:
            uplink = Uplink(self.settings.cloud, self.settings.agent)
            try:
                wanted = uplink.report(self.status())
                self.counts.uploaded += uplink.drain(self.outbox)
                self._said.pop("link", None)
                self._last_contact = datetime.now().astimezone().isoformat(timespec="seconds")
            except UnavailableError as error:
                self._say("link", "offline", str(error))
        if arrived_stick(self._state) is not None:
            return self.take_stick()
        if wanted is None:
            return None
        fetcher = HttpFetcher(self._state / "parts", self._patience)
        url = f"{self.settings.cloud.rstrip('/')}/repository"
        return self.update_from(Mirror(url, fetcher), wanted)

    def take_stick(self) -> Outcome | None:
        """Update from the stick that waits in this box; None if none does or a model is watched."""
        stick = arrived_stick(self._state)
        if stick is None:
            return None
        outcome = self.update_from(Mirror(stick.url, FolderFetcher()), stick.wanted)
        if outcome is not None:
            stick.discard()
        return outcome

    def update_from(self, mirror: Mirror, wanted: str | None) -> Outcome | None:
        """Make one attempt to update; None while a new model is watched: one change at a time."""
        if self.serving.is_watching:
            return None
        try:
            outcome = self._updates.attempt(mirror, wanted)
            detail = f"version {self.slots.pointer.version}"
        except RefusedError as refusal:
            outcome, detail = refusal.outcome, refusal.detail
        self.last_outcome = outcome
        if outcome is Outcome.SWITCHED:
            self.events.add(outcome, detail)
            self.serving.switch()
        elif outcome is Outcome.UP_TO_DATE:
            self._said.pop("update", None)
        else:
            self._say("update", outcome, detail)
        return outcome

    def status(self) -> Mapping[str, object]:
        """Return how the box is."""
        pointer = self.slots.pointer
        signed_at = self._trust.signed_at
        return {
            "agent": self.settings.agent,
            "group": self.settings.group,
            "version": pointer.version,
            "digest": pointer.digest,
            "slot": pointer.active,
            "confirmed": pointer.is_confirmed,
            "failed": dict(pointer.failed),
            "outcome": self.last_outcome or "",
            "waiting": self.outbox.num_waiting,
            "evicted": {each.name.lower(): num for each, num in self.outbox.evicted.items()},
            "windows": self.counts.windows,
            "alerts": self.counts.alerts,
            "incomplete": self.counts.incomplete,
            "drift": self.drift.facts(),
            "last_contact": self._last_contact,
            "signed_at": signed_at.isoformat() if signed_at else "",
        }

    def _talk(self) -> None:
        while not self._stopping.is_set():
            try:
                self.sync_once()
            except Exception as error:
                LOG.exception("a talk with the platform failed")
                self._say("talk", "sync_failed", repr(error))
            self._stopping.wait(self.settings.sync_s)

    def _forecast_surely(self) -> int:
        """Forecast; a source that cannot be read is an event, and no end of the agent."""
        try:
            return self.forecast_once()
        except (OSError, TrimoeError) as error:
            self._say("source", "source_failed", str(error))
            return 0

    def _queue(self, windows: Sequence[Window], found: Forecasts) -> None:
        """Put forecasts and the alerts that begin with them on disk."""
        forecaster = self.serving.forecaster
        components = forecaster.info.components if forecaster is not None else ()
        messages: list[tuple[Priority, bytes]] = []
        for idx, window in enumerate(windows):
            facts = {
                "machine": window.machine,
                "time": window.time,
                "version": found.version,
                "hazard": [[round(float(p), 4) for p in row] for row in found.hazard[idx]],
                "life": [round(float(hours), 1) for hours in found.life[idx]],
            }
            messages.append((Priority.FORECAST, _encode("forecast", facts)))
            values = {name: round(value, 4) for name, value in window.features.items()}
            seen = {"machine": window.machine, "time": window.time, "values": values}
            messages.append((Priority.TELEMETRY, _encode("telemetry", seen)))
            for component, is_alert in zip(components, found.is_alert[idx], strict=True):
                key = window.machine, component
                if is_alert and key not in self._alerting:
                    body = _encode("alert", {**facts, "component": component})
                    messages.append((Priority.ALERT, body))
                    self.counts.alerts += 1
                (self._alerting.add if is_alert else self._alerting.discard)(key)
        self.outbox.put(messages)

    def _say(self, topic: str, event: str, detail: str) -> None:
        """Record an event, once while the topic stands as it does."""
        if self._said.get(topic) != (event, detail):
            self._said[topic] = event, detail
            self.events.add(event, detail)


def _encode(kind: str, facts: Mapping[str, object]) -> bytes:
    return json.dumps({"kind": kind, **facts}, separators=(",", ":")).encode()
