"""The plant of ``edge_loop``: a fleet that drifts, its boxes, their platform, and an operator."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from apps.maintenance.edge.agent import Agent
from apps.maintenance.edge.sources import MemorySource, Window
from apps.maintenance.fleet import Fleet
from apps.maintenance.protocol import Rows, grid_rows
from apps.maintenance.simulate import NOISE, USUAL, SimulationConfig, simulate
from apps.maintenance.sync.boxes import read_messages
from apps.maintenance.sync.control import Control
from apps.maintenance.sync.evidence import HOUR_S, start_of
from apps.maintenance.sync.offers import Offer
from apps.maintenance.sync.operators import Action, Decision, write_operator
from apps.maintenance.sync.policy import Plan, Status
from apps.maintenance.sync.rollout import Shadow
from apps.maintenance.sync.shadow import ShadowFigures, ShadowLimits
from apps.maintenance.training.retrain_record import (
    named_columns,
)
from benchmarks.edge_rig import BRISK, QUICK, SignedFolder, set_up_box

GROUP = "plant"
NUM_BOXES = 6
TURN_H = 24  # hours between two talks of a box
WINDOW_H = 6  # hours between two windows of a machine
TURN_OF = np.array([-1.0, 1.0, -1.0, 1.0])  # of the sensors' answer to wear, by sensor
SHIFT = np.array([3.0, 2.0, -3.0, 2.0])  # of where sensors stand, in deviations
MAX_TURNS = 20  # of a rollout
PATIENCE = replace(QUICK, total_s=30, stall_s=10)  # one process plays everybody


@dataclass(frozen=True, slots=True)
class Days:
    """The course of the play, in days of the fleet.

    Args:
        train: The first model is trained on as many.
        drift: Then the physics changes.
        latest: A trigger must have led to a retraining by then.
        after: The new model is watched for as many.
    """

    train: int = 50
    drift: int = 100
    latest: int = 165
    after: int = 50


def drifting_fleet(num_machines: int, days: Days, seed: int) -> Fleet:
    """Return a fleet whose sensors change on the day of the drift."""
    fleet = simulate(SimulationConfig(num_machines, days.latest + days.after, seed))
    first = days.drift * 24
    telemetry = fleet.telemetry.copy()
    deviation = (telemetry[:, first:] - USUAL) / NOISE
    telemetry[:, first:] = USUAL + NOISE * (TURN_OF * deviation + SHIFT)
    return replace(fleet, telemetry=telemetry)


class FleetClock:
    """The time of a fleet, for its platform.

    Args:
        fleet: Whose.
        hour: At which it stands.
    """

    def __init__(self, fleet: Fleet, hour: int) -> None:
        self._start = start_of(fleet)
        self.hour = hour

    def __call__(self) -> float:
        """Return now, seconds since 1970."""
        return self._start + self.hour * HOUR_S


class Play:
    """The plant, its boxes, its platform and its operator.

    Args:
        folder: For everything.
        fleet: Of the whole time.
        clock: Of the platform; moved by the play.
        control: The platform.
        signed: Its repository.
        url: Where it answers.
    """

    def __init__(
        self,
        folder: Path,
        fleet: Fleet,
        clock: FleetClock,
        control: Control,
        signed: SignedFolder,
        url: str,
    ) -> None:
        self.fleet, self.control, self._clock = fleet, control, clock
        self._key = Ed25519PrivateKey.generate()
        write_operator(control.operators, "ada", self._key.public_key())
        rows = grid_rows(fleet)
        kept = rows.take(rows.hour % WINDOW_H == 0)
        columns = named_columns(fleet, kept)
        self._rows, self._names = kept, tuple(columns)
        self._values = np.stack(list(columns.values()), axis=1)
        self.agents: list[Agent] = []
        self._sources: list[MemorySource] = []
        for idx in range(NUM_BOXES):
            state = folder / f"box{idx}"
            settings = replace(BRISK, agent=state.name, group=GROUP, cloud=url, cap_bytes=2**28)
            set_up_box(state, signed.root, settings)
            self._sources.append(MemorySource())
            self.agents.append(Agent(state, self._sources[-1], patience=PATIENCE))
            self.agents[-1].start()

    @property
    def hour(self) -> int:
        """At which the play stands."""
        return self._clock.hour

    def turn(self) -> None:
        """Let a day pass at every box: windows, forecasts, a talk with the platform."""
        self._clock.hour += TURN_H
        inside = (self._rows.hour > self.hour - TURN_H) & (self._rows.hour <= self.hour)
        for idx, agent in enumerate(self.agents):
            own = np.flatnonzero(inside & (self._rows.machine % NUM_BOXES == idx))
            self._sources[idx].add([self._window(row) for row in own])
            while agent.forecast_once():
                pass
            agent.sync_once()

    def settle(self, number: int) -> None:
        """Play until a rollout is over; the operator approves what waits for it."""
        for _ in range(MAX_TURNS):
            rollout = self.control.rollouts.get(number)
            if rollout.status in {Status.DONE, Status.STOPPED}:
                break
            if rollout.status is Status.AWAITING_APPROVAL:
                decision = Decision(
                    number,
                    rollout.digest,
                    rollout.stage,
                    Action.APPROVE,
                    "ada",
                    self.control.clock(),
                )
                self.control.rollouts.act(decision.sign(self._key))
            self.turn()
        say(f"day {self.hour // 24}: rollout {number} {self.control.rollouts.get(number).status}")

    def begin(self, offer: Offer, shadow: ShadowFigures) -> None:
        """Bring the first model to all boxes, whatever its false alarms on a generated fleet."""
        everybody = Plan(shares=(1.0,), approvals=())
        limits = ShadowLimits(false_per_month=shadow.false_per_month)
        rollouts = self.control.rollouts
        self.settle(rollouts.begin(offer, GROUP, everybody, Shadow(shadow, None), limits).id)

    def uploaded(self) -> tuple[Rows, NDArray[np.float64], list[str]]:
        """Return windows, hazards [N, C, H] and versions of all forecasts that came in."""
        start = start_of(self.fleet)
        found: list[tuple[int, int, Any, str]] = []
        for agent in self.agents:
            for _, body in read_messages(self.control.database, agent.settings.agent, limit=10**7):
                if body["kind"] == "forecast":
                    moment = np.datetime64(body["time"]).astype("datetime64[s]").astype(float)
                    machine = list(self.fleet.machines).index(body["machine"])
                    hour = round((moment - start) / HOUR_S)
                    found.append((machine, hour, body["hazard"], body["version"]))
        found.sort(key=lambda each: each[:2])
        rows = Rows(*(np.array([each[idx] for each in found], np.int64) for idx in range(2)))
        return rows, np.array([each[2] for each in found]), [each[3] for each in found]

    def features(self, rows: Rows, names: Sequence[str]) -> NDArray[np.float32]:
        """Return what boxes were fed for windows [N, D]."""
        stride = self.fleet.num_hours + 1
        keys = self._rows.machine * stride + self._rows.hour
        place = np.searchsorted(keys, rows.machine * stride + rows.hour)
        columns = [self._names.index(name) for name in names]
        return self._values[place][:, columns].astype(np.float32)

    def close(self) -> None:
        """Stop every agent."""
        for agent in self.agents:
            agent.outbox.close()

    def _window(self, row: np.int64) -> Window:
        moment = self.fleet.start + timedelta(hours=int(self._rows.hour[row]))
        values = zip(self._names, self._values[row].tolist(), strict=True)
        known = {name: value for name, value in values if value == value}  # noqa: PLR0124 - NaN
        return Window(self.fleet.machines[self._rows.machine[row]], moment.isoformat(), known)


def say(text: str) -> None:
    """Say progress."""
    print(f"[{time.perf_counter() - _STARTED:6.0f} s] {text}", file=sys.stderr, flush=True)


_STARTED = time.perf_counter()
