"""How a request that fails looks over HTTP: status, name, one line, when to come back.

Every answer that is not a success is ``{"error": NAME, "message": TEXT}``.  What went
wrong inside the platform is named, never told: the text of such an error belongs into the
log.  Back-pressure is 429 and unavailability 503, both with ``Retry-After`` in seconds.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, Final

from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from cluster.errors import (
    AccessDeniedError,
    DeadlineExceededError,
    InvalidRequestError,
    JobNotDoneError,
    QueueFullError,
    RateLimitError,
    TrimoeError,
    UnavailableError,
    UnknownJobError,
    UnknownKeyError,
    UnknownModelError,
)

RETRY_AFTER_S = 1.0  # a choice: a queue of 256 requests of 4 ms each is worked off by then
INTERNAL: Final = "InternalError"
STATUS_OF_ERROR: Final[Mapping[type[TrimoeError], int]] = {  # the first that fits counts
    InvalidRequestError: 400,
    UnknownKeyError: 401,
    AccessDeniedError: 403,
    UnknownModelError: 404,
    UnknownJobError: 404,
    JobNotDoneError: 409,
    QueueFullError: 429,
    DeadlineExceededError: 504,
    UnavailableError: 503,
}
REASON_OF_ERROR: Final[Mapping[type[TrimoeError], str]] = {  # refused at the door, for metrics
    RateLimitError: "rate",
    UnknownKeyError: "key",
    AccessDeniedError: "key",
}


class Problem(BaseModel):
    """The body of every answer that is not a success."""

    error: str = Field(description="Name of the error; programs may rely on it.")
    message: str = Field(description="What was expected, what came, what to do; for people.")


class RefusedError(Exception):
    """A request that HTTP itself refuses: its body, its headers, its route.

    Args:
        status: Of the answer.
        name: Of the error.
        message: One line.
        reason: Why it was refused at the door, for metrics; empty if it passed the door.
        retry_after_s: When the same request may pass.
        headers: Further ones of the answer.
    """

    def __init__(
        self,
        status: int,
        name: str,
        message: str,
        *,
        reason: str = "",
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self._headers = headers or {}
        self.status = status
        self.name = name
        self.message = message
        self.reason = reason
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of the answer."""
        headers = dict(self._headers)
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.reason == "body":  # the rest of it may still be on its way
            headers["Connection"] = "close"
        return headers


class AsciiResponse(JSONResponse):
    """JSON in ASCII: a text that came from outside may hold what UTF-8 cannot."""

    def render(self, content: Any) -> bytes:  # noqa: ANN401 - as the base
        """Return the body."""
        return json.dumps(content).encode()


def refusal_of(error: Exception) -> RefusedError:
    """Return how an error is told to the caller."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, DeadlineExceededError) and isinstance(error.__cause__, QueueFullError):
        error = error.__cause__  # back-pressure for as long as the caller would wait
    for kind, status in STATUS_OF_ERROR.items():
        if isinstance(error, kind):
            return RefusedError(
                status,
                type(error).__name__,
                _public_message(error),
                reason=next((r for k, r in REASON_OF_ERROR.items() if isinstance(error, k)), ""),
                retry_after_s=_retry_after_s(error, status),
            )
    return RefusedError(500, INTERNAL, "the platform failed; its log tells why, by request id")


def problem_response(refusal: RefusedError) -> AsciiResponse:
    """Return the answer."""
    problem = Problem(error=refusal.name, message=refusal.message)
    return AsciiResponse(problem.model_dump(), refusal.status, dict(refusal.headers))


def _public_message(error: TrimoeError) -> str:
    if not isinstance(error, UnavailableError) or isinstance(error, RateLimitError):
        return str(error)
    if isinstance(error, DeadlineExceededError):
        if error.__cause__ is None:
            return str(error)
        first, _, _ = str(error).partition("; last failure: ")
        return f"{first}; last failure: {type(error.__cause__).__name__}"
    if isinstance(error, QueueFullError):
        return "expected room in the queue, it is full; send the request again later"
    return "expected the platform to answer, it cannot now; send the request again later"


def _retry_after_s(error: TrimoeError, status: int) -> float | None:
    if isinstance(error, RateLimitError):
        return error.retry_after_s
    return RETRY_AFTER_S if status in {429, 503} else None
