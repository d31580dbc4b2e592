"""What runs next: the order, the budget and the limits of a replica's steps.

Rules:
    1. Each tenant may have a bounded number of requests waiting; one more is refused.
    2. Within a class the earliest deadline goes first; equal deadlines keep arrival order.
    3. Stream goes before interactive before batch, but a class that waits earns a floor
       share of the tokens that others run, and that credit goes before everything.
    4. A step takes whole sequences up to a budget that keeps it within a fraction of the
       tightest deadline; a sequence above the budget runs when it is first in the step.
       A request may be spread over several steps.
    5. Room that a class leaves goes to the next: no capacity idles while work waits.
    6. What cannot meet its deadline is refused on arrival or dropped before it runs, except
       when nothing else waits: the cost model must be able to learn that it was wrong.

Pure asyncio: no ray, no torch, no clock of its own.  Times are seconds of the injected
clock, durations milliseconds.
"""

import asyncio
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cluster.cost import CostModel
from cluster.errors import DeadlineExceededError, QueueFullError, UnavailableError
from cluster.schemas import InferRequest, InferResponse, ServiceClass

CLOSED = "the replica is shutting down; send the request again"
MIN_ROOM_MS = 0.1  # a step always has room for something, however tight the deadlines
PRECEDENCE = (ServiceClass.STREAM, ServiceClass.INTERACTIVE, ServiceClass.BATCH)


@dataclass(frozen=True, slots=True)
class Limits:
    """Settings of the policy.

    Args:
        queue_per_tenant: Waiting requests of one tenant at most.
        max_step_ms: A step is planned to take no longer than this.
        deadline_fraction: ... nor than this part of the tightest deadline that waits.
        floor_share: Tokens a waiting class is owed, as a share of all tokens.
    """

    queue_per_tenant: int = 256
    max_step_ms: float = 150.0  # what a stream request waits at worst behind a batch step; 25 would
    # split a poll of 100 fraud transactions in two (`base`, one core: 10 ms a step + 0.06 a token)
    deadline_fraction: float = 0.25  # step <= SLO / 4 (facts: between SLO / 3 and SLO / 5)
    floor_share: Mapping[ServiceClass, float] = field(
        default_factory=lambda: {ServiceClass.INTERACTIVE: 0.2, ServiceClass.BATCH: 0.1}
    )


@dataclass(slots=True, eq=False, weakref_slot=True)
class Job:
    """One admitted request on its way through the steps.

    Args:
        request: What was asked.
        tokens: Tokens of each sequence, int64 [B].
        arrived: Receipt, seconds.
        future: Receives the answer; cancelling it takes the job out of the queue.
        next_sequence: First sequence not yet in any step.
        num_done: Sequences whose step has finished.
    """

    request: InferRequest
    tokens: NDArray[np.int64]
    arrived: float
    future: "asyncio.Future[InferResponse]"
    next_sequence: int = 0
    num_done: int = 0
    tokens_left: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens_left = int(self.tokens.sum())

    @property
    def deadline(self) -> float:
        """Time by which the answer is worthless, seconds."""
        return self.arrived + self.request.deadline_ms / 1e3

    @property
    def is_planned(self) -> bool:
        """Whether every sequence is in some step."""
        return self.next_sequence == self.request.num_sequences


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """Sequences ``first`` to ``last`` (exclusive) of a job, in one step."""

    job: Job
    first: int
    last: int

    @property
    def num_tokens(self) -> int:
        """Tokens of these sequences."""
        return int(self.job.tokens[self.first : self.last].sum())


Step = Sequence[Slice]


def count_tokens(step: Step) -> Mapping[str, int]:
    """Return the tokens of a step per task."""
    tokens: Counter[str] = Counter()
    for part in step:
        tokens[part.job.request.task] += part.num_tokens
    return tokens


class _Plan:
    """A step while it is being filled."""

    def __init__(self, room_ms: float, cost: CostModel) -> None:
        self._left_ms = room_ms
        self._cost = cost
        self.spans: dict[Job, tuple[int, int]] = {}

    def take(self, job: Job, credit: float) -> int:
        """Add leading sequences of the job within budget and credit; return their tokens."""
        token_ms = self._cost.token_ms(job.request.task)
        first = job.next_sequence
        allowed = min(credit, self._left_ms / token_ms)
        last = first + int(np.searchsorted(job.tokens[first:].cumsum(), allowed, side="right"))
        if last == first and not self.spans and job.tokens[first] <= credit:
            last = first + 1  # above the budget, yet never split: it runs first
        taken = int(job.tokens[first:last].sum())
        if last > first:
            self.spans[job] = (self.spans.get(job, (first, last))[0], last)
            job.next_sequence = last
            job.tokens_left -= taken
            self._left_ms -= taken * token_ms
        return taken


class Scheduler:
    """Queues of one replica.

    Args:
        cost: Predicts and learns step durations.
        clock: Returns now, seconds, monotonic.
        limits: Settings of the policy.
    """

    def __init__(
        self, cost: CostModel, clock: Callable[[], float], limits: Limits | None = None
    ) -> None:
        self._cost = cost
        self._clock = clock
        self._limits = limits or Limits()
        self._queues: dict[ServiceClass, list[Job]] = {each: [] for each in PRECEDENCE}
        self._credit = dict.fromkeys(PRECEDENCE, 0.0)
        self._per_tenant: Counter[str] = Counter()
        self._wake = asyncio.Event()
        self._running: Step = ()
        self._is_closed = False

    @property
    def num_waiting(self) -> int:
        """Jobs with sequences not yet in any step."""
        return sum(map(len, self._queues.values()))

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self._running and not self.num_waiting

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            QueueFullError: The tenant has its fill of requests waiting.
            DeadlineExceededError: The job cannot be finished in time behind what waits.
            UnavailableError: The scheduler is closed.
        """
        if self._is_closed:
            raise UnavailableError(CLOSED)
        tenant, limit = job.request.tenant, self._limits.queue_per_tenant
        if self._per_tenant[tenant] >= limit:
            message = (
                f"tenant {tenant!r}: expected at most {limit} waiting requests; send fewer at once"
            )
            raise QueueFullError(message)
        finish_ms = self._predict_finish_ms(job)
        if not self.is_idle and finish_ms > job.request.deadline_ms:
            message = (
                f"request {job.request.request_id}: needs about {finish_ms:.0f} ms behind what "
                f"waits, its deadline is {job.request.deadline_ms:.0f} ms; allow more or send less"
            )
            raise DeadlineExceededError(message)
        insort(self._queues[job.request.service_class], job, key=lambda each: each.deadline)
        self._per_tenant[tenant] += 1
        job.future.add_done_callback(lambda _: self._discard(job))
        self._wake.set()

    async def next_step(self) -> Step:
        """Return the next step, waiting until there is one; empty once closed."""
        while not (step := self.plan()) and not self._is_closed:
            self._wake.clear()
            await self._wake.wait()
        return step

    def plan(self) -> Step:
        """Fill one step with what should run now; empty if nothing waits."""
        self._drop_hopeless()
        plan = _Plan(self._room_ms(), self._cost)
        for each in reversed(PRECEDENCE):
            self._credit[each] -= self._fill(plan, each, self._credit[each])
        for each in PRECEDENCE:
            self._earn(each, self._fill(plan, each, np.inf))
        step = [Slice(job, first, last) for job, (first, last) in plan.spans.items()]
        for part in step:
            if part.job.is_planned:
                self._discard(part.job)
        self._running = step
        return step

    def finish(self, step: Step, elapsed_ms: float | None) -> None:
        """Record that a step has ended; its duration in ms, or None if it failed."""
        self._running = ()
        if elapsed_ms is not None:
            self._cost.observe(count_tokens(step), elapsed_ms)
        for part in step:
            part.job.num_done += part.last - part.first

    def close(self) -> None:
        """Fail everything that waits and accept nothing more."""
        self._is_closed = True
        self._wake.set()
        for job in [job for queue in self._queues.values() for job in queue]:
            _fail(job, UnavailableError(CLOSED))
            self._discard(job)

    def _jobs_before(self, job: Job) -> Iterator[Job]:
        rank = PRECEDENCE.index(job.request.service_class)
        for each in PRECEDENCE[:rank]:
            yield from self._queues[each]
        yield from (
            other for other in self._queues[PRECEDENCE[rank]] if other.deadline <= job.deadline
        )

    def _predict_finish_ms(self, job: Job) -> float:
        """Time until the job's last sequence is done, as if classes above ran before it."""
        ahead_ms = self._cost.predict_ms(count_tokens(self._running)) if self._running else 0.0
        work_ms = sum(map(self._work_ms, (*self._jobs_before(job), job)))
        num_steps = np.ceil(work_ms / self._room_ms(job.request.deadline_ms))
        return float(ahead_ms + work_ms + self._cost.step_ms * num_steps)

    def _work_ms(self, job: Job) -> float:
        return job.tokens_left * self._cost.token_ms(job.request.task)

    def _room_ms(self, tightest_ms: float = np.inf) -> float:
        """Time for tokens in a step, beside its fixed cost; at least as much as that cost."""
        waiting = (job.request.deadline_ms for queue in self._queues.values() for job in queue)
        tightest_ms = min(waiting, default=tightest_ms)
        budget_ms = min(self._limits.max_step_ms, self._limits.deadline_fraction * tightest_ms)
        return max(budget_ms - self._cost.step_ms, self._cost.step_ms, MIN_ROOM_MS)

    def _fill(self, plan: _Plan, each: ServiceClass, credit: float) -> int:
        """Move sequences of a class into the step, in deadline order; return their tokens."""
        taken = 0
        for job in self._queues[each]:
            if not job.is_planned:
                taken += plan.take(job, credit - taken)
            if not job.is_planned:
                break
        return taken

    def _earn(self, served: ServiceClass, tokens: int) -> None:
        """Credit the waiting classes for tokens that another class ran."""
        for each, share in self._limits.floor_share.items():
            waits = any(not job.is_planned for job in self._queues[each])
            if not waits:
                self._credit[each] = 0.0
            elif each is not served:
                self._credit[each] += tokens * share / (1 - share)

    def _drop_hopeless(self) -> None:
        now = self._clock()
        for job in [job for queue in self._queues.values() for job in queue]:
            needed_ms = self._work_ms(job) if self.num_waiting > 1 else 0.0
            left_ms = (job.deadline - now) * 1e3
            if job.future.done():
                self._discard(job)
            elif left_ms <= needed_ms:
                message = (
                    f"request {job.request.request_id}: {max(left_ms, 0):.0f} ms left of "
                    f"{job.request.deadline_ms:.0f} ms, about {needed_ms:.0f} ms needed"
                )
                _fail(job, DeadlineExceededError(message))
                self._discard(job)

    def _discard(self, job: Job) -> None:
        """Take a job out of its queue, if it is still there."""
        queue = self._queues[job.request.service_class]
        if job in queue:
            queue.remove(job)
            self._per_tenant[job.request.tenant] -= 1


def _fail(job: Job, error: Exception) -> None:
    if not job.future.done():
        job.future.set_exception(error)
