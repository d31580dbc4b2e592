"""The second layer of the gateway: sane headers, a known key, a request within the rate.

Pure ASGI, and in front of routing: it runs before a byte of the body is read.  Everything
needs a key but what a load balancer and a reader of the documentation ask for; the exact
paths are listed, so that a route added later is closed until someone opens it.
"""

from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.caller import OPEN_CALLER, Caller
from cluster.errors import UnknownKeyError
from cluster.keys import KeyFile
from cluster.limits import RateLimits
from cluster.refusals import RefusedError
from cluster.visit import visit_of

OPEN_PATHS: Final = frozenset({"/healthz", "/readyz", "/openapi.json"})
MAX_HEADER_BYTES = 16 * 2**10  # of all together; a key, an id and a proxy's marks need 2 KB
MAX_HEADERS = 64
MAX_PATH_BYTES = 4096  # with its query; ours have 200 at most
SCHEME: Final = b"bearer "


class Access:
    """ASGI middleware that finds out who asks.

    Args:
        app: What it wraps.
        keys: The keys; None opens everything to everybody.
        rates: Counts requests per tenant.
    """

    def __init__(self, app: ASGIApp, keys: KeyFile | None, rates: RateLimits) -> None:
        self._app = app
        self._keys = keys
        self._rates = rates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request that may pass.

        Raises:
            RefusedError: Its headers are too large.
            UnknownKeyError: It carries no key, or one that nobody knows.
            RateLimitError: Its tenant has asked too often.
        """
        if scope["type"] == "http":
            _check_headers(scope)
            visit = visit_of(scope)
            visit.caller = self._recognise(scope)
            if scope["path"] not in OPEN_PATHS:
                self._rates.take_request(visit.known_caller)
        await self._app(scope, receive, send)

    def _recognise(self, scope: Scope) -> Caller | None:
        if self._keys is None:
            return OPEN_CALLER
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if not given:
            return None
        is_bearer = len(given) == 1 and given[0][: len(SCHEME)].lower() == SCHEME
        caller = self._keys.find(given[0][len(SCHEME) :].strip()) if is_bearer else None
        if caller is None:
            expected = "expected Authorization: Bearer KEY with a known key, got another"
            raise UnknownKeyError(expected + "; ask whoever runs this platform for a key")
        return caller


def _check_headers(scope: Scope) -> None:
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers)
    if size > MAX_HEADER_BYTES or len(headers) > MAX_HEADERS:
        expected = f"expected at most {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes together"
        message = f"{expected}, got {len(headers)} of {size}; send less"
        raise RefusedError(431, "HeadersTooLarge", message, reason="header")
    length = len(scope.get("raw_path") or scope["path"].encode()) + len(scope["query_string"])
    if length > MAX_PATH_BYTES:
        message = f"expected a path of at most {MAX_PATH_BYTES} bytes, got {length}"
        raise RefusedError(414, "PathTooLong", message, reason="header")
