"""The platform's side over real HTTP, with real agents and the commands."""

import argparse
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from apps.maintenance.edge import commands as edge_commands
from apps.maintenance.edge.agent import Agent
from apps.maintenance.edge.sources import MemorySource
from apps.maintenance.sync import commands as sync_commands
from apps.maintenance.sync.boxes import read_messages
from apps.maintenance.sync.control import Control
from apps.maintenance.sync.outcomes import Outcome
from apps.maintenance.sync.policy import Plan, Status
from apps.maintenance.sync.publishing import find_offer, publish_bundle
from apps.maintenance.sync.rollout import Shadow
from apps.maintenance.sync.shadow import run_shadow
from benchmarks.edge_kill import append_windows
from benchmarks.edge_models import Fault, make_bundle, make_history
from benchmarks.edge_rig import (
    BRISK,
    ONE,
    QUICK,
    Box,
    SignedFolder,
    set_up_box,
    sync_server,
    windows,
)
from cluster.errors import ConfigurationError

ROOT = Path(__file__).parents[4]
PROGRAM = """
import argparse, sys
sys.modules["cryptography"] = None  # a box does without
from apps.maintenance.edge.commands import add_parser
parser = argparse.ArgumentParser()
add_parser(parser.add_subparsers())
args = parser.parse_args()
heavy = {"torch", "ray", "pandas", "pyarrow", "sklearn", "fastapi", "core_model"}
status = args.run(args)
print(sorted(heavy & sys.modules.keys()))
sys.exit(status)
"""


def trimoe(*words: object) -> int:
    """Run a command as ``trimoe`` does."""
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    edge_commands.add_parser(subparsers)
    sync_commands.add_parser(subparsers)
    args = parser.parse_args([str(word) for word in words])
    status: int = args.run(args)
    return status


def post(url: str, path: str, body: bytes) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    connection.request("POST", path, body)
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


@pytest.fixture
def control(signed: SignedFolder) -> Iterator[Control]:
    """The fleet whose repository is the signed one."""
    with Control(signed.folder.parent) as found:
        yield found


@contextmanager
def edge_agent(state: Path, csv: Path) -> Iterator[list[str]]:
    """Run ``trimoe edge run`` in a process of its own, end it as a service manager does.

    Yields an empty list; then it holds what was printed.
    """
    command = [sys.executable, "-c", PROGRAM, "edge", "run", "--state", state, "--csv", csv]
    process = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    said: list[str] = []
    try:
        yield said
    finally:
        process.send_signal(signal.SIGTERM)
        said += process.communicate(timeout=20)[0].splitlines()
    assert process.returncode == 0


def wait_for(url: str, port: int, **expected: object) -> dict[str, Any]:
    """Return the health of an agent once it is as expected."""
    end_s = time.monotonic() + 20
    facts: dict[str, Any] = {}
    while time.monotonic() < end_s:
        try:
            with urllib.request.urlopen(f"{url}:{port}/health", timeout=2) as answer:
                facts = json.load(answer)
        except OSError:
            time.sleep(0.05)
            continue
        if all(facts.get(name) == value for name, value in expected.items()):
            return facts
        time.sleep(0.05)
    raise AssertionError(facts)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.clock
def test_from_keys_to_a_forecast_by_commands_alone(tmp_path: Path) -> None:
    """sync publish and rollout, edge init and run: forecasts arrive at the platform."""
    fleet, keys, state = tmp_path / "fleet", tmp_path / "keys", tmp_path / "box"
    (tmp_path / "1.bundle").write_bytes(make_bundle(1))
    make_history(3, 3).write(tmp_path / "history.npz")
    publish = ("sync", "publish", "--fleet", fleet, "--keys", keys)
    assert trimoe(*publish, "--init") == 0
    assert trimoe(*publish, "--bundle", tmp_path / "1.bundle") == 0
    begin = ("sync", "rollout", "begin", "--fleet", fleet, "--group", "plant")
    history = ("--history", tmp_path / "history.npz")
    assert trimoe(*begin, *history, "forecast-both/1.tar") == 0
    port = free_port()
    append_windows(tmp_path / "telemetry.csv", 0, 50)
    with Control(fleet) as control, sync_server(control, control.repository) as url:
        root = fleet / "repository" / "metadata" / "1.root.json"
        name = ("--agent", "box", "--group", "plant", "--root", root)
        talk = ("--cloud", url, "--health-port", port, "--sync-s", 0.1)
        init: tuple[object, ...] = ("edge", "init", "--state", state, *name, *talk)
        assert trimoe(*init) == 0
        with pytest.raises(ConfigurationError, match="set up before"):
            trimoe(*init)
        with edge_agent(state, tmp_path / "telemetry.csv") as said:
            wait_for("http://127.0.0.1", port, version=1, waiting=0, windows=50)
        assert said == ["[]"]  # nothing heavy was imported
        found = [body for _, body in read_messages(control.database, "box")]
        assert sum(body["kind"] == "forecast" for body in found) == 50
        assert {"started", "fetched", "switched"} <= {body.get("event") for body in found}
        (box,) = control.boxes()
        assert (box.version, box.is_offline) == (1, False)
        control.verify_audit()


def test_a_stick_and_decisions_by_commands(box: Box, signed: SignedFolder, tmp_path: Path) -> None:
    box.close()
    fleet = signed.folder.parent
    publish_bundle(signed.repository, make_bundle(2))
    stick, state = tmp_path / "stick", ("--state", box.state)
    assert trimoe("sync", "export", "--fleet", fleet, "forecast-both/2.tar", "--out", stick) == 0
    assert trimoe("sync", "import", stick, *state) == 0
    assert trimoe("sync", "import", stick, *state) == 1  # 2 is watched yet
    assert trimoe("edge", "status", *state, "--json", tmp_path / "s.json") == 0
    facts = json.loads((tmp_path / "s.json").read_text())
    assert (facts["version"], facts["confirmed"], facts["running"]) == (2, False, None)
    make_history(3, 3).write(tmp_path / "history.npz")
    begin = ("sync", "rollout", "begin", "--fleet", fleet, "--group", "plant")
    history = ("--history", tmp_path / "history.npz")
    assert trimoe(*begin, "forecast-both/2.tar", *history) == 0
    operator = ("--operator", "ada", "--key", tmp_path / "ada.pem")
    assert trimoe("sync", "rollout", "operator", "--fleet", fleet, "ada", *operator[2:]) == 0
    for verb, status in (("pause", "paused"), ("resume", "running"), ("stop", "stopped")):
        assert trimoe("sync", "rollout", verb, "--fleet", fleet, 1, *operator) == 0
        assert trimoe("sync", "status", "--fleet", fleet, "--json", tmp_path / "f.json") == 0
        facts = json.loads((tmp_path / "f.json").read_text())
        assert [each["status"] for each in facts["rollouts"]] == [status]


def test_ranges_of_the_repository(control: Control) -> None:
    with sync_server(control, control.repository) as url:
        path = url + "/repository/metadata/1.root.json"
        whole = urllib.request.urlopen(path).read()
        question = urllib.request.Request(path, headers={"Range": "bytes=100-"})
        with urllib.request.urlopen(question) as answer:
            assert answer.status == 206
            assert answer.read() == whole[100:]
        connection = http.client.HTTPConnection(urlsplit(url).netloc)
        connection.request("GET", "/repository/../fleet.db")
        assert connection.getresponse().status == 404
        connection.close()


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/fleet/a/report", b"{}", 400),
        ("/fleet/a/report", b"[1]", 400),
        ("/fleet/a/report", b"no json", 400),
        ("/fleet/a/messages", b'{"messages": []}', 400),
        (
            "/fleet/a/messages",
            b'{"messages": [{"seq": 2, "body": {}}, {"seq": 1, "body": {}}]}',
            400,
        ),
        ("/fleet/a/messages", b'{"messages": "' + b"." * 5_000_000 + b'"}', 400),
        ("/fleet/rollouts/1/decisions", b"{}", 400),
    ],
)
def test_bodies_that_are_something_else(
    control: Control, path: str, body: bytes, status: int
) -> None:
    with sync_server(control, control.repository) as url:
        found, answer = post(url, path, body)
        assert found == status
        assert "expected" in answer["message"]


@pytest.mark.clock
def test_a_bad_model_stops_its_rollout_by_itself(
    signed: SignedFolder, control: Control, tmp_path: Path
) -> None:
    """It passes the golden batch and the shadow, and fails on the health of the canary."""
    history = make_history(2, 2)
    plan = Plan(shares=(0.1, 1.0), approvals=())
    bad = publish_bundle(signed.repository, make_bundle(2, Fault.ALARMING_LIVE))
    figures = run_shadow(signed.repository.read(ONE), history)
    with sync_server(control, control.repository) as url:
        agents: list[Agent] = []
        sources: dict[Agent, MemorySource] = {}
        for idx in range(10):
            settings = replace(BRISK, agent=f"box{idx}", cloud=url)
            set_up_box(tmp_path / f"box{idx}", signed.root, settings)
            source = MemorySource()
            agents.append(Agent(tmp_path / f"box{idx}", source, patience=QUICK))
            agents[-1].start()
            sources[agents[-1]] = source
        first = find_offer(signed.repository, ONE)
        control.rollouts.begin(first, "plant", plan, Shadow(figures, None))

        def turn() -> None:
            for agent in agents:
                sources[agent].add(windows(8, regime=1.0))
                agent.sync_once()
                agent.forecast_once()

        while control.rollouts.list()[0].status is not Status.DONE:
            turn()
        shadow = Shadow(run_shadow(signed.repository.read(bad.path), history), figures)
        control.rollouts.begin(bad, "plant", plan, shadow)
        for _ in range(6):
            turn()
        rollout = control.rollouts.list()[0]
        assert rollout.status is Status.STOPPED
        assert rollout.tally.failed == rollout.tally.num == 1
        assert [agent.slots.pointer.version for agent in agents] == [1] * 10
        events = [each["event"] for agent in agents for each in agent.events.tail(10**6)]
        assert events.count(Outcome.HEALTH_ALERTS) == 1
        for agent in agents:
            agent.outbox.close()
