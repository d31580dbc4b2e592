"""The state a journal adds up to, without any file."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.imaging.batch.claims import Claims, Event, FencedError, Kind, RetryLimits
from apps.imaging.reasons import Reason

CASES = ("a", "b", "c")
RESULT = {"summary": {"status": "correct"}, "files": {}, "attempts": 1}
ENDS = [kind for kind in Kind if kind not in (Kind.CLAIM, Kind.RESULT)]


def claim(claims: Claims, case_id: str, at_s: float = 0.0) -> int:
    fence = claims.last_fence + 1
    claims.apply(Event(Kind.CLAIM, case_id, fence, worker="d-0", at_s=at_s))
    return fence


@given(
    st.lists(
        st.tuples(st.sampled_from(Kind), st.sampled_from(CASES), st.integers(0, 8)), max_size=60
    )
)
def test_whatever_is_tried_each_case_gets_one_result_of_its_last_claim(
    tried: list[tuple[Kind, str, int]],
) -> None:
    """Events out of order, of old fences and of cases that are done are refused."""
    claims, taken = Claims(CASES), []
    for kind, case_id, fence in tried:
        event = Event(kind, case_id, fence)
        if kind is Kind.CLAIM:
            event = replace(event, worker="d-0", fence=claims.last_fence + 1)
        if kind is Kind.RESULT:
            event = replace(event, result=RESULT)
        before = claims[case_id]
        try:
            claims.apply(event)
        except FencedError:
            assert claims[case_id] == before
        else:
            taken.append(event)
    fences = [event.fence for event in taken if event.kind is Kind.CLAIM]
    assert fences == list(range(1, len(fences) + 1))
    for case_id in CASES:
        own = [event for event in taken if event.case_id == case_id]
        assert [event.kind is Kind.CLAIM for event in own] == [i % 2 == 0 for i in range(len(own))]
        assert all(
            end.fence == start.fence for start, end in zip(own[::2], own[1::2], strict=False)
        )
        results = [event for event in own if event.kind is Kind.RESULT]
        assert len(results) == (claims[case_id].result is not None) <= 1
        assert not results or own[-1] is results[0]


def test_a_worker_presumed_dead_cannot_record_a_result() -> None:
    claims = Claims(CASES)
    first = claim(claims, "a")
    claims.apply(Event(Kind.LOST, "a", first))
    second = claim(claims, "a")
    with pytest.raises(FencedError, match="another has taken over"):
        claims.apply(Event(Kind.RESULT, "a", first, result=RESULT))
    claims.apply(Event(Kind.RESULT, "a", second, result=RESULT))
    with pytest.raises(FencedError):
        claims.apply(Event(Kind.RESULT, "a", second, result=RESULT))


@pytest.mark.parametrize(
    "event",
    [
        Event(Kind.CLAIM, "z", 1, worker="d-0"),
        Event(Kind.CLAIM, "a", 2, worker="d-0"),
        Event(Kind.CLAIM, "a", 1),
    ],
    ids=["unknown case", "fence too high", "no worker"],
)
def test_an_event_that_makes_no_sense_is_refused(event: Event) -> None:
    with pytest.raises(ValueError, match="expected"):
        Claims(CASES).apply(event)


def test_failures_and_lost_workers_exhaust_a_case_but_nobodys_fault_does_not() -> None:
    claims, limits = Claims(CASES), RetryLimits(max_attempts=3, max_unavailable=4)
    for kind in (Kind.FAILED, Kind.LOST, Kind.ORPHANED, Kind.ORPHANED, Kind.RELEASED):
        claims.apply(Event(kind, "a", claim(claims, "a")))
    assert claims.exhausted(CASES, limits) == []
    claims.apply(Event(Kind.FAILED, "a", claim(claims, "a"), reason=Reason("X", "third")))
    assert claims.exhausted(CASES, limits) == ["a"]
    assert claims["a"].cause == Reason("X", "third")
    for _ in range(4):
        assert claims.exhausted(["b"], limits) == []
        claims.apply(Event(Kind.UNAVAILABLE, "b", claim(claims, "b")))
    assert claims.exhausted(CASES, limits) == ["a", "b"]
    assert claims.choose(CASES, limits, alone=True) == "c"


def test_suspects_come_last_and_alone() -> None:
    claims, limits = Claims(CASES), RetryLimits()
    claims.apply(Event(Kind.LOST, "a", claim(claims, "a")))
    claims.apply(Event(Kind.FAILED, "b", claim(claims, "b")))
    assert claims.choose(CASES, limits, alone=True) == "c"
    claim(claims, "c")
    assert claims.choose(CASES, limits, alone=True) == "b"
    claim(claims, "b")
    assert claims.choose(CASES, limits, alone=False) is None
    assert claims.choose(CASES, limits, alone=True) == "a"


def test_time_counts_while_cases_are_under_way_and_not_while_the_batch_is_down() -> None:
    claims = Claims(CASES)
    fence = claim(claims, "a", at_s=100.0)
    claims.apply(Event(Kind.RESULT, "a", fence, result=RESULT, at_s=103.0))
    fence = claim(claims, "b", at_s=110.0)  # nothing ran before it
    claims.apply(Event(Kind.ORPHANED, "b", fence, at_s=500.0))  # found by the next driver
    fence = claim(claims, "b", at_s=501.0)
    claims.apply(Event(Kind.RESULT, "b", fence, result=RESULT, at_s=505.0))
    assert claims.busy_s == 7.0


@pytest.mark.parametrize("kind", ENDS)
def test_an_event_survives_json(kind: Kind) -> None:
    event = Event(kind, "a", 3, reason=Reason("CODE", "why", 1.5), at_s=12.5)
    assert Event.from_record(event.as_record()) == event
