"""A plant with real agents over HTTP, on a clock that tests move, and its console."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fastapi import FastAPI

from apps.console.server import add_console
from apps.maintenance.edge.agent import Agent
from apps.maintenance.edge.outbox import Priority
from apps.maintenance.edge.sources import MemorySource, Window
from apps.maintenance.sync.boxes import BoxReport, save_report
from apps.maintenance.sync.control import Control
from apps.maintenance.sync.database import Database
from apps.maintenance.sync.keys import load_private_key, make_key
from apps.maintenance.sync.operators import Action, Decision, write_operator
from apps.maintenance.sync.policy import Plan
from apps.maintenance.sync.publishing import find_offer, publish_bundle
from apps.maintenance.sync.rollout import Rollout, Shadow
from apps.maintenance.sync.server import create_app
from apps.maintenance.sync.shadow import run_shadow
from benchmarks.edge_models import FEATURES, make_bundle, make_history
from benchmarks.edge_rig import BRISK, ONE, QUICK, TWO, SignedFolder, serving, set_up_box


class Plant:
    """A fleet that is played turn by turn.

    Args:
        folder: For everything.
        num_boxes: Agents, each with two machines.
    """

    def __init__(self, folder: Path, num_boxes: int) -> None:
        self.ahead_s = 0.0
        self.start = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(
            days=7
        )
        self.hour = 0  # of the plant, since the start
        self.signed = SignedFolder(folder / "repository")
        publish_bundle(self.signed.repository, make_bundle(1))
        self.control = Control(folder, self.clock)
        self.key_file = folder / "ada.pem"
        make_key(self.key_file)
        self.key = load_private_key(self.key_file)
        write_operator(self.control.operators, "ada", self.key.public_key())
        self._history = make_history(2, 2)
        self._folder, self._num_boxes = folder, num_boxes
        self.agents: list[Agent] = []
        self.sources: list[MemorySource] = []

    def clock(self) -> float:
        """Return the time of the platform."""
        return time.time() + self.ahead_s

    def app(self) -> FastAPI:
        """Return the platform's side with its console."""
        app = create_app(self.control, self.control.repository)
        add_console(app, self.control, self.clock)
        return app

    def open(self, url: str) -> None:
        """Start the boxes, and bring version 1 to all of them."""
        self.url = url
        for idx in range(self._num_boxes):
            state = self._folder / f"box{idx}"
            set_up_box(state, self.signed.root, replace(BRISK, agent=state.name, cloud=url))
            self.sources.append(MemorySource())
            self.agents.append(Agent(state, self.sources[-1], patience=QUICK))
            self.agents[-1].start()
        self.begin(ONE, Plan(shares=(1.0,), approvals=()))
        self.settle()

    def begin(self, path: str, plan: Plan) -> Rollout:
        """Begin a rollout to the plant."""
        read, before = self.signed.repository.read, self.control.rollouts.stable(BRISK.group)
        old = run_shadow(read(before), self._history) if before else None
        shadow = Shadow(run_shadow(read(path), self._history), old)
        offer = find_offer(self.signed.repository, path)
        return self.control.rollouts.begin(offer, BRISK.group, plan, shadow)

    def begin_two(self) -> Rollout:
        """Publish version 2 and begin its rollout: canary, approval, the rest."""
        publish_bundle(self.signed.repository, make_bundle(2))
        return self.begin(TWO, Plan(shares=(0.25, 1.0), approvals=(0,)))

    def settle(self) -> None:
        """Play until nothing is pending any more."""
        for _ in range(30):
            self.turn()
            if all(each.tally.pending == 0 for each in self.control.rollouts.list()):
                return
        raise AssertionError(self.control.rollouts.list())

    def turn(
        self, *, offline: tuple[int, ...] = (), wear: Mapping[int, float] | None = None
    ) -> None:
        """Let an hour pass: windows, forecasts, and a talk of every box that is not offline.

        Args:
            offline: Boxes that do not talk.
            wear: Of the first machine of a box, where it is not that of a machine at rest.
        """
        moment = (self.start + timedelta(hours=self.hour)).isoformat()
        for idx, (agent, source) in enumerate(zip(self.agents, self.sources, strict=True)):
            for machine in range(2):
                worn = (wear or {}).get(idx, 0.2) if machine == 0 else 0.25
                values = sensors(self.hour, idx + machine, worn)
                window = Window(f"press-{idx}{'ab'[machine]}", moment, values)
                source.add([window])
            agent.forecast_once()
            if idx not in offline:
                agent.sync_once()
        self.hour += 1

    def telemetry(self, idx: int, values: Mapping[str, float | None]) -> None:
        """Queue sensor values of a box's first machine behind its other messages."""
        moment = (self.start + timedelta(hours=self.hour - 1)).isoformat()
        record = {"kind": "telemetry", "machine": f"press-{idx}a", "time": moment, "values": values}
        self.agents[idx].outbox.put([(Priority.FORECAST, json.dumps(record).encode())])

    def decide(self, number: int, action: Action) -> None:
        """Decide as the command does."""
        found = self.control.rollouts.get(number)
        decision = Decision(number, found.digest, found.stage, action, "ada", self.clock())
        self.control.rollouts.act(decision.sign(self.key))

    def close(self) -> None:
        """Stop every agent, and the platform."""
        for agent in self.agents:
            agent.outbox.close()
        self.control.close()


def sensors(hour: int, machine: int, wear: float) -> dict[str, float]:
    """Return features of a machine: a daily rhythm, and wear."""
    day = math.sin(2 * math.pi * hour / 24 + machine)
    values = dict.fromkeys(FEATURES, 0.1)
    values |= {"wear": wear, "load": 0.3 + 0.1 * day, "temperature": 0.4 + 0.1 * day + 0.2 * wear}
    return values | {"regime": 0.0}


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """A fleet's database with boxes a and b, and no messages."""
    with Database(tmp_path / "fleet.db") as found:
        for agent in ("a", "b"):
            facts = {"agent": agent, "group": "g", "version": 1, "digest": "", "confirmed": True}
            report = BoxReport.from_record(agent, {**facts, "failed": {}, "outcome": ""})
            with found.transaction() as db:
                save_report(db, report, 1.0)
        yield found


@contextmanager
def running(folder: Path) -> Iterator[Plant]:
    """Run four boxes on version 1, confirmed, and their platform."""
    found = Plant(folder, 4)
    with serving(found.app()) as url:
        found.open(url)
        yield found
    found.close()


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Plant]:
    """A plant that a test may change."""
    with running(tmp_path) as found:
        yield found


@pytest.fixture(scope="module")
def alerting_plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    """A plant with two open alerts, of machine ``press-0a``, that no test changes."""
    with running(tmp_path_factory.mktemp("plant")) as found:
        found.turn(wear={0: 0.9})
        found.turn(wear={0: 0.9})
        yield found
