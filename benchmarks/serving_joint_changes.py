"""Versions of a joint checkpoint change while all of its applications ask.

Three loads that never pause, and five phases: steady, hot swaps, a canary, its promotion, a
rollback.
"""

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.serving_joint_ledger import (
    Ledger,
    Phase,
    by_phase,
    canary_shares,
    followed_s,
    on_trial,
)
from benchmarks.serving_joint_loads import TASKS, Loads
from benchmarks.serving_load import Outcome
from cluster.client import Client
from cluster.errors import ConfigurationError
from cluster.registry import MANIFEST_FILE, Registry
from cluster.versions import Aliases
from core_model.checkpoint import read_manifest

T = TypeVar("T")

SHIPPED = Path(__file__).resolve().parents[1] / "models" / "shared"
ONE, TWO = "shared-1", "shared-2"
SETTLE_S = 2.0  # of all loads, before the first phase
CANARY_REQUESTS, CANARY_SHARE = 2000, 0.1  # of the stream
LOOK_S = 0.05
PATIENCE_S = 120.0  # until new aliases are followed


def find_joint(given: Path | None) -> Path:
    """Return the folder of the checkpoint to serve, the shipped one if none is given.

    Raises:
        ConfigurationError: There is none, or it lacks a task.
        CheckpointError: Its manifest cannot be read.
    """
    folder = given or SHIPPED
    tasks = read_manifest(folder).tasks if (folder / MANIFEST_FILE).is_file() else ()
    missing = [task for task in TASKS if task not in tasks]
    if missing:
        message = (
            f"checkpoint: expected a joint one in {folder.name}/, got none of "
            f"{', '.join(missing)}; make it with trimoe models train, pass --checkpoint"
        )
        raise ConfigurationError(message)
    return folder


def copies(checkpoint: Path, folder: Path) -> Registry:
    """Put a checkpoint into a registry as two versions, the first of them stable."""
    for version in (ONE, TWO):
        shutil.copytree(checkpoint, folder / version)
        path = folder / version / MANIFEST_FILE
        manifest = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps({**manifest, "version": version}), "utf-8")
    registry = Registry(str(folder))
    registry.set_aliases(Aliases(ONE))
    return registry


@dataclass(frozen=True, slots=True)
class Plan:
    """How long the phases are.

    Args:
        seconds: Of the steady one; swaps last twice as long, promotion and rollback half.
        stay_s: With a version between two swaps, once it answers.
        canary_requests: Of the stream that are answered beside the canary.
    """

    seconds: float
    stay_s: float = 3.0
    canary_requests: int = CANARY_REQUESTS


class Changes:
    """The phases, one after another.

    Args:
        registry: Its aliases are what changes.
        ledger: Of the loads, which run meanwhile.
        plan: How long.
    """

    def __init__(self, registry: Registry, ledger: Ledger, plan: Plan) -> None:
        self._registry, self._ledger, self._plan = registry, ledger, plan
        self.phases: list[Phase] = []
        self.waits_s: dict[str, list[float]] = {}
        self.shares: dict[str, dict[str, float]] = {}

    def run(self) -> None:
        """Go through all.

        Raises:
            TimeoutError: New aliases were not followed, or the stream is not answered.
        """
        time.sleep(SETTLE_S)
        self._begin("steady")
        time.sleep(self._plan.seconds)
        swapped_s = self._begin("swaps") + 2 * self._plan.seconds
        for aliases in self._swaps(swapped_s):
            self._follow(aliases)
            time.sleep(self._plan.stay_s)
        self._begin("canary")
        self._follow(Aliases(ONE, canary=TWO, canary_share=CANARY_SHARE))
        self._try_canary()
        self._begin("promotion")
        self._follow(self._registry.aliases().promoted(TWO))
        time.sleep(self._plan.seconds / 2)
        self._begin("rollback")
        self._follow(self._registry.aliases().rolled_back())
        time.sleep(self._plan.seconds / 2)

    def _begin(self, name: str) -> float:
        self.phases.append(Phase(name, self._ledger.now_s))
        return self.phases[-1].begin_s

    def _swaps(self, until_s: float) -> Iterator[Aliases]:
        """Yield aliases there and back until a time; the second version is loaded anew each time.

        The first one stays loaded: forecasts ask for it by name.
        """
        alone = Aliases(ONE)
        while self._ledger.now_s < until_s:
            yield alone.promoted(TWO)
            yield alone

    def _follow(self, aliases: Aliases) -> None:
        """Write aliases and wait until they are followed."""
        before, written_s = self._registry.aliases(), self._ledger.now_s
        self._registry.set_aliases(aliases)

        def look() -> float | None:
            return followed_s(tuple(self._ledger.entries), before, aliases, written_s)

        wait_s = _await(look, PATIENCE_S, f"{aliases} to be followed")
        self.waits_s.setdefault(self.phases[-1].name, []).append(wait_s)

    def _try_canary(self) -> None:
        """Wait until the stream has had so many answers beside the canary; take the shares."""
        begin_s, wanted = self._ledger.now_s, self._plan.canary_requests

        def look() -> dict[str, dict[str, float]] | None:
            trial = on_trial(tuple(self._ledger.entries), begin_s, np.inf)
            num_stream = sum(entry.task == "fraud" for entry in trial)
            return canary_shares(trial, TWO) if num_stream >= wanted else None

        self.shares = _await(look, PATIENCE_S + wanted, f"{wanted} answers beside the canary")


def _await(look: Callable[[], T | None], patience_s: float, what: str) -> T:
    """Return what there is to see, once there is something."""
    deadline = time.monotonic() + patience_s
    while (found := look()) is None:
        if time.monotonic() > deadline:
            message = f"expected {what} within {patience_s:.0f} s"
            raise TimeoutError(message)
        time.sleep(LOOK_S)
    return found


def measure(client: Client, registry: Registry, plan: Plan) -> dict[str, Any]:
    """Return what came of all requests while versions changed.

    Args:
        client: Of a replica that follows the registry.
        registry: With ``ONE`` and ``TWO``.
        plan: How long.

    Raises:
        TimeoutError: See ``Changes.run``.
    """
    loads = Loads(Path(registry.root) / ONE)
    asyncio.run(loads.ask_each(client))
    ledger = Ledger(client)
    changes = Changes(registry, ledger, plan)
    with loads.running(ledger) as stream:
        changes.run()
        ended_s = ledger.now_s
    counts = by_phase(ledger.entries, changes.phases, TASKS)
    p99_ms = stream_p99_ms(stream.result(), [*changes.phases, Phase("", ended_s)])
    return {
        "errors": sum(bool(entry.error) for entry in ledger.entries),
        "seconds": round(ended_s, 1),
        "stream_p99_ms": {name: round(value, 1) for name, value in p99_ms.items()},
        "swap_ratio": round(p99_ms["swaps"] / p99_ms["steady"], 2),
        "canary_shares": changes.shares,
        "followed_s": {
            name: [round(wait_s, 2) for wait_s in waits] for name, waits in changes.waits_s.items()
        },
        "phases": counts,
    }


def stream_p99_ms(stream: Outcome, phases: list[Phase]) -> dict[str, float]:
    """Return the stream's p99 in each phase but the last one, which only ends that before it."""
    return {
        phase.name: stream.quantile_ms(0.99, phase.begin_s, after.begin_s)
        for phase, after in pairwise(phases)
    }
