"""A fleet of edge agents on one machine, with churn, through a good and a bad rollout.

    python -m benchmarks.edge_fleet --agents 500 --json FILE

Every agent is the real one, with its own state folder, queue, trust and slots; all talk HTTP to
the real sync server in this process.  In each turn some are offline, some restart, and some
join late.  Version 1 goes to all, version 2 by stages and with an operator's approval, version
3 passes golden batch and shadow and fails on the health of its canary.

Printed last: one JSON object; bytes are those of bundles over the wire, as agents logged them.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from apps.maintenance.edge.agent import Agent
from apps.maintenance.edge.sources import MemorySource
from apps.maintenance.sync.boxes import read_messages
from apps.maintenance.sync.control import Control
from apps.maintenance.sync.offers import Offer
from apps.maintenance.sync.operators import Action, Decision, write_operator
from apps.maintenance.sync.outcomes import Outcome
from apps.maintenance.sync.policy import Plan, Status
from apps.maintenance.sync.publishing import find_offer, publish_bundle
from apps.maintenance.sync.rollout import Shadow
from apps.maintenance.sync.shadow import run_shadow
from benchmarks.edge_models import Fault, make_bundle, make_history
from benchmarks.edge_rig import BRISK, QUICK, SignedFolder, set_up_box, sync_server, windows

OFFLINE_SHARE = 0.2  # of agents that sit out a turn
RESTART_SHARE = 0.05  # of agents that restart in a turn
LATE_SHARE = 0.1  # of agents that join only in the second rollout
NUM_THREADS = 8
MAX_TURNS = 40  # of one rollout
PATIENCE = replace(QUICK, total_s=30, stall_s=10)  # one process plays everybody
_FETCHED = re.compile(r"(\d+) bytes as (\w+) for (\d+)")


class Member:
    """One agent that comes and goes.

    Args:
        state: Its folder, set up.
        seed: Of its comings and goings.
    """

    def __init__(self, state: Path, seed: int) -> None:
        self.state = state
        self._chance = random.Random(seed)  # noqa: S311 - no secret
        self.num_windows = 0
        self.open()

    def open(self) -> None:
        """Start, or start again."""
        self.source = MemorySource()
        self.agent = Agent(self.state, self.source, patience=PATIENCE)
        self.agent.start()

    def turn(self) -> None:
        """Live for a while: restart or not, forecast, and talk unless offline."""
        if self._chance.random() < RESTART_SHARE:
            self.agent.outbox.close()
            self.open()
        if self._chance.random() >= OFFLINE_SHARE:
            self.agent.sync_once()
        self.source.add(windows(8, regime=1.0))
        self.num_windows += self.agent.forecast_once()

    def close(self) -> None:
        """Send what is left, and stop."""
        self.agent.forecast_once()
        self.agent.sync_once()
        self.agent.outbox.close()


class Play:
    """The fleet, its platform and its operator.

    Args:
        folder: For everything.
        num_agents: That join in the end.
        control: The platform.
        signed: Its repository.
        url: Where it answers.
    """

    def __init__(
        self, folder: Path, num_agents: int, control: Control, signed: SignedFolder, url: str
    ) -> None:
        self._control = control
        self._signed = signed
        self._key = Ed25519PrivateKey.generate()
        write_operator(control.operators, "ada", self._key.public_key())
        self._history = make_history(2, 2)
        num_late = int(LATE_SHARE * num_agents)
        make = self._maker(folder, url)
        self.members = [make(idx) for idx in range(num_agents - num_late)]
        self._make, self._late = make, range(num_agents - num_late, num_agents)

    def roll_out(self, version: int, fault: Fault, plan: Plan) -> dict[str, object]:
        """Publish a version and play until its rollout is over."""
        before = self._control.rollouts.stable(BRISK.group)
        offer = publish_bundle(self._signed.repository, make_bundle(version, fault))
        rollouts = self._control.rollouts
        number = rollouts.begin(offer, BRISK.group, plan, self._shadow(offer, before)).id
        started, turns, reach = time.perf_counter(), 0, []
        while rollouts.get(number).status not in {Status.DONE, Status.STOPPED}:
            if turns == MAX_TURNS:
                break
            self.turn()
            turns += 1
            reach.append(rollouts.get(number).tally.num)
            if rollouts.get(number).status is Status.AWAITING_APPROVAL:
                self._approve(number)
                self.members += [self._make(idx) for idx in self._late]
                self._late = range(0)
        found = rollouts.get(number)
        return {
            "version": version,
            "status": str(found.status),
            "reason": found.reason,
            "turns": turns,
            "seconds": round(time.perf_counter() - started, 1),
            "given": found.tally.num,
            "succeeded": found.tally.succeeded,
            "failed": found.tally.failed,
            "given_by_turn": reach,
        }

    def turn(self) -> None:
        """Let every member live for a while."""
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            list(pool.map(lambda member: member.turn(), self.members))

    def _maker(self, folder: Path, url: str) -> Callable[[int], Member]:
        def make(idx: int) -> Member:
            state = folder / f"box{idx:04d}"
            set_up_box(state, self._signed.root, replace(BRISK, agent=state.name, cloud=url))
            return Member(state, idx)

        return make

    def _shadow(self, offer: Offer, before: str | None) -> Shadow:
        read = self._signed.repository.read
        old = run_shadow(read(before), self._history) if before else None
        return Shadow(run_shadow(read(offer.path), self._history), old)

    def _approve(self, number: int) -> None:
        rollout = self._control.rollouts.get(number)
        decision = Decision(
            number, rollout.digest, rollout.stage, Action.APPROVE, "ada", time.time()
        )
        self._control.rollouts.act(decision.sign(self._key))


def bytes_by_form(members: Sequence[Member]) -> dict[str, object]:
    """Return the bundles that were fetched: how many of each form, and what they took."""
    num: Counter[str] = Counter()
    sent: Counter[str] = Counter()
    plain = 0
    for member in members:
        for event in member.agent.events.tail(10**6):
            found = _FETCHED.search(event["detail"]) if event["event"] == "fetched" else None
            if found:
                num[found[2]] += 1
                sent[found[2]] += int(found[1])
                plain += int(found[3])
    each = {form: round(sent[form] / num[form]) for form in num}
    return {"fetched": dict(num), "bytes_each": each, "bytes": sum(sent.values()), "plain": plain}


def play(folder: Path, num_agents: int) -> dict[str, object]:
    """Play all three rollouts; return what was seen."""
    signed = SignedFolder(folder / "repository")
    plan = Plan(shares=(0.05, 0.25, 1.0), approvals=(0,), max_error=0.02)
    with Control(folder) as control, sync_server(control, signed.folder) as url:
        fleet = Play(folder, num_agents, control, signed, url)
        rollouts = [
            fleet.roll_out(1, Fault.NONE, replace(plan, shares=(1.0,), approvals=())),
            fleet.roll_out(2, Fault.NONE, plan),
            fleet.roll_out(3, Fault.ALARMING_LIVE, plan),
        ]
        fleet.turn()
        for member in fleet.members:
            member.close()
        versions = Counter(member.agent.slots.pointer.version for member in fleet.members)
        kept = sum(
            body["kind"] == "forecast"
            for member in fleet.members
            for _, body in read_messages(control.database, member.state.name, limit=10**6)
        )
        events = Counter(
            event["event"] for member in fleet.members for event in member.agent.events.tail(10**6)
        )
        offers = {
            f"{version}": {
                str(route.form) + ("_delta" if route.base else ""): route.num_bytes
                for route in find_offer(signed.repository, f"forecast-both/{version}.tar").routes
            }
            for version in (1, 2, 3)
        }
        return {
            "agents": len(fleet.members),
            "rollouts": rollouts,
            "versions": {str(version): num for version, num in sorted(versions.items())},
            "given_up": events[Outcome.HEALTH_ALERTS],
            "starts": events["started"],
            "windows": sum(member.num_windows for member in fleet.members),
            "forecasts_kept": kept,
            "offered_bytes": offers,
            **bytes_by_form(fleet.members),
            "audit_end": control.verify_audit(),
        }


def main() -> int:
    """Play, and print one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--agents", type=int, default=500)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = play(Path(folder), args.agents)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    print(json.dumps(report))
    return 0 if report["versions"] == {"2": args.agents} else 1


if __name__ == "__main__":
    sys.exit(main())
