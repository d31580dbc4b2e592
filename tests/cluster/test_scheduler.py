"""Order, budget, shares, refusal and cancellation of the scheduler, in injected time."""

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cost import CostModel
from cluster.errors import DeadlineExceededError, QueueFullError, UnavailableError
from cluster.scheduler import Job, Limits, Scheduler, Step
from cluster.schemas import InferRequest, InferResponse, ServiceClass

TOKEN_MS = 0.1
STEP_MS = 1.0
LIMITS = Limits(max_step_ms=11.05)  # room for 100 tokens
CLASSES = list(ServiceClass)


class Bench:
    """A scheduler with a known cost model and a clock under control."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.now = 100.0
        cost = CostModel(["task"])
        for n in (1, 1000) * 300:
            cost.observe({"task": n}, STEP_MS + TOKEN_MS * n)
        self.scheduler = Scheduler(cost, lambda: self.now, limits)
        self.count = 0

    def add(
        self,
        tokens: Sequence[int],
        service_class: ServiceClass = ServiceClass.STREAM,
        deadline_ms: float = 10_000.0,
        tenant: str = "t",
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
        job = Job(request, np.array(tokens, dtype=np.int64), self.now, future)
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


def test_earliest_deadline_goes_first_and_equal_ones_keep_their_order() -> None:
    def scenario() -> None:
        bench = Bench()
        for deadline_ms in (900.0, 500.0, 900.0, 500.0, 700.0):
            bench.add([60], deadline_ms=deadline_ms)
        order = [ids(bench.step()) for _ in range(5)]
        assert order == [["r2"], ["r4"], ["r5"], ["r1"], ["r3"]]

    in_loop(scenario)


def test_stream_goes_before_interactive_before_batch() -> None:
    def scenario() -> None:
        bench = Bench()
        for service_class in (ServiceClass.BATCH, ServiceClass.INTERACTIVE, ServiceClass.STREAM):
            bench.add([30], service_class)
        assert ids(bench.step()) == ["r3", "r2", "r1"]

    in_loop(scenario)


def test_a_request_is_spread_over_steps_by_whole_sequences() -> None:
    def scenario() -> None:
        bench = Bench()
        job = bench.add([40, 40, 40, 90, 10])
        spans = []
        while step := bench.step():
            spans += [(part.first, part.last) for part in step]
        assert spans == [(0, 2), (2, 3), (3, 5)]
        assert job.num_done == 5

    in_loop(scenario)


def test_a_sequence_above_the_budget_runs_alone_rather_than_never() -> None:
    def scenario() -> None:
        bench = Bench()
        bench.add([50])
        bench.add([5000], ServiceClass.BATCH)
        assert [tokens_of(bench.step()) for _ in range(2)] == [50, 5000]

    in_loop(scenario)


def test_steps_shrink_to_a_fraction_of_the_tightest_deadline() -> None:
    def scenario() -> None:
        bench = Bench()
        bench.add([10] * 50, ServiceClass.BATCH)
        assert tokens_of(bench.step()) == 100
        bench.add([10], deadline_ms=24.2)  # a quarter of it: 6 ms, of which 1 ms is fixed
        assert tokens_of(bench.step()) == 50

    in_loop(scenario)


def test_batch_keeps_its_floor_under_a_saturating_stream_and_fills_idle_room() -> None:
    def scenario() -> None:
        bench = Bench()
        bench.add([10] * 2000, ServiceClass.BATCH, deadline_ms=1e6)
        shares = {ServiceClass.STREAM: 0, ServiceClass.BATCH: 0}
        for _ in range(200):
            while bench.scheduler.num_waiting < 4:
                bench.add([10] * 10)
            for part in bench.step():
                shares[part.job.request.service_class] += part.num_tokens
        assert shares[ServiceClass.BATCH] / sum(shares.values()) == pytest.approx(0.1, abs=0.01)

        alone = Bench()
        alone.add([10] * 2000, ServiceClass.BATCH, deadline_ms=1e6)
        assert tokens_of(alone.step()) == 100

    in_loop(scenario)


def test_tenant_with_a_full_queue_is_refused_and_others_are_not() -> None:
    def scenario() -> None:
        bench = Bench(Limits(queue_per_tenant=2))
        bench.add([1])
        bench.add([1])
        with pytest.raises(QueueFullError, match="at most 2"):
            bench.add([1])
        bench.add([1], tenant="other")
        bench.step()
        bench.add([1])  # room again

    in_loop(scenario)


def test_what_cannot_meet_its_deadline_is_refused_on_arrival() -> None:
    def scenario() -> None:
        bench = Bench()
        bench.add([100] * 10)  # about 110 ms of work
        with pytest.raises(DeadlineExceededError, match="its deadline is 60 ms"):
            bench.add([100], ServiceClass.BATCH, deadline_ms=60.0)
        bench.add([10], deadline_ms=60.0)  # earlier deadline: it goes first and fits

    in_loop(scenario)


def test_an_idle_scheduler_tries_even_what_it_believes_hopeless() -> None:
    def scenario() -> None:
        bench = Bench()
        bench.add([1000], deadline_ms=20.0)
        assert tokens_of(bench.step()) == 1000

    in_loop(scenario)


def test_expired_job_is_dropped_with_a_deadline_error() -> None:
    def scenario() -> None:
        bench = Bench()
        late = bench.add([10], deadline_ms=50.0)
        bench.now += 0.051
        assert not bench.step()
        assert isinstance(late.future.exception(), DeadlineExceededError)
        assert bench.scheduler.is_idle

    in_loop(scenario)


def test_cancelled_job_leaves_the_queue_and_gives_its_place_back() -> None:
    async def scenario() -> None:
        bench = Bench(Limits(queue_per_tenant=1))
        bench.add([10]).future.cancel()
        await asyncio.sleep(0)
        assert bench.scheduler.num_waiting == 0
        bench.add([10])

    asyncio.run(scenario())


def test_job_cancelled_between_steps_takes_no_further_step() -> None:
    def scenario() -> None:
        bench = Bench()
        job = bench.add([80] * 5)
        bench.step()
        job.future.cancel()
        assert not bench.step()

    in_loop(scenario)


def test_next_step_waits_for_work_and_ends_when_closed() -> None:
    async def scenario() -> None:
        bench = Bench()
        waiting = asyncio.create_task(bench.scheduler.next_step())
        await asyncio.sleep(0)
        assert not waiting.done()
        bench.add([5])
        assert tokens_of(await waiting) == 5
        left = bench.add([5])
        bench.scheduler.close()
        assert not await bench.scheduler.next_step()
        assert isinstance(left.future.exception(), UnavailableError)
        with pytest.raises(UnavailableError, match="shutting down"):
            bench.add([5])

    asyncio.run(scenario())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(CLASSES),
            st.lists(st.integers(0, 150), min_size=1, max_size=6),
            st.sampled_from([3_000.0, 5_000.0, 9_000.0]),
        ),
        min_size=1,
        max_size=15,
    )
)
def test_everything_runs_once_in_deadline_order_within_budget(
    arrivals: list[tuple[ServiceClass, list[int], float]],
) -> None:
    def scenario() -> None:
        bench = Bench()
        jobs = [bench.add(tokens, each, deadline_ms) for each, tokens, deadline_ms in arrivals]
        seen: dict[Job, list[int]] = {job: [] for job in jobs}
        last_first: dict[ServiceClass, float] = {}
        while step := bench.step():
            sizes = [n for part in step for n in part.job.tokens[part.first : part.last]]
            assert tokens_of(step) <= 101 or len([n for n in sizes if n]) == 1
            for part in step:
                seen[part.job] += range(part.first, part.last)
                each = part.job.request.service_class
                if part.first == 0:
                    assert part.job.deadline >= last_first.get(each, 0.0)
                    last_first[each] = part.job.deadline
        for job in jobs:
            assert seen[job] == list(range(job.request.num_sequences))
            assert job.num_done == job.request.num_sequences

    in_loop(scenario)
