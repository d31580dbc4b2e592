"""Load for the serving benchmarks: requests of both tasks, an open loop, a batch backlog.

The open loop sends on a fixed schedule and never waits for answers; latency is counted from
the moment that a request was due.  The backlog keeps a number of large requests in flight.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import numpy as np

from benchmarks.workload import NUM_COLUMNS, TOKENS
from cluster.client import Client
from cluster.errors import TrimoeError
from cluster.schemas import InferRequest, ServiceClass
from core_model.builtin_tasks import FRAUD, NUM_CONTEXT

NUM_VARIANTS = 8  # different contents; drawing them anew would be a load of its own
HISTORY_ROWS = 49  # of a transaction with a full history

_numbers = count()


def fraud_requests(num_sequences: int, deadline_ms: float) -> Iterator[InferRequest]:
    """Yield stream requests of so many transactions with full histories, for ever."""
    rng = np.random.default_rng(0)
    num_rows = num_sequences * HISTORY_ROWS
    rows = np.abs(rng.normal(size=(NUM_VARIANTS, num_rows, FRAUD.d_task))).astype(np.float32)
    rows[:, :, 0] = np.tile([0, *[1] * 16, *[2] * 32], num_sequences)
    context = np.abs(rng.normal(size=(NUM_VARIANTS, num_sequences, NUM_CONTEXT)))
    offsets = np.arange(0, num_rows + 1, HISTORY_ROWS, dtype=np.int32)
    for i in count():
        yield InferRequest(
            request_id=f"stream-{next(_numbers)}",
            tenant="stream",
            task=FRAUD.name,
            features=rows[i % NUM_VARIANTS],
            cu_seqlens=offsets,
            extras={"context": context[i % NUM_VARIANTS].astype(np.float32)},
            service_class=ServiceClass.STREAM,
            deadline_ms=deadline_ms,
        )


def token_request(
    lengths: Sequence[int], each: ServiceClass, deadline_ms: float, seed: int = 0
) -> InferRequest:
    """Return a request of the benchmark task with sequences of these lengths."""
    return InferRequest(
        request_id=f"tokens-{next(_numbers)}",
        tenant=str(each),
        task=TOKENS.name,
        features=_token_rows(sum(lengths), seed),
        cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
        service_class=each,
        deadline_ms=deadline_ms,
    )


@lru_cache(maxsize=256)
def _token_rows(num_rows: int, seed: int) -> np.ndarray:
    """Draw rows; drawing them anew for every request would be a load of its own."""
    rows = np.random.default_rng(seed).normal(size=(num_rows, NUM_COLUMNS)).astype(np.float32)
    rows.flags.writeable = False
    return rows


def renamed(request: InferRequest) -> InferRequest:
    """Return the same request under a new id."""
    return replace(request, request_id=f"again-{next(_numbers)}")


@dataclass(slots=True)
class Outcome:
    """What came of a stream of requests.

    Args:
        due_s: When each was due, seconds from the start.
        latency_ms: From then to its answer; NaN for an error.
        versions: Answers by model version.
        errors: Failures by name.
    """

    due_s: list[float] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)
    versions: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    def after(self, begin_s: float, end_s: float = np.inf) -> np.ndarray:
        """Return the latencies of what was due in a span of time, NaN for errors."""
        due = np.asarray(self.due_s)
        chosen: np.ndarray = np.asarray(self.latency_ms)[(due >= begin_s) & (due < end_s)]
        return chosen

    def quantile_ms(self, share: float, begin_s: float = 0.0, end_s: float = np.inf) -> float:
        """Return a latency quantile; an error counts as infinitely late."""
        latency = np.nan_to_num(self.after(begin_s, end_s), nan=np.inf)
        if not latency.size:
            return float("nan")
        return float(np.quantile(latency, share, method="higher"))


async def open_loop(
    client: Client,
    requests: Iterator[InferRequest],
    rate_per_s: float | Callable[[float], float],
    seconds: float,
) -> Outcome:
    """Send requests on schedule for so long; return when all are answered."""
    outcome, begin = Outcome(), time.perf_counter()
    waiting: set[asyncio.Task[None]] = set()

    async def ask(request: InferRequest, due_s: float) -> None:
        try:
            response = await client.infer(request)
        except TrimoeError as error:
            outcome.errors[type(error).__name__] += 1
            latency_ms = float("nan")
        else:
            outcome.versions[response.model_version] += 1
            latency_ms = (time.perf_counter() - begin - due_s) * 1e3
        outcome.due_s.append(due_s)
        outcome.latency_ms.append(latency_ms)

    due_s = 0.0
    while due_s < seconds:
        await asyncio.sleep(max(0.0, begin + due_s - time.perf_counter()))
        task = asyncio.create_task(ask(next(requests), due_s))
        waiting.add(task)
        task.add_done_callback(waiting.discard)
        due_s += 1.0 / (rate_per_s(due_s) if callable(rate_per_s) else rate_per_s)
    if waiting:
        await asyncio.wait(waiting)
    return outcome


class Backlog:
    """Keeps requests in flight until stopped and counts what was answered.

    Args:
        client: Answers.
        make: Returns the next request.
        depth: Requests in flight.
    """

    def __init__(self, client: Client, make: Callable[[], InferRequest], depth: int) -> None:
        self._client, self._make = client, make
        self.done: list[tuple[float, int]] = []  # time, tokens
        self.errors: Counter[str] = Counter()
        self._tasks = [asyncio.create_task(self._feed()) for _ in range(depth)]

    async def _feed(self) -> None:
        while True:
            request = self._make()
            try:
                await self._client.infer(request)
            except TrimoeError as error:
                self.errors[type(error).__name__] += 1
                await asyncio.sleep(0.01)
            else:
                self.done.append((time.perf_counter(), request.features.shape[0]))

    def tokens_per_s(self, begin: float, end: float) -> float:
        """Return the tokens answered per second between two times."""
        return sum(tokens for at, tokens in self.done if begin <= at < end) / (end - begin)

    async def stop(self) -> None:
        """Ask for nothing more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Mixed(NamedTuple):
    """What a stream and a backlog got beside each other."""

    stream: Outcome
    batch_tokens_per_s: float


class Load(NamedTuple):
    """A stream and a backlog.

    Args:
        requests: Of the stream.
        rate_per_s: How many of them a second.
        make_batch: Returns the next request of the backlog.
        depth: How many of those are in flight.
    """

    requests: Iterator[InferRequest]
    rate_per_s: float
    make_batch: Callable[[], InferRequest]
    depth: int


async def run_mixed(
    stream: Client, batch: Client, load: Load, seconds: float, settle_s: float
) -> Mixed:
    """Run a stream beside a backlog; the first ``settle_s`` seconds are not counted."""
    backlog = Backlog(batch, load.make_batch, load.depth)
    begin = time.perf_counter()
    outcome = await open_loop(stream, load.requests, load.rate_per_s, settle_s + seconds)
    rate = backlog.tokens_per_s(begin + settle_s, begin + settle_s + seconds)
    await backlog.stop()
    return Mixed(outcome, rate)


async def capacity(
    client: Client, make: Callable[[], InferRequest], *, depth: int, seconds: float
) -> float:
    """Return the requests per second of a closed loop with so many in flight."""
    backlog = Backlog(client, make, depth)
    await asyncio.sleep(seconds / 3)
    begin = time.perf_counter()
    await asyncio.sleep(seconds)
    end = time.perf_counter()
    await backlog.stop()
    return sum(begin <= at < end for at, _ in backlog.done) / (end - begin)
