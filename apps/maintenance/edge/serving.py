"""What serves on this box at this moment, and the watch over it after a switch.

Rules:
    1. While a new model is watched, the one before it is loaded too.  Windows that the new one
       cannot answer are answered by the old one in the same call.
    2. A verdict against the new one moves the pointer first and the model second, so a kill in
       between ends with the good slot as well.
    3. A slot whose files were altered is written anew from its packed bundle, or given up.

Knows: slots, models, the watch.  Does not know: sources, the queue, the network.
"""

import threading
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from apps.maintenance.edge.forecast import Forecaster, Forecasts
from apps.maintenance.edge.slots import MAX_STARTS, Slots
from apps.maintenance.edge.watch import HealthLimits, HealthWatch
from apps.maintenance.sync.outcomes import Outcome, RefusedError
from cluster.errors import UnavailableError

Note = Callable[[str, str], None]  # event, detail


class Serving:
    """The model that serves; may be used by the forecasting and the syncing thread.

    Args:
        slots: Of this box.
        limits: What a new model may do while it is watched.
        note: Told of every change.
        clock: Returns now, seconds, monotonic.
    """

    def __init__(
        self,
        slots: Slots,
        limits: HealthLimits,
        note: Note,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots = slots
        self._limits = limits
        self._note = note
        self._clock = clock
        self._lock = threading.RLock()
        self._watch: HealthWatch | None = None
        self._before: Forecaster | None = None
        self.forecaster: Forecaster | None = None

    def start(self) -> None:
        """Load what the pointer names, after a start of the process."""
        pointer = self._slots.pointer
        if not pointer.is_confirmed:
            if pointer.starts >= MAX_STARTS:
                self._roll_back(Outcome.HEALTH_CRASHES, f"{pointer.starts} starts in the watch")
            else:
                self._slots.count_start()
        self.load()

    def load(self) -> None:
        """Load what the pointer names; go back to the good slot if that fails."""
        with self._lock:
            while (slot := self._slots.pointer.active) and self.forecaster is None:
                try:
                    self.forecaster = self._open(slot)
                except RefusedError as refusal:
                    self._roll_back(refusal.outcome, refusal.detail)
            self._begin_watch()

    def switch(self) -> None:
        """Serve what the pointer names since an update."""
        with self._lock:
            self._before, self.forecaster = self.forecaster, None
            self.load()

    @property
    def is_watching(self) -> bool:
        """Whether a new model has yet to prove healthy."""
        return self._watch is not None

    def forecast(self, features: NDArray[np.float32]) -> Forecasts:
        """Return forecasts of windows [N, D], of the good model where the new one fails.

        Raises:
            UnavailableError: No model answers.
        """
        with self._lock:
            if self.forecaster is None:
                message = "expected a model, no slot holds one; bring one by sync or stick"
                raise UnavailableError(message)
            if self._watch is None:
                return self.forecaster.forecast(features)
            found = self._forecast_watched(self.forecaster, self._watch, features)
            self._end_watch()
            if found is None:
                fallback = self._before or self.forecaster
                return fallback.forecast(features)
            return found

    def tick(self) -> None:
        """Make up missing requests from the golden batch once the window is over, and judge."""
        with self._lock:
            if self._watch is None or self.forecaster is None:
                return
            while self._watch.is_over and self._watch.num_missing:
                golden = self.forecaster.golden.features
                self._forecast_watched(self.forecaster, self._watch, golden, is_golden=True)
            self._end_watch()

    def _open(self, slot: str) -> Forecaster:
        if not self._slots.is_whole(slot):
            self._slots.repair(slot)
            self._note("slot_repaired", f"slot {slot} was altered")
        return Forecaster(self._slots.folder(slot))

    def _begin_watch(self) -> None:
        pointer = self._slots.pointer
        if self.forecaster is None or pointer.is_confirmed:
            self._watch, self._before = None, None
            return
        share = self.forecaster.info.alerts.max_share
        self._watch = HealthWatch(self._limits, share, self._clock)
        if self._before is None and pointer.good:
            try:
                self._before = self._open(pointer.good)
            except RefusedError as refusal:
                self._note(refusal.outcome, f"good slot {pointer.good}: {refusal.detail}")

    def _forecast_watched(
        self,
        forecaster: Forecaster,
        watch: HealthWatch,
        features: NDArray[np.float32],
        *,
        is_golden: bool = False,
    ) -> Forecasts | None:
        """Return forecasts, None where the watched model has none that can be used."""
        try:
            found = forecaster.forecast(features)
        except UnavailableError:
            watch.note_error()
            return None
        num_insane = int((~found.is_sane).sum())
        watch.note(
            found.took_ms,
            num_windows=0 if is_golden else features.shape[0],
            num_alerts=0 if is_golden else int(found.is_alert.any(axis=1).sum()),
            num_insane=num_insane,
        )
        return None if num_insane else found

    def _end_watch(self) -> None:
        verdict = self._watch.verdict() if self._watch is not None else None
        if verdict is None:
            return
        outcome, detail = verdict
        if outcome is Outcome.CONFIRMED:
            self._slots.confirm()
            self._watch, self._before = None, None
            self._note(outcome, f"version {self._slots.pointer.version}: {detail}")
            return
        before = self._before
        self._roll_back(outcome, detail)
        self.forecaster, self._before = before, None
        self.load()

    def _roll_back(self, outcome: Outcome, detail: str) -> None:
        version = self._slots.pointer.version
        self._slots.roll_back(outcome)
        now = self._slots.pointer.version
        self._note(outcome, f"version {version} given up, version {now} serves: {detail}")
