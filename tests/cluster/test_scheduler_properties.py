"""What holds for every arrival pattern: nothing starves, order, budget, shares."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.scheduler import Job, Limits
from cluster.schemas import ServiceClass
from tests.cluster.scheduler_bench import LIMITS, STEP_MS, TOKEN_MS, Bench, in_loop, tokens_of

CLASSES = list(ServiceClass)
STREAM = ServiceClass.STREAM
ARRIVALS = st.lists(
    st.tuples(
        st.sampled_from(CLASSES),
        st.lists(st.integers(0, 150), min_size=1, max_size=6),
        st.sampled_from([3_000.0, 5_000.0, 9_000.0]),
    ),
    min_size=1,
    max_size=15,
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(ARRIVALS)
def test_everything_runs_once_in_deadline_order_within_budget(
    arrivals: list[tuple[ServiceClass, list[int], float]],
) -> None:
    def scenario() -> None:
        bench = Bench()
        jobs = [bench.add(tokens, each, deadline_ms) for each, tokens, deadline_ms in arrivals]
        tightest_ms = min(job.request.deadline_ms for job in jobs)
        stream_tokens = (LIMITS.deadline_fraction * tightest_ms - STEP_MS) / TOKEN_MS
        seen: dict[Job, list[int]] = {job: [] for job in jobs}
        last_first: dict[ServiceClass, float] = {}
        while step := bench.step():
            below = [part for part in step if part.job.request.service_class is not STREAM]
            sizes = [n for part in below for n in part.job.work.tokens[part.first : part.last]]
            assert tokens_of(below) <= 101 or len([n for n in sizes if n]) == 1
            assert tokens_of(step) <= stream_tokens * 1.02 + 150
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


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.sampled_from([ServiceClass.INTERACTIVE, ServiceClass.BATCH]),
    st.integers(1, 4),
)
def test_nothing_starves_behind_an_endless_stream(
    sizes: list[int], each: ServiceClass, depth: int
) -> None:
    """However full the stream keeps its queue, lower work gets its floor and ends."""

    def scenario() -> None:
        bench = Bench()
        job = bench.add(sizes, each, deadline_ms=1e9)
        stream_tokens = 0
        for _ in range(2000):
            while bench.scheduler.num_waiting < depth + 1:
                bench.add([10] * 10)
            step = bench.step()
            stream_tokens += sum(part.num_tokens for part in step if part.job is not job)
            if job.is_planned:
                break
        share = LIMITS.floor_share[each]
        owed = stream_tokens * share / (1 - share)
        assert job.is_planned
        step_tokens = 2 * (depth + 1) * 100  # before its first credit, and beside its last
        assert owed <= sum(sizes) + max(sizes) + step_tokens * share / (1 - share)

    in_loop(scenario)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcd"), st.sampled_from([1.0, 2.0, 4.0]), min_size=2),
    st.lists(st.integers(1, 60), min_size=1, max_size=10),
    st.integers(0, 1000),
)
def test_tenants_that_always_wait_get_work_by_weight(
    weights: dict[str, float], sizes: list[int], seed: int
) -> None:
    """Whatever deadlines they claim, weighted service differs by what may be saved and two steps."""

    def scenario() -> None:
        lead_ms = 30.0
        bench = Bench(Limits(max_step_ms=11.05, tenant_weights=weights, tenant_lead_ms=lead_ms))
        served: Counter[str] = Counter()
        chosen, count = random.Random(seed), 0
        for _ in range(150):
            waiting: Counter[str] = Counter()
            for job in bench.scheduler._queues[ServiceClass.BATCH]:
                waiting[job.request.tenant] += job.tokens_left
            for tenant in weights:
                while waiting[tenant] < 150:  # more than a step takes
                    count += 1
                    size = sizes[count % len(sizes)]
                    deadline_ms = chosen.choice([2e4, 5e4, 9e4])
                    bench.add([size] * 3, ServiceClass.BATCH, deadline_ms, tenant)
                    waiting[tenant] += 3 * size
            for part in bench.step():
                served[part.job.request.tenant] += part.num_tokens
        normal = [served[tenant] * TOKEN_MS / weight for tenant, weight in weights.items()]
        slack_ms = 3 * lead_ms + 2 * (11.0 + max(sizes) * TOKEN_MS)
        assert max(normal) - min(normal) <= slack_ms

    in_loop(scenario)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(ARRIVALS)
def test_no_step_is_empty_while_something_waits(
    arrivals: list[tuple[ServiceClass, list[int], float]],
) -> None:
    def scenario() -> None:
        bench = Bench()
        for each, tokens, deadline_ms in arrivals:
            bench.add([max(1, n) for n in tokens], each, deadline_ms)
        while bench.scheduler.num_waiting:
            assert tokens_of(bench.step()) > 0

    in_loop(scenario)


@pytest.mark.parametrize("each", [ServiceClass.INTERACTIVE, ServiceClass.BATCH])
def test_a_class_below_gets_exactly_its_floor_under_saturation(each: ServiceClass) -> None:
    def scenario() -> None:
        bench = Bench()
        bench.add([10] * 4000, each, deadline_ms=1e9)
        tokens: Counter[ServiceClass] = Counter()
        for _ in range(200):
            while bench.scheduler.num_waiting < 4:
                bench.add([10] * 10)
            for part in bench.step():
                tokens[part.job.request.service_class] += part.num_tokens
        assert tokens[each] / tokens.total() == pytest.approx(LIMITS.floor_share[each], abs=0.01)

    in_loop(scenario)
