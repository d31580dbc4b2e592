"""When and how often a request is sent again: within the deadline that is left."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from cluster.errors import DeadlineExceededError, UnavailableError
from cluster.schemas import InferRequest, InferResponse

Attempt = Callable[[InferRequest], Awaitable[InferResponse]]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Pauses between attempts, and where time comes from.

    Args:
        first_pause_s: Pause after the first failure; doubles with each further one.
        longest_pause_s: No pause is longer.
        clock: Returns now, seconds, monotonic.
        sleep: Waits that many seconds.
    """

    first_pause_s: float = 0.01
    longest_pause_s: float = 0.5
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
                    return await attempt(replace(request, deadline_ms=left_s * 1e3))
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
