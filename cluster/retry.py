"""When and how often a request is sent again: within the deadline that is left.

A failure is followed by another attempt after a pause.  Silence is followed by another one beside
the first: a replica whose machine is gone without a word never answers, and the router sends it
requests until the head believes in its end.  The first answer counts.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from cluster.errors import DeadlineExceededError, UnavailableError
from cluster.schemas import InferRequest, InferResponse, ServiceClass

# The router may send the second to the same replica, and looks for others meanwhile.
MAX_BESIDE = 3

MAX_HOLD_S = 0.1  # a refusal is believed no longer: other replicas may have room

Attempt = Callable[[InferRequest], Awaitable[InferResponse]]


class RecentRefusals:
    """What was just refused for its deadline, so that the like is not sent to be refused too.

    A refusal says when the queue will have drained far enough.  Until then the caller is told
    at once; an overloaded replica would otherwise spend its time on receiving and refusing.

    Args:
        clock: Returns now, seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._found: dict[tuple[str, ServiceClass], tuple[float, float]] = {}

    def check(self, request: InferRequest) -> None:
        """Pass a request that may be sent.

        Raises:
            DeadlineExceededError: One like it, with as much time, was just refused.
        """
        until_s, deadline_ms = self._found.get(_kind_of(request), (0.0, 0.0))
        wait_s = until_s - self._clock()
        if wait_s > 0 and request.deadline_ms <= deadline_ms:
            message = (
                f"request {request.request_id}: expected room within {request.deadline_ms:.0f} ms, "
                f"one like it was just refused; send less, or again in {wait_s * 1e3:.0f} ms"
            )
            raise DeadlineExceededError(message, wait_s)

    def note(self, request: InferRequest, error: DeadlineExceededError) -> None:
        """Remember a refusal."""
        if error.retry_after_s > 0:
            until_s = self._clock() + min(error.retry_after_s, MAX_HOLD_S)
            self._found[_kind_of(request)] = until_s, request.deadline_ms


def _kind_of(request: InferRequest) -> tuple[str, ServiceClass]:
    return request.task, request.service_class


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Pauses between attempts, and where time comes from.

    Args:
        first_pause_s: Pause after the first failure; doubles with each further one.
        longest_pause_s: No pause is longer.
        silent_share: Part of the time left after which a silent attempt gets another one beside
            it; None: never.  Batch requests never get one: they wait long by design.
        clock: Returns now, seconds, monotonic.
        sleep: Waits that many seconds.
    """

    first_pause_s: float = 0.01
    longest_pause_s: float = 0.5
    silent_share: float | None = None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    async def send(self, request: InferRequest, attempt: Attempt) -> InferResponse:
        """Send until it is answered, refused for good, or the deadline has passed.

        Each attempt carries the deadline that is left, and the same ``request_id``.

        Raises:
            DeadlineExceededError: The deadline passed; names the last failure.
            InvalidRequestError: From the attempt; never sent again.
        """
        started, pause_s = self.clock(), self.first_pause_s
        last_error: Exception | None = None
        while (left_s := request.deadline_ms / 1e3 - (self.clock() - started)) > 0:
            try:
                async with asyncio.timeout(left_s):
                    return await self._ask(request, attempt, left_s)
            except TimeoutError:
                break
            except DeadlineExceededError:
                raise
            except UnavailableError as error:
                last_error = error
                await self.sleep(min(pause_s, max(left_s, 0)))
                pause_s = min(2 * pause_s, self.longest_pause_s)
        message = (
            f"request {request.request_id}: no answer within {request.deadline_ms:.0f} ms; "
            f"last failure: {last_error or 'none, still waiting'}"
        )
        raise DeadlineExceededError(message) from last_error

    async def _ask(self, request: InferRequest, attempt: Attempt, left_s: float) -> InferResponse:
        """Make one attempt, and others beside it while all are silent.

        A failure counts only when no other attempt waits.
        """
        if self.silent_share is None or request.service_class is ServiceClass.BATCH:
            return await attempt(replace(request, deadline_ms=left_s * 1e3))
        loop = asyncio.get_running_loop()
        end_s, num_left = loop.time() + left_s, MAX_BESIDE
        waiting: set[asyncio.Task[InferResponse]] = set()
        try:
            while True:
                if num_left > 0:
                    left_s, num_left = end_s - loop.time(), num_left - 1
                    another = attempt(replace(request, deadline_ms=max(left_s, 0.0) * 1e3))
                    waiting.add(asyncio.ensure_future(another))
                silent_s = self.silent_share * left_s if num_left > 0 else None
                done, waiting = await asyncio.wait(
                    waiting, timeout=silent_s, return_when=asyncio.FIRST_COMPLETED
                )
                ended = sorted(done, key=lambda each: each.exception() is not None)
                if ended and (ended[0].exception() is None or not waiting):
                    return ended[0].result()
        finally:
            for each in waiting:
                each.cancel()
