"""SIGKILL of replicas under load: two replicas on a local Ray, a probe with retries."""

import os
import signal
import time

from benchmarks.fault_probe import Probe
from cluster.platform import PlatformConfig, prepare_environment, start

NUM_REPLICAS = 2


def lose_replicas(kills: int, *, rate: float = 20.0, calm_s: float = 2.0) -> dict[str, object]:
    """Kill one replica after another and return the counts.

    Args:
        kills: How many, each when two replicas answer again.
        rate: Calls per second.
        calm_s: Between recovery and the next kill.
    """
    prepare_environment()
    from benchmarks.fault_replicas import (  # noqa: PLC0415 - after the environment
        await_replicas,
        running_replicas,
    )
    from benchmarks.tiny_model import TINY  # noqa: PLC0415
    from cluster.handle import connect_blocking  # noqa: PLC0415

    platform = start(PlatformConfig(port=None, num_replicas=NUM_REPLICAS), TINY)
    recovery_s = []
    try:
        with Probe(connect_blocking, rate) as probe:
            for _ in range(kills):
                time.sleep(calm_s)
                victim = min(running_replicas())
                os.kill(victim.pid, signal.SIGKILL)
                killed_s = time.monotonic()
                recovery_s.append(await_replicas(NUM_REPLICAS, [victim], since_s=killed_s))
            time.sleep(calm_s)
    finally:
        platform.stop()
    return {"kills": kills, **probe.figures(), "recovery_s": recovery_s}
