"""A caller that goes on calling: fixed rate, retries inside the client, every answer kept.

Open loop, in a thread with an event loop of its own: what is due is sent, whether or not
anything was answered.  A call fails when the client gives up, its own retries included.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from cluster.client import Client
from cluster.errors import TrimoeError
from cluster.schemas import InferRequest, ServiceClass
from core_model.builtin_tasks import NUM_CONTEXT, NUM_ROW_COLUMNS

DEADLINE_MS = 10_000.0
_NUM_SEQUENCES, _NUM_ROWS = 4, 8


class Call(NamedTuple):
    """One call: when it began (``time.monotonic``), how long it took, why it failed if it did."""

    begin_s: float
    latency_ms: float
    error: str


class Probe:
    """Calls while its block runs.

    Args:
        dial: Returns the client; called in the probe's thread.
        rate: Calls per second.
        deadline_ms: Of each call.
    """

    def __init__(
        self, dial: Callable[[], Client], rate: float, deadline_ms: float = DEADLINE_MS
    ) -> None:
        self.calls: list[Call] = []
        self._dial, self._rate, self._deadline_ms = dial, rate, deadline_ms
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="probe")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def figures(self) -> dict[str, object]:
        """Return counts and latencies of all calls so far."""
        return figures_of(self.calls)

    async def _run(self) -> None:
        client = self._dial()
        begin_s = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for number in range(1 << 62):
                wait_s = begin_s + number / self._rate - time.monotonic()
                await asyncio.sleep(max(0.0, wait_s))
                if self._stopping.is_set():
                    return
                tasks.create_task(self._call(client, number))

    async def _call(self, client: Client, number: int) -> None:
        begin_s, failure = time.monotonic(), ""
        try:
            await client.infer(probe_request(number, self._deadline_ms))
        except TrimoeError as error:
            failure = f"{type(error).__name__}: {error}"
        latency_ms = 1e3 * (time.monotonic() - begin_s)
        self.calls.append(Call(begin_s, latency_ms, failure))


def figures_of(
    calls: Sequence[Call], from_s: float = -np.inf, until_s: float = np.inf
) -> dict[str, object]:
    """Return the counts and latencies of the calls that began between two moments."""
    chosen = [call for call in list(calls) if from_s <= call.begin_s < until_s]
    latencies = np.array([call.latency_ms for call in chosen] or [np.nan])
    p50, p99 = np.percentile(latencies, [50, 99])
    return {
        "calls": len(chosen),
        "failed": sum(bool(call.error) for call in chosen),
        "errors": dict(Counter(call.error for call in chosen if call.error).most_common(3)),
        "p50_ms": round(float(p50), 1),
        "p99_ms": round(float(p99), 1),
        "max_ms": round(float(latencies.max()), 1),
    }


def probe_request(number: int, deadline_ms: float) -> InferRequest:
    """Return a small request of the fraud task; the same numbers each time."""
    rng = np.random.default_rng(0)
    rows = _NUM_SEQUENCES * _NUM_ROWS
    return InferRequest(
        request_id=f"probe-{number}",
        tenant="probe",
        task="fraud",
        features=rng.normal(size=(rows, NUM_ROW_COLUMNS)).astype(np.float32),
        cu_seqlens=np.arange(0, rows + 1, _NUM_ROWS, dtype=np.int32),
        extras={"context": rng.normal(size=(_NUM_SEQUENCES, NUM_CONTEXT)).astype(np.float32)},
        service_class=ServiceClass.STREAM,
        deadline_ms=deadline_ms,
    )
