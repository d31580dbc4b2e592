"""Case ``sweep``, for a GPU: useful tokens/s while the stream grows and batch work is queued.

One engine in process, `large` preset: the stream goes from 100 to 2,000 sequences a second, in
at least 100 calls a second, beside a backlog that is never empty.
"""

import asyncio
import statistics
import subprocess
import time
from typing import Any

from benchmarks.serving_load import Backlog, fraud_requests, open_loop, token_request
from benchmarks.serving_rig import Rig, make_model
from cluster.engine import Engine
from cluster.schemas import InferRequest, ServiceClass
from core_model.builtin_tasks import TOKENS_PER_TRANSACTION

STREAM_S = (100, 250, 500, 1000, 2000)  # sequences a second
CALLS_S = 100.0  # calls a second, at least
DEADLINE_MS = 40.0  # a step is planned for a quarter of it
PATIENT_MS = 600_000.0
BATCH_LENGTHS = (512,) * 16
DEPTH = 24  # what a few of the longest steps hold: the queue is never empty
SETTLE_S = 2.0


def batch_request() -> InferRequest:
    """Return the next batch request."""
    return token_request(BATCH_LENGTHS, ServiceClass.BATCH, PATIENT_MS)


def busy_percent() -> float:
    """Return what NVML says of the GPU's last moments, NaN without one."""
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)  # noqa: S603 - fixed words
    except (OSError, subprocess.SubprocessError):
        return float("nan")
    return float(done.stdout.split()[0])


def run_sweep(rig: Rig) -> dict[str, Any]:
    """Return stream p99 and useful tokens/s at each point, against batch work alone."""

    async def run() -> dict[str, Any]:
        engine = Engine(make_model(rig.preset, rig.device))
        engine.start()
        await engine.warm_up()
        backlog = Backlog(engine, batch_request, DEPTH)
        await asyncio.sleep(2 * SETTLE_S)
        alone = []
        for _ in range(3):
            began = time.perf_counter()
            await asyncio.sleep(rig.seconds / 2)
            alone.append(backlog.tokens_per_s(began, time.perf_counter()))
        best, rows = max(alone), []
        for sequences_s in STREAM_S:
            size = max(1, round(sequences_s / CALLS_S))
            busy: list[float] = []

            async def watch(busy: list[float] = busy) -> None:
                while True:
                    await asyncio.sleep(1.0)
                    busy.append(await asyncio.to_thread(busy_percent))

            watching = asyncio.create_task(watch())
            began = time.perf_counter()
            outcome = await open_loop(
                engine,
                fraud_requests(size, DEADLINE_MS),
                sequences_s / size,
                SETTLE_S + rig.seconds,
            )
            watching.cancel()
            ended = time.perf_counter()
            batch = backlog.tokens_per_s(began + SETTLE_S, ended)
            answered = len(outcome.due_s) - outcome.errors.total()
            stream = answered * size * TOKENS_PER_TRANSACTION / (ended - began)
            rows.append(
                {
                    "sequences_s": sequences_s,
                    "calls_s": round(sequences_s / size, 1),
                    "p50_ms": round(outcome.quantile_ms(0.5, SETTLE_S), 2),
                    "p99_ms": round(outcome.quantile_ms(0.99, SETTLE_S), 2),
                    "errors": outcome.errors.total(),
                    "batch_tokens_s": round(batch),
                    "stream_tokens_s": round(stream),
                    "useful_share": round((batch + stream) / best, 3),
                    "nvml_busy": statistics.mean(busy) if busy else None,
                }
            )
            rig.say(str(rows[-1]))
        await backlog.stop()
        await engine.stop()
        return {"batch_only_tokens_s": [round(each) for each in alone], "points": rows}

    return asyncio.run(run())
