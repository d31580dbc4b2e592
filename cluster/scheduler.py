"""What runs next: the order, the budget and the limits of a replica's steps.

Rules:
    1. Each tenant may have a bounded number of requests and tokens waiting; one more is refused.
    2. Within a class the earliest deadline goes first; equal deadlines keep arrival order.  A
       deadline farther than ``ageing_ms`` counts as that far, so that nobody waits behind later
       arrivals for longer.
    3. Stream goes before interactive before batch, but a class that waits earns a floor
       share of the time that others run, and that credit goes before everything.  What it
       got of idle room shortly before counts against it.
    4. Within a class a tenant that has had more than its weighted share, by ``tenant_lead_ms``
       of work, lets the others go first.
    5. A step takes pieces up to a budget: a fraction of the tightest deadline that waits, and
       for work below the stream class no more than ``max_step_ms`` and the same fraction of the
       tightest deadline seen lately, because such a request may come during the step.  A piece
       above the budget runs when it is first in the step, and a stream request that is first
       may take twice the budget if that completes it: in two steps it would pay two fixed costs.
    6. Room that a class leaves goes to the next: no capacity idles while work waits.
    7. What cannot meet its deadline is refused on arrival or dropped before it runs, except
       when nothing else waits, or none of its kind has run for ``probe_s``: the cost model must
       be able to learn that it was wrong.
    8. Spare work, such as a shadow's, runs in steps of its own, only when nothing else waits,
       and for no more than ``spare_share`` of the time: so rarely that nobody's p99 sees it.

Pure asyncio: no ray, no torch, no clock of its own.  Times are seconds of the injected
clock, durations milliseconds.
"""

import asyncio
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.cost import CostModel
from cluster.errors import DeadlineExceededError, QueueFullError, UnavailableError
from cluster.recent import RecentMinimum
from cluster.schemas import InferRequest, InferResponse, ServiceClass
from cluster.shares import TenantShares
from cluster.work import Work

CLOSED = "the replica is shutting down; send the request again"
MIN_ROOM_MS = 0.1  # a step always has room for something, however tight the deadlines
PRECEDENCE = (ServiceClass.STREAM, ServiceClass.INTERACTIVE, ServiceClass.BATCH)


@dataclass(frozen=True, slots=True)
class Limits:
    """Settings of the policy.

    Args:
        queue_per_tenant: Waiting requests of one tenant at most.
        tokens_per_tenant: Waiting tokens of one tenant at most, unless it is a single request.
        max_step_ms: A step of interactive and batch work is planned to take no longer.
        beside_stream_ms: Nor longer than this by pieces of cut sequences while a stream is
            expected: to a stream request that just misses a step the whole of it is latency, and
            pieces share no fixed cost that a longer step would save.
        deadline_fraction: No step is planned to take more of the tightest deadline.
        deadline_memory_s: How long a tight deadline is remembered.
        admit_share: What is not expected to be done within so much of its deadline is refused;
            the rest is for the way to the replica and back, and for what was mispredicted.
        probe_s: After so long without any work of a kind, one request of it is not refused.
        ageing_ms: The farthest that a deadline counts.
        spare_share: Share of the time that spare work may take.
        spare_queue: Spare requests that may wait.
        floor_share: Work a waiting class is owed, as a share of all work; a token of one task may
            take ten times as long as one of another.
        floor_lead_ms: Work in idle room that counts against what a class is owed later, at most.
        tenant_weights: Share of a tenant within a class, 1 if not named.
        tenant_lead_ms: Work by which a tenant may be ahead of its share before it yields.
    """

    queue_per_tenant: int = 256
    tokens_per_tenant: int = 4_000_000
    max_step_ms: float = (
        150.0  # what the first stream request waits at worst; later ones are expected
    )
    beside_stream_ms: float = 35.0  # p99 of a fraud stream beside CT cases, docs/log.md#beside
    deadline_fraction: float = 0.25  # step <= SLO / 4 (facts: between SLO / 3 and SLO / 5)
    deadline_memory_s: float = 10.0
    admit_share: float = 0.85  # at 1.0 callers gave up on a seventh of what was computed
    probe_s: float = 1.0
    ageing_ms: float = 60_000.0
    spare_share: float = 0.002  # at .01 the p99 of others at half load rose by 24 %
    spare_queue: int = 8
    floor_share: Mapping[ServiceClass, float] = field(
        default_factory=lambda: {ServiceClass.INTERACTIVE: 0.2, ServiceClass.BATCH: 0.1}
    )
    floor_lead_ms: float = 200.0
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    tenant_lead_ms: float = 200.0


@dataclass(slots=True, eq=False, weakref_slot=True)
class Job:
    """One admitted request on its way through the steps.

    Args:
        request: What was asked.
        work: Its pieces.
        arrived: Receipt, seconds.
        future: Receives the answer; cancelling it takes the job out of the queue.
        model: What will run it; the scheduler only carries it.
        is_spare: Whether it may take no time that anybody would notice.
        is_probe: Whether it runs although it seems too late, for the cost model to learn.
        next_piece: First piece not yet in any step.
        num_done: Pieces whose step has finished.
    """

    request: InferRequest
    work: Work
    arrived: float
    future: "asyncio.Future[InferResponse]"
    model: Any = None
    is_spare: bool = False
    is_probe: bool = False
    next_piece: int = 0
    num_done: int = 0
    tokens_left: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens_left = int(self.work.tokens.sum())

    @property
    def deadline(self) -> float:
        """Time by which the answer is worthless, seconds."""
        return self.arrived + self.request.deadline_ms / 1e3

    @property
    def cost_key(self) -> str:
        """The cost model's name for this work."""
        return f"{self.request.task}/chunk" if self.work.is_cut else self.request.task

    @property
    def is_planned(self) -> bool:
        """Whether every piece is in some step."""
        return self.next_piece == self.work.num_pieces


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """Pieces ``first`` to ``last`` (exclusive) of a job, in one step."""

    job: Job
    first: int
    last: int

    @property
    def num_tokens(self) -> int:
        """Tokens of these pieces."""
        return int(self.job.work.tokens[self.first : self.last].sum())


Step = Sequence[Slice]


def count_tokens(step: Step) -> Mapping[str, int]:
    """Return the tokens of a step per cost key."""
    tokens: Counter[str] = Counter()
    for part in step:
        tokens[part.job.cost_key] += part.num_tokens
    return tokens


class _Plan:
    """A step while it is being filled."""

    def __init__(self, cost: CostModel) -> None:
        self._used_ms = 0.0
        self._cost = cost
        self.spans: dict[Job, tuple[int, int]] = {}

    def take(self, job: Job, room_ms: float, credit_ms: float) -> float:
        """Add leading pieces of the job within budget and credit; return the work in them, ms."""
        token_ms = self._cost.token_ms(job.cost_key)
        first, tokens = job.next_piece, job.work.tokens
        is_first_of_stream = not self.spans and job.request.service_class is ServiceClass.STREAM
        if is_first_of_stream and job.tokens_left * token_ms <= 2 * room_ms:
            room_ms = 2 * room_ms
        credit = credit_ms / token_ms
        allowed = min(credit, (room_ms - self._used_ms) / token_ms)
        last = first + int(np.searchsorted(tokens[first:].cumsum(), allowed, side="right"))
        if last == first and not self.spans and tokens[first] <= credit:
            last = first + 1  # above the budget, yet not to be cut: it runs first
        taken = int(tokens[first:last].sum())
        if last > first:
            self.spans[job] = (self.spans.get(job, (first, last))[0], last)
            job.next_piece = last
            job.tokens_left -= taken
            self._used_ms += taken * token_ms
        return taken * token_ms


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
        self._credit_ms = dict.fromkeys(PRECEDENCE, 0.0)
        self._shares = {
            each: TenantShares(self._limits.tenant_weights, self._limits.tenant_lead_ms)
            for each in PRECEDENCE
        }
        self._per_tenant: Counter[str] = Counter()
        self._tightest = {
            each: RecentMinimum(self._limits.deadline_memory_s) for each in PRECEDENCE
        }
        self._wake = asyncio.Event()
        self._spare: deque[Job] = deque()
        self._spare_from = -np.inf  # when spare work may run again, seconds
        self._last_run_s: dict[str, float] = {}  # admitted or finished, by cost key
        self._running: list[Step] = []
        self._is_closed = False

    @property
    def num_waiting(self) -> int:
        """Jobs with pieces not yet in any step."""
        return sum(map(len, self._queues.values()))

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self._running and not self.num_waiting

    @property
    def has_spare_room(self) -> bool:
        """Whether one more spare request may wait."""
        return len(self._spare) < self._limits.spare_queue

    @property
    def queued_tokens(self) -> Mapping[ServiceClass, int]:
        """Tokens that wait, by class."""
        return {each: sum(job.tokens_left for job in queue) for each, queue in self._queues.items()}

    @property
    def predicted_delay_ms(self) -> float:
        """Predicted time until everything that waits or runs now is done."""
        return self._finish_ms(job for queue in self._queues.values() for job in queue)

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            QueueFullError: The tenant has its fill of requests or tokens waiting.
            DeadlineExceededError: The job cannot be finished in time behind what waits.
            UnavailableError: The scheduler is closed.
        """
        if self._is_closed:
            raise UnavailableError(CLOSED)
        if job.is_spare:
            self._submit_spare(job)
            return
        request, each = job.request, job.request.service_class
        self._check_queue(job)
        # noted even if it is refused: the next may fit
        self._tightest[each].note(request.deadline_ms, self._clock())
        finish_ms = self._finish_ms((*self._jobs_before(job), job), request.deadline_ms)
        last_s = self._last_run_s.get(job.cost_key, -np.inf)
        job.is_probe = self._clock() - last_s > self._limits.probe_s
        late_ms = finish_ms - self._limits.admit_share * request.deadline_ms
        if late_ms > 0 and not (self.is_idle or job.is_probe):
            message = (
                f"request {request.request_id}: needs about {finish_ms:.0f} ms behind what "
                f"waits, its deadline is {request.deadline_ms:.0f} ms; allow more or send less"
            )
            another_ms = self._work_ms(job)  # the next of its kind may take the room first
            raise DeadlineExceededError(message, (late_ms + another_ms) / 1e3)
        self._last_run_s[job.cost_key] = self._clock()
        self._shares[each].enter(request.tenant)
        insort(self._queues[each], job, key=self._rank)
        self._per_tenant[request.tenant] += 1
        job.future.add_done_callback(lambda _: self._discard(job))
        self._wake.set()

    async def next_step(self) -> Step:
        """Return the next step, waiting until there is one; empty once closed."""
        while not (step := self.plan() or self._plan_spare()) and not self._is_closed:
            self._wake.clear()
            pause_s = max(self._spare_from - self._clock(), 0.0) if self._spare else None
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause_s)
        return step

    def plan(self) -> Step:
        """Fill one step with what should run now; empty if nothing waits."""
        self._drop_hopeless()
        plan = _Plan(self._cost)
        for each in reversed(PRECEDENCE):
            self._credit_ms[each] -= self._fill(plan, each, self._credit_ms[each])
        for each in PRECEDENCE:
            self._earn(each, self._fill(plan, each, np.inf))
        step = [Slice(job, first, last) for job, (first, last) in plan.spans.items()]
        for part in step:
            if part.job.is_planned:
                self._discard(part.job)
        if step:
            self._running.append(step)
        return step

    def finish(self, step: Step, elapsed_ms: float | None) -> None:
        """Record that a step has ended; its duration in ms, or None if it failed."""
        self._running = [other for other in self._running if other is not step]
        if elapsed_ms is not None:
            self._cost.observe(count_tokens(step), elapsed_ms)
        for part in step:
            part.job.num_done += part.last - part.first
            self._last_run_s[part.job.cost_key] = self._clock()

    def close(self) -> None:
        """Fail everything that waits and accept nothing more."""
        self._is_closed = True
        self._wake.set()
        for job in self._spare:
            _fail(job, UnavailableError(CLOSED))
        for job in [job for queue in self._queues.values() for job in queue]:
            _fail(job, UnavailableError(CLOSED))
            self._discard(job)

    def _submit_spare(self, job: Job) -> None:
        if not self.has_spare_room:
            message = f"expected at most {self._limits.spare_queue} spare requests, got one more"
            raise QueueFullError(message)
        self._spare.append(job)
        self._wake.set()

    def _plan_spare(self) -> Step:
        """Fill a step with spare work if it is time for some; empty if not."""
        now = self._clock()
        if self._running or now < self._spare_from:
            return []
        plan = _Plan(self._cost)
        room_ms = max(self._cost.step_ms, MIN_ROOM_MS)
        while self._spare:
            job = self._spare[0]
            if not (job.future.done() or job.deadline <= now):
                plan.take(job, room_ms, np.inf)
                if not job.is_planned:
                    break
            self._spare.popleft()
        step = [Slice(job, first, last) for job, (first, last) in plan.spans.items()]
        if step:
            took_s = self._cost.predict_ms(count_tokens(step)) / 1e3
            self._spare_from = now + took_s / self._limits.spare_share
            self._running.append(step)
        return step

    def _check_queue(self, job: Job) -> None:
        tenant, limits = job.request.tenant, self._limits
        if self._per_tenant[tenant] >= limits.queue_per_tenant:
            message = (
                f"tenant {tenant!r}: expected at most {limits.queue_per_tenant} waiting requests; "
                "send fewer at once"
            )
            raise QueueFullError(message)
        if self._per_tenant[tenant]:
            queued = sum(
                other.tokens_left
                for queue in self._queues.values()
                for other in queue
                if other.request.tenant == tenant
            )
            if queued + job.tokens_left > limits.tokens_per_tenant:
                message = (
                    f"tenant {tenant!r}: expected at most {limits.tokens_per_tenant} waiting "
                    f"tokens, got {queued + job.tokens_left}; send less at once"
                )
                raise QueueFullError(message)

    def _rank(self, job: Job) -> float:
        return job.arrived + min(job.request.deadline_ms, self._limits.ageing_ms) / 1e3

    def _jobs_before(self, job: Job) -> Iterator[Job]:
        position = PRECEDENCE.index(job.request.service_class)
        for each in PRECEDENCE[:position]:
            yield from self._queues[each]
        rank = self._rank(job)
        for other in self._queues[PRECEDENCE[position]]:
            if self._rank(other) <= rank:
                yield other

    def _finish_ms(self, jobs: Iterable[Job], tightest_ms: float = np.inf) -> float:
        """Time until the last piece of these jobs is done, as if nothing else ran between."""
        ahead_ms = sum(self._cost.predict_ms(count_tokens(step)) for step in self._running)
        work_ms = sum(map(self._work_ms, jobs))
        num_steps = np.ceil(work_ms / self._room_ms(ServiceClass.STREAM, tightest_ms))
        return float(ahead_ms + work_ms + self._cost.step_ms * num_steps)

    def _work_ms(self, job: Job) -> float:
        return job.tokens_left * self._cost.token_ms(job.cost_key)

    def _recent_ms(self, each: ServiceClass) -> float:
        """The tightest deadline of a class that was seen lately, infinite if none was."""
        return self._tightest[each].least(self._clock())

    def _room_ms(self, each: ServiceClass, tightest_ms: float = np.inf) -> float:
        """Time for work of a class in a step, beside its fixed cost; at least that cost."""
        waiting = (job.request.deadline_ms for queue in self._queues.values() for job in queue)
        tightest_ms = min(waiting, default=tightest_ms)
        budget_ms = self._limits.deadline_fraction * tightest_ms
        if each is not ServiceClass.STREAM:
            above = PRECEDENCE[: PRECEDENCE.index(each)]
            expected_ms = min(self._recent_ms(other) for other in above)
            fraction_ms = self._limits.deadline_fraction * expected_ms
            budget_ms = min(budget_ms, self._limits.max_step_ms, fraction_ms)
        return max(budget_ms - self._cost.step_ms, self._cost.step_ms, MIN_ROOM_MS)

    def _room_of_cut_ms(self, each: ServiceClass, room_ms: float) -> float:
        """Room for sequences that are cut: a short step costs them nothing, a long one others."""
        if each is ServiceClass.STREAM or self._recent_ms(ServiceClass.STREAM) == np.inf:
            return room_ms
        return min(room_ms, max(self._limits.beside_stream_ms - self._cost.step_ms, MIN_ROOM_MS))

    def _fill(self, plan: _Plan, each: ServiceClass, credit_ms: float) -> float:
        """Move pieces of a class into the step, in deadline order; return the work in them, ms.

        Tenants ahead of their share come after the others.
        """
        if not self._queues[each] or credit_ms <= 0:
            return 0.0
        room_ms, shares = self._room_ms(each), self._shares[each]
        cut_ms = self._room_of_cut_ms(each, room_ms)
        ahead = shares.ahead()
        waiting = [job for job in self._queues[each] if not job.is_planned]
        in_order = [job for job in waiting if job.request.tenant not in ahead]
        in_order += [job for job in waiting if job.request.tenant in ahead]
        taken_ms = 0.0
        for job in in_order:
            own_ms = cut_ms if job.work.is_cut else room_ms
            work_ms = plan.take(job, own_ms, credit_ms - taken_ms)
            shares.charge(job.request.tenant, work_ms)
            taken_ms += work_ms
            if not job.is_planned:
                break
        return taken_ms

    def _earn(self, served: ServiceClass, work_ms: float) -> None:
        """Credit the waiting classes for work that another ran; their own counts against it."""
        for each, share in self._limits.floor_share.items():
            waits = any(not job.is_planned for job in self._queues[each])
            if not waits:
                self._credit_ms[each] = 0.0
            elif each is not served:
                self._credit_ms[each] += work_ms * share / (1 - share)
            else:
                lead_ms = self._limits.floor_lead_ms
                self._credit_ms[each] = max(self._credit_ms[each] - work_ms, -lead_ms)

    def _drop_hopeless(self) -> None:
        now = self._clock()
        for job in [job for queue in self._queues.values() for job in queue]:
            is_sure = self.num_waiting > 1 and not job.is_probe
            needed_ms = self._work_ms(job) if is_sure else 0.0
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
        each, tenant = job.request.service_class, job.request.tenant
        queue = self._queues[each]
        if job in queue:
            queue.remove(job)
            self._per_tenant[tenant] -= 1
            self._shares[each].leave(tenant)


def _fail(job: Job, error: Exception) -> None:
    if not job.future.done():
        job.future.set_exception(error)
