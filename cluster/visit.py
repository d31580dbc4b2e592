"""What the gateway knows of one HTTP request while it lasts: for its log line and metrics.

Never what the request carries: no feature, no body, no path that a caller made up.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, Final

from cluster.caller import Caller
from cluster.errors import UnknownKeyError

_KEY: Final = "trimoe.visit"
Scope = MutableMapping[str, Any]


@dataclass(slots=True)
class Visit:
    """One HTTP request.

    Args:
        request_id: From its header, or made up.
        started: When its first byte was seen, seconds, monotonic.
        caller: Who asks, once that is known.
        task: Which task is asked for.
        num_rows: How many rows of features.
        bytes_in: Length of the body so far.
        error: Name of the error it ended with.
        reason: Why it was refused at the door.
    """

    request_id: str
    started: float
    caller: Caller | None = None
    task: str = ""
    num_rows: int = 0
    bytes_in: int = 0
    error: str = ""
    reason: str = ""

    @property
    def known_caller(self) -> Caller:
        """Who asks.

        Raises:
            UnknownKeyError: Nobody that is known.
        """
        if self.caller is None:
            message = "expected the header Authorization: Bearer KEY, got none; send your API key"
            raise UnknownKeyError(message)
        return self.caller


def begin_visit(scope: Scope, visit: Visit) -> None:
    """Attach the visit to its request."""
    scope[_KEY] = visit


def visit_of(scope: Scope) -> Visit:
    """Return the visit of a request."""
    visit: Visit = scope[_KEY]
    return visit
