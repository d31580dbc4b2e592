"""Retries happen within the deadline that is left, for the right errors, in injected time."""

import asyncio
from collections.abc import Callable, Sequence
from typing import cast

import pytest

from cluster.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    QueueFullError,
    ReplicaLostError,
    TrimoeError,
)
from cluster.retry import RecentRefusals, RetryPolicy
from cluster.schemas import InferRequest, InferResponse, ServiceClass

ANSWER = cast("InferResponse", object())


class Script:
    """Fails in the given ways, then answers; keeps what it was asked and when."""

    def __init__(self, errors: Sequence[TrimoeError], attempt_s: float = 0.0) -> None:
        self.errors = list(errors)
        self.now = 0.0
        self.attempt_s = attempt_s
        self.pauses: list[float] = []
        self.asked: list[InferRequest] = []
        self.policy = RetryPolicy(clock=lambda: self.now, sleep=self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    async def attempt(self, request: InferRequest) -> InferResponse:
        self.asked.append(request)
        self.now += self.attempt_s
        if self.errors:
            raise self.errors.pop(0)
        return ANSWER

    def send(self, request: InferRequest) -> InferResponse:
        return asyncio.run(self.policy.send(request, self.attempt))


Make = Callable[..., InferRequest]


def test_lost_replica_and_back_pressure_are_tried_again_with_the_deadline_left(
    make_request: Make,
) -> None:
    script = Script([ReplicaLostError("died"), QueueFullError("full")], attempt_s=0.1)
    assert script.send(make_request(deadline_ms=1000.0)) is ANSWER
    assert [round(each.deadline_ms) for each in script.asked] == [1000, 890, 770]
    assert {each.request_id for each in script.asked} == {"r0"}
    assert script.pauses == [0.01, 0.02]


def test_pauses_stop_growing_and_the_deadline_ends_it_naming_the_last_failure(
    make_request: Make,
) -> None:
    script = Script([ReplicaLostError("died again")] * 100)
    with pytest.raises(DeadlineExceededError, match="within 3000 ms; last failure: died again"):
        script.send(make_request(deadline_ms=3000.0))
    assert max(script.pauses) == 0.5
    assert script.now == pytest.approx(3.0)


@pytest.mark.parametrize("error", [InvalidRequestError("no"), DeadlineExceededError("late")])
def test_final_errors_are_not_tried_again(make_request: Make, error: TrimoeError) -> None:
    script = Script([error])
    with pytest.raises(type(error)):
        script.send(make_request())
    assert len(script.asked) == 1


def test_silence_ends_at_the_deadline(make_request: Make) -> None:
    async def silent(_: InferRequest) -> InferResponse:
        await asyncio.sleep(30)
        return ANSWER

    with pytest.raises(DeadlineExceededError, match="none, still waiting"):
        asyncio.run(RetryPolicy().send(make_request(deadline_ms=20.0), silent))


class SilentReplica:
    """Never answers the first attempts; then does as it is told."""

    def __init__(self, num_silent: int, *then: TrimoeError) -> None:
        self.num_silent, self.errors = num_silent, list(then)
        self.asked: list[InferRequest] = []
        self.num_dropped = 0

    async def attempt(self, request: InferRequest) -> InferResponse:
        self.asked.append(request)
        if len(self.asked) > self.num_silent:
            if self.errors:
                raise self.errors.pop(0)
            return ANSWER
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            self.num_dropped += 1
            raise
        return ANSWER

    def send(self, request: InferRequest) -> InferResponse:
        return asyncio.run(RetryPolicy(silent_share=0.5).send(request, self.attempt))


@pytest.mark.parametrize(("num_silent", "lefts_ms"), [(1, [400, 200]), (2, [400, 200, 100])])
def test_silence_gets_another_attempt_with_the_time_left_and_is_dropped(
    make_request: Make, num_silent: int, lefts_ms: list[int]
) -> None:
    replica = SilentReplica(num_silent)
    assert replica.send(make_request(deadline_ms=400.0)) is ANSWER
    found_ms = [each.deadline_ms for each in replica.asked]
    assert found_ms == pytest.approx(lefts_ms, abs=60)
    assert {each.request_id for each in replica.asked} == {"r0"}
    assert replica.num_dropped == num_silent


def test_a_failure_beside_a_silent_attempt_is_not_the_end(make_request: Make) -> None:
    replica = SilentReplica(1, DeadlineExceededError("cannot be met"))
    assert replica.send(make_request(deadline_ms=400.0)) is ANSWER
    assert len(replica.asked) == 3


def test_the_silent_one_may_answer_when_all_others_have_failed(make_request: Make) -> None:
    num_asked = 0

    async def attempt(_: InferRequest) -> InferResponse:
        nonlocal num_asked
        num_asked += 1
        if num_asked > 1:
            raise ReplicaLostError("died")
        await asyncio.sleep(0.32)
        return ANSWER

    policy = RetryPolicy(silent_share=0.5)
    assert asyncio.run(policy.send(make_request(deadline_ms=400.0), attempt)) is ANSWER
    assert num_asked == 3


def test_a_batch_request_is_never_in_two_places(make_request: Make) -> None:
    replica = SilentReplica(1)
    with pytest.raises(DeadlineExceededError, match="none, still waiting"):
        replica.send(make_request(deadline_ms=40.0, service_class=ServiceClass.BATCH))
    assert len(replica.asked) == 1


def test_a_quick_failure_is_no_silence(make_request: Make) -> None:
    replica = SilentReplica(0, ReplicaLostError("died"))
    assert replica.send(make_request()) is ANSWER
    assert len(replica.asked) == 2


def test_what_was_just_refused_is_not_sent_again_for_as_long_as_the_refusal_said(
    make_request: Make,
) -> None:
    now = 10.0
    refusals = RecentRefusals(lambda: now)
    request = make_request(deadline_ms=50.0)
    refusals.note(request, DeadlineExceededError("needs 80 ms", 0.03))
    with pytest.raises(DeadlineExceededError, match="again in 30 ms"):
        refusals.check(request)
    refusals.check(make_request(deadline_ms=60.0))  # has more time
    refusals.check(make_request(deadline_ms=50.0, service_class=ServiceClass.INTERACTIVE))
    now += 0.031
    refusals.check(request)
    refusals.note(request, DeadlineExceededError("passed"))  # says nothing of the queue
    refusals.check(request)
