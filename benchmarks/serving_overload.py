"""Case ``overload``: three times the capacity for a while, then half of it, through Serve."""

import asyncio
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving_load import Outcome, capacity, fraud_requests, open_loop
from benchmarks.serving_rig import Rig

ROWS = 100
DEADLINE_MS = 500.0
OVERLOAD, AFTER = 3.0, 0.5  # of the capacity
OVERLOAD_S, AFTER_S, PEAK_S = 60.0, 15.0, 10.0
NAMED = {"QueueFullError", "DeadlineExceededError"}  # what a refused request may get


def replica_memory_mb() -> float:
    """Return the resident memory of the largest replica on this machine."""
    sizes = [0.0]
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if "ServeReplica" in (process / "cmdline").read_text(errors="replace"):
                pages = int((process / "statm").read_text().split()[1])
                sizes.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    return max(sizes)


def good_per_s(outcome: Outcome, begin_s: float, end_s: float) -> float:
    """Return answers within the deadline per second, of what was due in a span of time."""
    latency = np.nan_to_num(outcome.after(begin_s, end_s), nan=np.inf)
    return float((latency <= DEADLINE_MS).sum() / (end_s - begin_s))


def recovery_s(outcome: Outcome, dropped_s: float) -> float:
    """Return how long after the drop the last request was refused or late."""
    late = [
        due
        for due, latency in zip(outcome.due_s, outcome.latency_ms, strict=True)
        if due >= dropped_s and not latency <= DEADLINE_MS
    ]
    return max(late, default=dropped_s) - dropped_s


def run_overload(rig: Rig) -> dict[str, Any]:
    """Return goodput, refusals by name, memory and the time to recover."""
    patient = fraud_requests(ROWS, 60_000.0)
    with rig.ours() as doors:
        asyncio.run(capacity(doors.stream, lambda: next(patient), depth=2, seconds=2.0))
        most = asyncio.run(capacity(doors.stream, lambda: next(patient), depth=8, seconds=PEAK_S))
        before_mb = replica_memory_mb()
        peak = asyncio.run(
            open_loop(doors.stream, fraud_requests(ROWS, DEADLINE_MS), 0.9 * most, PEAK_S)
        )

        def rate(due_s: float) -> float:
            return (OVERLOAD if due_s < OVERLOAD_S else AFTER) * most

        memory: list[float] = []

        async def watch_memory() -> None:
            while True:
                memory.append(await asyncio.to_thread(replica_memory_mb))
                await asyncio.sleep(1.0)

        async def run() -> Outcome:
            watching = asyncio.create_task(watch_memory())
            requests = fraud_requests(ROWS, DEADLINE_MS)
            outcome = await open_loop(doors.stream, requests, rate, OVERLOAD_S + AFTER_S)
            watching.cancel()
            return outcome

        began = time.monotonic()
        outcome = asyncio.run(run())
    best = good_per_s(peak, 1.0, PEAK_S)
    during = good_per_s(outcome, 2.0, OVERLOAD_S)
    return {
        "capacity_s": round(most, 1),
        "peak_goodput_s": round(best, 1),
        "overload_goodput_s": round(during, 1),
        "goodput_ratio": round(during / best, 3),
        "refused": dict(outcome.errors),
        "unnamed_errors": sum(n for name, n in outcome.errors.items() if name not in NAMED),
        "memory_mb": {"before": round(before_mb), "most": round(max(memory, default=0.0))},
        "recovery_s": round(recovery_s(outcome, OVERLOAD_S), 2),
        "seconds": round(time.monotonic() - began, 1),
    }
