"""What ``trimoe edge init``, ``run``, ``status`` and ``trimoe sync import`` do."""

import argparse
import http.client
import json
import logging
import signal
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata

from apps.maintenance.edge.agent import EVENTS, Agent
from apps.maintenance.edge.durable import write_whole
from apps.maintenance.edge.eventlog import read_events
from apps.maintenance.edge.health import HOST, HealthServer
from apps.maintenance.edge.lock import AgentRunsError, sole_agent
from apps.maintenance.edge.settings import CONFIG, ROOT, Settings
from apps.maintenance.edge.slots import Slots
from apps.maintenance.edge.sources import CsvTail, MemorySource
from apps.maintenance.edge.stick import take_stick
from apps.maintenance.sync.outcomes import Outcome
from cluster.errors import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

LOG = logging.getLogger(__name__)
NUM_EVENTS = 10  # that ``status`` shows
_ASK_S = 2.0


def init(args: argparse.Namespace) -> int:
    """Set up a box: its settings and the root it trusts."""
    state: Path = args.state
    if (state / CONFIG).exists():
        message = f"{state}: expected a new box, it was set up before"
        raise ConfigurationError(message)
    root = args.root.read_bytes()
    try:
        Metadata.from_bytes(root).verify_delegate("root", Metadata.from_bytes(root))
    except (RepositoryError, TypeError, ValueError) as error:
        message = f"{args.root}: expected a signed root, such as metadata/1.root.json: {error}"
        raise ConfigurationError(message) from error
    settings = Settings(
        agent=args.agent,
        group=args.group,
        cloud=args.cloud,
        pin=args.pin,
        sync_s=args.sync_s,
        cap_bytes=args.cap_mb * 2**20,
        health_port=args.health_port,
    )
    state.mkdir(parents=True, exist_ok=True)
    write_whole(state / ROOT, root)
    settings.write(state)
    return _say({"agent": settings.agent, "group": settings.group, "state": str(state)})


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM."""
    state: Path = args.state
    settings = Settings.read(state)
    with sole_agent(state):
        agent = Agent(state, CsvTail(args.csv, state / "place.json"))
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda *_: agent.stop())
        agent.start()
        with HealthServer(settings.health_port, agent.status) as health:
            LOG.info("http://%s:%d/health", HOST, health.port)
            agent.run()
    return 0


def import_stick(args: argparse.Namespace) -> int:
    """Bring a stick to a box: its agent takes it, or this command if none runs."""
    state: Path = args.state
    Settings.read(state)
    take_stick(args.stick, state)
    try:
        with sole_agent(state):
            agent = Agent(state, MemorySource())
            agent.start()
            outcome = agent.take_stick()
            agent.outbox.close()
    except AgentRunsError:
        return _say({"outcome": "handed over", "to": "the agent that runs"})
    _say({"outcome": outcome, "version": agent.slots.pointer.version})
    return 0 if outcome in {Outcome.SWITCHED, Outcome.UP_TO_DATE} else 1


def status(args: argparse.Namespace) -> int:
    """Say how a box is: from its agent if one runs, and from its disk in any case."""
    state: Path = args.state
    settings = Settings.read(state)
    pointer = Slots(state).pointer
    facts = {
        "agent": settings.agent,
        "group": settings.group,
        "version": pointer.version,
        "slot": pointer.active,
        "confirmed": pointer.is_confirmed,
        "failed": dict(pointer.failed),
        "running": _ask(settings.health_port),
        "events": list(read_events(state / EVENTS))[-NUM_EVENTS:],
    }
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1))
    _say(facts)
    return 0 if pointer.version else 1


def _ask(port: int) -> Mapping[str, Any] | None:
    """Return what the running agent says; None if none answers."""
    connection = http.client.HTTPConnection(HOST, port, timeout=_ASK_S)
    try:
        connection.request("GET", "/health")
        found: Mapping[str, Any] = json.loads(connection.getresponse().read(2**20))
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
    return found


def _say(facts: Mapping[str, object]) -> int:
    sys.stdout.write(json.dumps(facts, indent=1) + "\n")
    return 0
