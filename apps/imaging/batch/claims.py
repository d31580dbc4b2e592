"""What became of every case so far: the state that the events of a journal add up to.

    open -> claimed -> result
             |-> failed, unavailable, lost, orphaned, released -> open again

Rules:
    1. A case has at most one open claim, and at most one result.
    2. Each claim has a fence, one higher than that of the claim before it, of whatever case.
    3. A claim ends by an event that carries its fence.  So a worker that was presumed dead,
       and whose case another has taken over, can record nothing of it any more.
    4. A case that failed or lost its worker too often is exhausted, to be quarantined.
    5. A case under which a process ended is suspect: it comes after all others and runs alone.

Pure: knows neither files nor clocks.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Self

from apps.imaging.batch.process import Record
from apps.imaging.reasons import Reason
from cluster.errors import TrimoeError


class FencedError(TrimoeError):
    """The claim is not open any more: another has taken over, or the case has its result."""


class Kind(StrEnum):
    """What happened to a case."""

    CLAIM = "claim"
    RESULT = "result"
    FAILED = "failed"  # its process raised, or took too long
    UNAVAILABLE = "unavailable"  # the platform did not answer
    LOST = "lost"  # its worker ended, or fell silent, while the driver lived
    ORPHANED = "orphaned"  # its worker ended with the driver: not the case's fault
    RELEASED = "released"  # given back by a worker that was told to stop


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a journal.

    Args:
        kind: What happened.
        case_id: To which case.
        fence: Of the claim it opens or ends.
        worker: Who claims; of a claim only.
        reason: Why the claim ended without a result.
        result: Of the case: ``summary``, ``files`` and ``attempts``, as JSON.
        at_s: Time of day, seconds since 1970; for people, nothing is decided by it.
    """

    kind: Kind
    case_id: str
    fence: int
    worker: str = ""
    reason: Reason | None = None
    result: Record | None = None
    at_s: float = 0.0

    def as_record(self) -> dict[str, Any]:
        """Return it as JSON."""
        record: dict[str, Any] = {
            "kind": self.kind.value,
            "case": self.case_id,
            "fence": self.fence,
            "at_s": round(self.at_s, 3),
        }
        if self.worker:
            record["worker"] = self.worker
        if self.reason is not None:
            record["reason"] = asdict(self.reason)
        if self.result is not None:
            record["result"] = self.result
        return record

    @classmethod
    def from_record(cls, record: Record) -> Self:
        """Return what ``as_record`` made JSON of."""
        reason = record.get("reason")
        return cls(
            Kind(record["kind"]),
            record["case"],
            record["fence"],
            record.get("worker", ""),
            None if reason is None else Reason(**reason),
            record.get("result"),
            record["at_s"],
        )


@dataclass(frozen=True, slots=True)
class RetryLimits:
    """How often a case is tried.

    Args:
        max_attempts: Failures and lost workers together, then it is exhausted.
        max_unavailable: Attempts to which the platform gave no answer, likewise.
    """

    max_attempts: int = 3
    max_unavailable: int = 10


@dataclass(frozen=True, slots=True)
class CaseState:
    """One case so far.

    Args:
        num_claims: Attempts that began.
        fence: Of the last of them; 0 before the first.
        holder: Worker of the open claim; empty if none is open.
        num_failed: Attempts that failed.
        num_lost: Attempts that took their worker with them.
        num_orphaned: Attempts that ended with the driver.
        num_unavailable: Attempts without an answer of the platform.
        cause: Why the last attempt ended, where it tells.
        result: ``summary``, ``files`` and ``attempts``, as JSON; None before it is there.
    """

    num_claims: int = 0
    fence: int = 0
    holder: str = ""
    num_failed: int = 0
    num_lost: int = 0
    num_orphaned: int = 0
    num_unavailable: int = 0
    cause: Reason | None = None
    result: Record | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether it may be claimed."""
        return not self.holder and self.result is None

    @property
    def is_suspect(self) -> bool:
        """Whether a process ended under it."""
        return self.num_lost + self.num_orphaned > 0

    def is_exhausted(self, limits: RetryLimits) -> bool:
        """Tell whether it was tried too often."""
        return (
            self.num_failed + self.num_lost >= limits.max_attempts
            or self.num_unavailable >= limits.max_unavailable
        )


class Claims:
    """The state of all cases of a batch.

    Args:
        case_ids: All of them.

    Attributes:
        last_fence: The highest so far; 0 before the first claim.
        busy_s: How long cases were under way, up to the last event; pauses of the batch left out.
    """

    def __init__(self, case_ids: Iterable[str]) -> None:
        self._states = dict.fromkeys(case_ids, CaseState())
        self._held: dict[str, CaseState] = {}
        self.last_fence = 0
        self.busy_s = 0.0
        self._last_at_s = 0.0

    def __getitem__(self, case_id: str) -> CaseState:
        return self._states[case_id]

    @property
    def held(self) -> Mapping[str, CaseState]:
        """Cases that are claimed now."""
        return self._held

    def check(self, event: Event) -> None:
        """Pass an event that may follow.

        Raises:
            FencedError: It belongs to a claim that is not open, or claims what is not free.
            ValueError: No such case, or a fence that does not follow the last.
        """
        state = self._states.get(event.case_id)
        if state is None:
            message = f"case {event.case_id!r:.80}: expected one of this batch"
            raise ValueError(message)
        if event.kind is Kind.CLAIM:
            if not state.is_waiting:
                message = (
                    f"case {event.case_id}: expected it to be free, got a claim beside another"
                )
                raise FencedError(message)
            if event.fence != self.last_fence + 1 or not event.worker:
                message = f"claim: expected fence {self.last_fence + 1} and a worker, got {event}"
                raise ValueError(message)
        elif not self.is_current(event.case_id, event.fence):
            message = (
                f"case {event.case_id}: expected the open claim, fence {state.fence}, got "
                f"{event.kind} of fence {event.fence}; another has taken over"
            )
            raise FencedError(message)
        elif event.kind is Kind.RESULT and event.result is None:
            message = f"case {event.case_id}: expected a result with the event"
            raise ValueError(message)

    def apply(self, event: Event) -> None:
        """Take an event in.

        Raises:
            FencedError, ValueError: See ``check``; nothing has changed.
        """
        self.check(event)
        if self._held and event.kind is not Kind.ORPHANED:
            self.busy_s += max(0.0, event.at_s - self._last_at_s)
        self._last_at_s = event.at_s
        state = _follow(self._states[event.case_id], event)
        self._states[event.case_id] = state
        if event.kind is Kind.CLAIM:
            self.last_fence = event.fence
            self._held[event.case_id] = state
        else:
            del self._held[event.case_id]

    def is_current(self, case_id: str, fence: int) -> bool:
        """Tell whether the claim of that fence is open."""
        held = self._held.get(case_id)
        return held is not None and held.fence == fence

    def choose(self, case_ids: Sequence[str], limits: RetryLimits, *, alone: bool) -> str | None:
        """Return the case to try next, None if there is none.

        Args:
            case_ids: Those to choose from, in order.
            limits: Exhausted cases are left out.
            alone: Whether nothing runs beside it, as suspects need.
        """
        waiting = [
            (state.is_suspect, state.num_claims, position)
            for position, state in enumerate(map(self.__getitem__, case_ids))
            if state.is_waiting
            and not state.is_exhausted(limits)
            and (alone or not state.is_suspect)
        ]
        return case_ids[min(waiting)[-1]] if waiting else None

    def exhausted(self, case_ids: Sequence[str], limits: RetryLimits) -> Sequence[str]:
        """Return those that were tried too often and have no result yet."""
        return [
            case_id
            for case_id in case_ids
            if self[case_id].is_waiting and self[case_id].is_exhausted(limits)
        ]

    def num_settled(self, case_ids: Iterable[str]) -> int:
        """Return how many have their result."""
        return sum(self[case_id].result is not None for case_id in case_ids)


def _follow(state: CaseState, event: Event) -> CaseState:
    """Return the state after an event that may follow."""
    if event.kind is Kind.CLAIM:
        return replace(
            state, num_claims=state.num_claims + 1, fence=event.fence, holder=event.worker
        )
    if event.kind is Kind.RESULT:
        return replace(state, holder="", result=event.result)
    return replace(
        state,
        holder="",
        num_failed=state.num_failed + (event.kind is Kind.FAILED),
        num_lost=state.num_lost + (event.kind is Kind.LOST),
        num_orphaned=state.num_orphaned + (event.kind is Kind.ORPHANED),
        num_unavailable=state.num_unavailable + (event.kind is Kind.UNAVAILABLE),
        cause=event.reason or state.cause,
    )
