"""A scheduler with a known cost model and a clock under control, for tests."""

import asyncio
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache

import numpy as np

from cluster.cost import CostModel
from cluster.scheduler import Job, Limits, Scheduler, Step
from cluster.schemas import InferRequest, InferResponse, ServiceClass
from cluster.work import Work

TOKEN_MS = 0.1
STEP_MS = 1.0
LIMITS = Limits(max_step_ms=11.05)  # room for 100 tokens


@cache
def known_cost() -> CostModel:
    """The cost model, learnt once; to be copied."""
    cost = CostModel()
    for n in (1, 1000) * 300:
        cost.observe({"task": n}, STEP_MS + TOKEN_MS * n)
        cost.observe({"task/chunk": n}, STEP_MS + TOKEN_MS * n)
    return cost


class Bench:
    """A scheduler with a known cost model and a clock under control."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.now = 100.0
        self.scheduler = Scheduler(deepcopy(known_cost()), lambda: self.now, limits)
        self.count = 0

    def add(
        self,
        tokens: Sequence[int],
        service_class: ServiceClass = ServiceClass.STREAM,
        deadline_ms: float = 10_000.0,
        tenant: str = "t",
        *,
        is_spare: bool = False,
        pieces: int = 1,
    ) -> Job:
        self.count += 1
        request = InferRequest(
            request_id=f"r{self.count}",
            tenant=tenant,
            task="task",
            features=np.zeros((len(tokens), 1), dtype=np.float32),
            cu_seqlens=np.arange(len(tokens) + 1, dtype=np.int32),
            service_class=service_class,
            deadline_ms=deadline_ms,
        )
        future: asyncio.Future[InferResponse] = asyncio.get_running_loop().create_future()
        sizes = np.array(tokens, dtype=np.int64)
        work = Work.whole(sizes) if pieces == 1 else Work.even(sizes, pieces)
        job = Job(request, work, self.now, future, is_spare=is_spare)
        self.scheduler.submit(job)
        return job

    def step(self) -> Step:
        """Run one step, advancing time by what it costs."""
        step = self.scheduler.plan()
        elapsed_ms = STEP_MS + TOKEN_MS * tokens_of(step)
        self.now += elapsed_ms / 1e3
        self.scheduler.finish(step, elapsed_ms)
        return step


def tokens_of(step: Step) -> int:
    return sum(part.num_tokens for part in step)


def ids(step: Step) -> list[str]:
    return [part.job.request.request_id for part in step]


def in_loop(scenario: Callable[[], None]) -> None:
    """Run a synchronous scenario where futures may be made."""

    async def run() -> None:
        scenario()

    asyncio.run(run())
