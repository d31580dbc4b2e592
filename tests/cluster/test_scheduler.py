"""Order, budget, shares, refusal and cancellation of the scheduler, in injected time."""

import asyncio
from dataclasses import replace

import pytest

from cluster.errors import DeadlineExceededError, QueueFullError, UnavailableError
from cluster.scheduler import Limits
from cluster.schemas import ServiceClass
from tests.cluster.scheduler_bench import LIMITS, Bench, ids, in_loop, tokens_of


def test_earliest_deadline_goes_first_and_equal_ones_keep_their_order() -> None:
    def scenario() -> None:
        bench = Bench()
        for deadline_ms in (900.0, 500.0, 900.0, 500.0, 700.0):
            bench.add([60], ServiceClass.BATCH, deadline_ms)
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
        job = bench.add([40, 40, 40, 90, 10], ServiceClass.BATCH)
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


def test_idle_room_that_batch_got_counts_against_its_floor_up_to_a_lead() -> None:
    def scenario(idle_steps: int) -> int:
        bench = Bench()
        bench.add([10] * 9000, ServiceClass.BATCH, deadline_ms=1e6)
        for _ in range(idle_steps):
            bench.step()
        stream = 0
        while True:
            while bench.scheduler.num_waiting < 4:
                bench.add([10] * 10)
            step = bench.step()
            if any(part.job.request.service_class is ServiceClass.BATCH for part in step):
                return stream
            stream += tokens_of(step)

    in_loop(lambda: _expect(scenario(5), 9 * 500))
    in_loop(lambda: _expect(scenario(50), 9 * 2000))  # 200 ms of work at most


def _expect(tokens: int, about: int) -> None:
    assert tokens == pytest.approx(about, abs=400)


def test_a_stream_request_is_completed_rather_than_cut_if_twice_the_room_is_enough() -> None:
    def scenario() -> None:
        bench = Bench()
        bench.add([10] * 20, deadline_ms=60.2)  # a quarter of it: room for 140 tokens
        bench.add([10] * 20, deadline_ms=60.2)
        assert [tokens_of(bench.step()), tokens_of(bench.step())] == [200, 200]
        bench.add([10] * 29, deadline_ms=60.2)
        assert tokens_of(bench.step()) == 140

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


def test_now_and_then_one_request_is_tried_that_seems_hopeless() -> None:
    """A kind that is refused altogether would never correct a wrong prediction."""

    def scenario() -> None:
        bench = Bench()
        bench.add([100] * 10)
        bench.now += LIMITS.probe_s + 0.01
        probe = bench.add([100], ServiceClass.BATCH, deadline_ms=60.0)
        with pytest.raises(DeadlineExceededError):
            bench.add([100], ServiceClass.BATCH, deadline_ms=60.0)
        assert probe.is_probe

    in_loop(scenario)


def test_spare_work_runs_when_nothing_else_waits_and_rarely() -> None:
    async def scenario() -> None:
        bench = Bench(replace(LIMITS, spare_share=0.01, spare_queue=2))
        first, second = (bench.add([5], is_spare=True) for _ in range(2))
        with pytest.raises(QueueFullError, match="at most 2 spare"):
            bench.add([5], is_spare=True)
        bench.add([10])
        assert ids(bench.step()) == ["r4"]  # nobody waits behind spare work
        step = await bench.scheduler.next_step()
        assert ids(step) == [first.request.request_id, second.request.request_id]
        bench.scheduler.finish(step, 2.0)  # of 1 ms and 10 tokens: 2 ms
        third = bench.add([5], is_spare=True)
        waiting = asyncio.create_task(bench.scheduler.next_step())
        bench.now += 0.19
        await asyncio.sleep(0.25)
        assert not waiting.done()
        bench.now += 0.02
        assert ids(await waiting) == [third.request.request_id]

    asyncio.run(scenario())


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


def test_a_stream_request_is_not_cut_by_the_limit_of_batch_steps() -> None:
    def scenario() -> None:
        bench = Bench()
        bench.add([1] * 500)
        bench.add([10] * 50, ServiceClass.BATCH)
        assert [tokens_of(bench.step()) for _ in range(2)] == [500, 100]

    in_loop(scenario)


def test_a_batch_step_leaves_room_for_a_tight_stream_request_seen_lately() -> None:
    def scenario() -> None:
        bench = Bench()
        bench.add([10], deadline_ms=24.2)  # a quarter of it: 6 ms, of which 1 ms is fixed
        bench.step()
        bench.add([10] * 50, ServiceClass.BATCH, deadline_ms=1e6)
        assert tokens_of(bench.step()) == 50
        bench.now += LIMITS.deadline_memory_s
        bench.add([10] * 50, ServiceClass.BATCH, deadline_ms=1e6)
        assert tokens_of(bench.step()) == 100  # forgotten

    in_loop(scenario)


def test_a_stream_whose_deadlines_vary_is_never_forgotten_while_it_goes_on() -> None:
    """As clients send what is left of theirs: the tightest is long ago, others are not."""

    def scenario() -> None:
        bench = Bench()
        bench.add([10] * 500, ServiceClass.BATCH, deadline_ms=1e6)
        for deadline_ms in (24.2, 24.3):
            bench.add([10], deadline_ms=deadline_ms)
            bench.step()
            bench.now += 0.6 * LIMITS.deadline_memory_s
        assert tokens_of(bench.step()) == 50

    in_loop(scenario)


@pytest.mark.parametrize(("pieces", "behind"), [(50, 30), (1, 100)])
def test_pieces_behind_a_stream_run_in_shorter_steps_than_whole_sequences(
    pieces: int, behind: int
) -> None:
    def scenario() -> None:
        bench = Bench(replace(LIMITS, beside_stream_ms=4.05))  # of which 1 ms is fixed
        sizes = [500] if pieces > 1 else [10] * 50
        bench.add(sizes, ServiceClass.BATCH, deadline_ms=1e6, pieces=pieces)
        assert tokens_of(bench.step()) == 100
        bench.add([10])
        bench.step()
        assert tokens_of(bench.step()) == behind
        bench.now += LIMITS.deadline_memory_s
        assert tokens_of(bench.step()) == 100  # the stream is over

    in_loop(scenario)


def test_even_a_refused_deadline_makes_the_next_batch_steps_shorter() -> None:
    def scenario() -> None:
        bench = Bench()
        bench.add([10] * 100, ServiceClass.BATCH)
        bench.scheduler.plan()  # 11 ms, still running
        with pytest.raises(DeadlineExceededError):
            bench.add([10], deadline_ms=8.0)
        assert tokens_of(bench.step()) <= 20  # a quarter of 8 ms

    in_loop(scenario)


def test_a_far_deadline_counts_as_the_ageing_limit() -> None:
    def scenario() -> None:
        bench = Bench(Limits(max_step_ms=11.05, ageing_ms=1000.0))
        bench.add([100], ServiceClass.BATCH, deadline_ms=1e9)
        bench.now += 0.6
        bench.add([100], ServiceClass.BATCH, deadline_ms=500.0)
        assert ids(bench.step()) == ["r1"]  # due 1.0 s after the start, the other one 1.1 s
        bench.add([100], ServiceClass.BATCH, deadline_ms=1e9)
        assert ids(bench.step()) == ["r2"]

    in_loop(scenario)


def test_a_tenant_with_too_many_tokens_waiting_is_refused() -> None:
    def scenario() -> None:
        bench = Bench(Limits(tokens_per_tenant=100))
        bench.add([500])  # a single request may be of any size
        with pytest.raises(QueueFullError, match="at most 100 waiting tokens, got 510"):
            bench.add([10])
        bench.add([10], tenant="other")

    in_loop(scenario)


def test_a_tenant_far_ahead_of_its_share_goes_behind_the_others() -> None:
    def scenario() -> None:
        bench = Bench(Limits(max_step_ms=11.05, tenant_lead_ms=15.0))
        for _ in range(6):
            bench.add([100], ServiceClass.BATCH, deadline_ms=5_000.0, tenant="greedy")
        for _ in range(3):
            bench.add([100], ServiceClass.BATCH, deadline_ms=9_000.0, tenant="modest")
        order = [step[0].job.request.tenant[0] for step in iter(bench.step, [])]
        # the earliest deadlines go first until they are 15 ms of work ahead, then turns are taken
        assert order == ["g", "g", "m", "g", "m", "g", "m", "g", "g"]

    in_loop(scenario)


def test_queued_tokens_and_predicted_delay_tell_what_waits() -> None:
    def scenario() -> None:
        bench = Bench()
        assert bench.scheduler.predicted_delay_ms == 0.0
        bench.add([10] * 10)
        bench.add([10] * 30, ServiceClass.BATCH)
        assert bench.scheduler.queued_tokens == {
            ServiceClass.STREAM: 100,
            ServiceClass.INTERACTIVE: 0,
            ServiceClass.BATCH: 300,
        }
        assert bench.scheduler.predicted_delay_ms == pytest.approx(41.0, rel=0.05)

    in_loop(scenario)
