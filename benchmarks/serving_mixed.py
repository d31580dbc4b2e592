"""Case ``mixed``: a stream beside batch requests that are always in flight, by policy."""

import asyncio
import statistics
from typing import Any

from benchmarks import serving_load
from benchmarks.serving_load import Load, capacity, fraud_requests, token_request
from benchmarks.serving_rig import Doors, Rig
from cluster.schemas import InferRequest, ServiceClass

STREAM_ROWS = 100  # transactions of a stream request
SATURATING = 32  # requests in flight: with fewer, steps stay small and the capacity seems lower
STREAM_SHARE = 0.6  # of the stream-only capacity
STREAM_DEADLINE_MS = 400.0  # ours plans its steps by it, and refuses what would be later
PATIENT_MS = 120_000.0
BATCH_LENGTHS = (512,) * 8  # tokens of the sequences of a batch request
BATCH_DEPTH = 4
SETTLE_S = 3.0


def batch_request() -> InferRequest:
    """Return the next batch request."""
    return token_request(BATCH_LENGTHS, ServiceClass.BATCH, PATIENT_MS)


def warm(doors: Doors) -> None:
    """Let every client and model do what it does only once."""
    patient = fraud_requests(STREAM_ROWS, PATIENT_MS)
    asyncio.run(capacity(doors.stream, lambda: next(patient), depth=1, seconds=1.5))
    asyncio.run(capacity(doors.batch, batch_request, depth=1, seconds=1.5))


def stream_capacity(doors: Doors, seconds: float) -> float:
    """Return the stream requests per second that are answered when nothing else runs."""
    patient = fraud_requests(STREAM_ROWS, PATIENT_MS)
    return asyncio.run(
        capacity(doors.stream, lambda: next(patient), depth=SATURATING, seconds=seconds)
    )


def measure(
    doors: Doors, rate_per_s: float, seconds: float, depth: int, deadline_ms: float
) -> dict[str, float]:
    """Measure one policy once; a refused request counts as never answered."""
    requests = fraud_requests(STREAM_ROWS, deadline_ms)
    load = Load(requests, rate_per_s, batch_request, depth)
    mixed = asyncio.run(serving_load.run_mixed(doors.stream, doors.batch, load, seconds, SETTLE_S))
    return {
        "stream_p50_ms": mixed.stream.quantile_ms(0.5, SETTLE_S),
        "stream_p99_ms": mixed.stream.quantile_ms(0.99, SETTLE_S),
        "stream_errors": float(mixed.stream.errors.total()),
        "batch_tokens_s": mixed.batch_tokens_per_s,
    }


def run_rounds(rig: Rig, rate_per_s: float) -> dict[str, dict[str, float]]:
    """Return the medians of alternating rounds, by policy."""
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in rig.policies()}
    for number in range(rig.rounds):
        for name, policy in rig.policies().items():
            with policy() as doors:
                warm(doors)
                deadline_ms = STREAM_DEADLINE_MS if name == "ours" else PATIENT_MS
                figures = measure(doors, rate_per_s, rig.seconds, BATCH_DEPTH, deadline_ms)
                rounds[name].append(figures)
            rig.say(f"round {number + 1} {name}: {rounds[name][-1]}")
    return {
        name: {key: round(statistics.median(run[key] for run in runs), 1) for key in runs[0]}
        for name, runs in rounds.items()
    }


def run_mixed(rig: Rig) -> dict[str, Any]:
    """Return medians by policy and ours against each."""
    with rig.ours() as doors:
        warm(doors)
        most = stream_capacity(doors, rig.seconds / 2)
        rate = STREAM_SHARE * most
        alone = measure(doors, rate, rig.seconds, 0, STREAM_DEADLINE_MS)
    by_policy = run_rounds(rig, rate)
    ours = by_policy["ours"]
    return {
        "stream_capacity_s": round(most, 1),
        "offered_s": round(rate, 1),
        "alone": alone,
        "policies": by_policy,
        "p99_over_ours": {
            name: round(each["stream_p99_ms"] / ours["stream_p99_ms"], 2)
            for name, each in by_policy.items()
        },
        "our_batch_over": {
            name: round(ours["batch_tokens_s"] / max(each["batch_tokens_s"], 1.0), 3)
            for name, each in by_policy.items()
        },
    }
