"""Cases ``goodput``, ``lengths`` and ``long``: ragged steps against padded batches, in process.

No network and no Ray here, so that the engine is compared and nothing else.
"""

import asyncio
from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np

from benchmarks.serving_load import Backlog, Outcome, fraud_requests, open_loop, token_request
from benchmarks.serving_peers import PaddedBatcher
from benchmarks.serving_rig import Rig
from benchmarks.workload import CHUNK_TOKENS
from cluster.client import Client
from cluster.engine import Engine
from cluster.schemas import InferRequest, ServiceClass

DEADLINE_MS = 50.0
SHORT, LONG = 8, 512  # tokens of the goodput sweep's sequences, log-uniform
LOADS = (0.4, 0.6, 0.8, 1.0, 1.25, 1.5)  # of the padded batcher's own capacity
WIDE = (8, 8192)  # tokens of the throughput comparison
NUM_WIDE = 64
LONG_TOKENS = 65_536
DEADLINE_LONG_MS = 60.0  # of the stream beside the long sequence: a step is planned for a quarter
PATIENT_MS = 600_000.0


def drawn_lengths(low: int, high: int, seed: int) -> Iterator[int]:
    """Yield log-uniform lengths."""
    rng = np.random.default_rng(seed)
    while True:
        yield int(np.exp(rng.uniform(np.log(low), np.log(high + 1))))


def short_requests(deadline_ms: float) -> Iterator[InferRequest]:
    """Yield stream requests of one sequence each."""
    for seed, length in enumerate(drawn_lengths(SHORT, LONG, 1)):
        yield token_request([length], ServiceClass.STREAM, deadline_ms, seed)


def within(outcome: Outcome, deadline_ms: float, seconds: float) -> float:
    """Return the answers per second that came within the deadline."""
    latency = np.nan_to_num(outcome.after(1.0), nan=np.inf)
    return float((latency <= deadline_ms).sum() / (seconds - 1.0))


async def _goodput(client: Client, rate_per_s: float, seconds: float) -> float:
    outcome = await open_loop(client, short_requests(DEADLINE_MS), rate_per_s, seconds)
    return within(outcome, DEADLINE_MS, seconds)


def run_goodput(rig: Rig) -> dict[str, Any]:
    """Return answers per second within the deadline, by offered load and system."""

    async def run() -> dict[str, Any]:
        model, seconds = rig.make_model(), max(4.0, rig.seconds / 2)
        engine, padded = Engine(model), PaddedBatcher(model)
        engine.start()
        await engine.warm_up()
        sizes = short_requests(PATIENT_MS)
        backlog = Backlog(padded, lambda: next(sizes), depth=32)
        await asyncio.sleep(seconds)
        most = len(backlog.done) / seconds
        await backlog.stop()
        rows = []
        for load in LOADS:
            rate = load * most
            ours, theirs = 0.0, 0.0
            for _ in range(rig.rounds):
                theirs += await _goodput(padded, rate, seconds) / rig.rounds
                ours += await _goodput(engine, rate, seconds) / rig.rounds
            rows.append(
                {
                    "offered_s": round(rate, 1),
                    "padded_s": round(theirs, 1),
                    "ours_s": round(ours, 1),
                }
            )
            rig.say(
                f"offered {rate:.0f}/s: padded {theirs:.1f}, ours {ours:.1f} within {DEADLINE_MS:.0f} ms"
            )
        padded.stop()
        await engine.stop()
        by_name = {name: [row[name] for row in rows] for name in ("padded_s", "ours_s")}
        return {
            "padded_capacity_s": round(most, 1),
            "sweep": rows,
            "goodput_ratio": round(sum(by_name["ours_s"]) / sum(by_name["padded_s"]), 2),
            "best_ratio": round(max(by_name["ours_s"]) / max(by_name["padded_s"]), 2),
        }

    return asyncio.run(run())


def run_lengths(rig: Rig) -> dict[str, Any]:
    """Return tokens/s over log-uniform lengths of ragged steps and of padded batches of 8."""

    async def time_all(client: Client) -> float:
        lengths = [n for n, _ in zip(drawn_lengths(*WIDE, 2), range(NUM_WIDE), strict=False)]
        requests = [
            token_request([length], ServiceClass.BATCH, PATIENT_MS, seed)
            for seed, length in enumerate(lengths)
        ]
        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.gather(*(client.infer(request) for request in requests))
        return sum(lengths) / (loop.time() - began)

    async def run() -> dict[str, Any]:
        model = rig.make_model()
        engine, padded = Engine(model), PaddedBatcher(model)
        engine.start()
        await engine.warm_up()
        rates: dict[str, list[float]] = {"padded": [], "ours": []}
        for number in range(rig.rounds + 1):  # the first is a warm-up
            for name, client in (("padded", padded), ("ours", engine)):
                rate = await time_all(client)
                if number:
                    rates[name].append(rate)
                rig.say(f"{name}: {rate:.0f} tokens/s")
        padded.stop()
        await engine.stop()
        medians = {name: float(np.median(values)) for name, values in rates.items()}
        return {
            "tokens_s": {name: round(value, 1) for name, value in medians.items()},
            "ratio": round(medians["ours"] / medians["padded"], 2),
        }

    return asyncio.run(run())


def run_long(rig: Rig) -> dict[str, Any]:
    """Return the stream's p99 alone and while a very long sequence is in flight."""

    async def run() -> dict[str, Any]:
        engine = Engine(rig.make_model())
        engine.start()
        await engine.warm_up()
        patient = fraud_requests(100, PATIENT_MS)
        backlog = Backlog(engine, lambda: next(patient), depth=4)
        await asyncio.sleep(rig.seconds / 2)
        rate = 0.5 * len(backlog.done) / (rig.seconds / 2)
        await backlog.stop()
        requests, alone, beside = fraud_requests(100, DEADLINE_LONG_MS), Outcome(), Outcome()
        finished, numbers = 0, count()
        for _ in range(rig.rounds):
            part = await open_loop(engine, requests, rate, rig.seconds)
            alone.latency_ms += part.latency_ms
            alone.due_s += part.due_s
            request = token_request([LONG_TOKENS], ServiceClass.BATCH, PATIENT_MS, next(numbers))
            long = asyncio.create_task(engine.infer(request))
            part = await open_loop(engine, requests, rate, rig.seconds)
            beside.latency_ms += part.latency_ms
            beside.due_s += part.due_s
            finished += long.done()
            await long
        await engine.stop()
        return {
            "long_tokens": LONG_TOKENS,
            "chunk_tokens": CHUNK_TOKENS,
            "stream_s": round(rate, 1),
            "alone_p99_ms": round(alone.quantile_ms(0.99), 1),
            "beside_p99_ms": round(beside.quantile_ms(0.99), 1),
            "ratio": round(beside.quantile_ms(0.99) / alone.quantile_ms(0.99), 2),
            "long_done_within_stream": finished,
        }

    return asyncio.run(run())
