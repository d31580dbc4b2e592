"""Case ``versions``: hot swap, canary and shadow of the shipped weights under load, one replica."""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.serving_joint_changes import ONE, SHIPPED, TWO, copies
from benchmarks.serving_load import Outcome, capacity, fraud_requests, open_loop
from benchmarks.serving_rig import Rig, deployed
from cluster.client import Client
from cluster.deployments import CoreReplica
from cluster.loading import RegistrySource
from cluster.registry import Registry
from cluster.versions import Aliases

RATE_S = 50.0
ROWS = 5  # transactions of a request
DEADLINE_MS = 2000.0
CANARY_REQUESTS, CANARY_SHARE = 10_000, 0.1
SWAP_EVERY_S = 6.0
SHADOW_ROUNDS = 8  # the p99 of one round of 10 s strays by a tenth


async def _with_swaps(client: Client, registry: Registry, seconds: float) -> Outcome:
    """Run a stream and swap the stable version back and forth."""

    async def swap() -> None:
        while True:
            await asyncio.sleep(SWAP_EVERY_S)
            aliases = registry.aliases()
            other = TWO if aliases.stable == ONE else ONE
            registry.set_aliases(Aliases(other))  # the other one is let go and loaded anew

    swapping = asyncio.create_task(swap())
    outcome = await open_loop(client, fraud_requests(ROWS, DEADLINE_MS), RATE_S, seconds)
    swapping.cancel()
    return outcome


def run_versions(rig: Rig) -> dict[str, Any]:
    """Return p99 with and without swaps, the canary's share, and the shadow's cost."""
    with TemporaryDirectory(prefix="trimoe-versions-") as folder:
        registry = copies(SHIPPED, Path(folder))
        source = RegistrySource(registry, rig.device)
        with deployed(CoreReplica, source, gpus=rig.gpus) as client:
            patient = fraud_requests(ROWS, 60_000.0)
            asyncio.run(capacity(client, lambda: next(patient), depth=2, seconds=3.0))
            requests = fraud_requests(ROWS, DEADLINE_MS)
            ask = partial(open_loop, client, requests)
            steady = asyncio.run(ask(RATE_S, rig.seconds))
            swapped = asyncio.run(_with_swaps(client, registry, 2 * rig.seconds))
            canary = _canary(registry, client, ask)
            shadow = _shadow(registry, client, rig)
    return {
        "steady_p99_ms": round(steady.quantile_ms(0.99), 1),
        "swap_p99_ms": round(swapped.quantile_ms(0.99), 1),
        "swap_ratio": round(swapped.quantile_ms(0.99) / steady.quantile_ms(0.99), 2),
        "swap_errors": swapped.errors.total() + steady.errors.total(),
        "swap_answers": dict(swapped.versions),
        **canary,
        **shadow,
    }


def _canary(
    registry: Registry, client: Client, ask: Callable[[float, float], Any]
) -> dict[str, Any]:
    registry.set_aliases(Aliases(ONE, canary=TWO, canary_share=CANARY_SHARE))
    _await_version(client, TWO)
    rate = 100.0
    outcome: Outcome = asyncio.run(ask(rate, CANARY_REQUESTS / rate))
    answered = outcome.versions.total()
    return {
        "canary_requests": answered,
        "canary_share": round(outcome.versions[TWO] / answered, 4),
        "canary_errors": outcome.errors.total(),
    }


def _shadow(registry: Registry, client: Client, rig: Rig) -> dict[str, Any]:
    """Compare p99 at half load without and with a shadow, alternating."""
    patient = fraud_requests(ROWS, 60_000.0)
    registry.set_aliases(Aliases(ONE))
    most = asyncio.run(capacity(client, lambda: next(patient), depth=8, seconds=5.0))
    p99: dict[str, list[float]] = {"alone": [], "shadowed": []}
    for _ in range(max(SHADOW_ROUNDS, rig.rounds)):
        for name, aliases in (
            ("alone", Aliases(ONE)),
            ("shadowed", Aliases(ONE, shadow=TWO)),
        ):
            registry.set_aliases(aliases)
            time.sleep(4.0)  # the replica looks once a second, then loads and warms up
            requests = fraud_requests(ROWS, DEADLINE_MS)
            outcome = asyncio.run(open_loop(client, requests, most / 2, rig.seconds))
            p99[name].append(outcome.quantile_ms(0.99, 1.0))
    medians = {name: float(np.median(values)) for name, values in p99.items()}
    return {
        "half_load_s": round(most / 2, 1),
        "alone_p99_ms": round(medians["alone"], 1),
        "shadow_p99_ms": round(medians["shadowed"], 1),
        "shadow_cost": round(medians["shadowed"] / medians["alone"] - 1.0, 3),
    }


def _await_version(client: Client, version: str, patience_s: float = 60.0) -> None:
    """Wait until a version answers those who ask for it by name."""
    from dataclasses import replace  # noqa: PLC0415 - this only

    from cluster.errors import UnknownModelError  # noqa: PLC0415

    requests, deadline = fraud_requests(ROWS, DEADLINE_MS), time.monotonic() + patience_s
    while time.monotonic() < deadline:
        try:
            asyncio.run(client.infer(replace(next(requests), model_version=version)))
        except UnknownModelError:
            time.sleep(0.2)
        else:
            return
    message = f"expected version {version} within {patience_s:.0f} s"
    raise TimeoutError(message)
