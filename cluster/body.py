"""The third layer of the gateway: the whole body, within its limits, or a refusal.

Pure ASGI.  The body is read here, before routing, because what comes behind needs all of
it anyway; so no handler starts for a body that is too long, too slow, of a type nobody
reads, or one too many.  A length is believed only to refuse: what counts is what came.

Slow senders: at every moment the body may be late by ``grace_s`` against
``min_bytes_per_s``, and no body takes longer than ``max_s``.  Headers that trickle in are
the HTTP server's matter, in front of this.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster import wire
from cluster.limits import BytesInFlight
from cluster.refusals import RefusedError
from cluster.visit import Visit, visit_of

TYPES: Final = (wire.BINARY_TYPE, wire.JSON_TYPE)
MAX_DIGITS = 20  # of a length; more than 2**64 is too much without counting further
METHODS_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """How long, how slow and how many bodies may be.

    Args:
        max_bytes: Of a binary body.
        max_json_bytes: Of a JSON body; 4 MiB hold the event loop for .2 to .3 s (one core,
            2026-11-24), the same rows in the binary form for a few milliseconds.
        min_bytes_per_s: A slower sender is cut off.
        grace_s: Lateness that is forgiven.
        max_s: No body may take longer.
        total_bytes: Of all bodies at once.
        tenant_bytes: Of one tenant's bodies at once.
    """

    max_bytes: int = wire.MAX_MESSAGE_BYTES
    max_json_bytes: int = 4 * 2**20
    min_bytes_per_s: float = 8192.0  # a mobile link on a bad day
    grace_s: float = 5.0
    max_s: float = 120.0
    total_bytes: int = 512 * 2**20
    tenant_bytes: int = 256 * 2**20


class WholeBody:
    """ASGI middleware that reads the body of a request.

    Args:
        app: What it wraps.
        limits: What is accepted.
        clock: Returns now, seconds, monotonic.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: BodyLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._limits = limits
        self._clock = clock
        self._in_flight = BytesInFlight(limits.total_bytes, limits.tenant_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request with its body at hand.

        Raises:
            RefusedError: 408, 411 to 415: the body is not acceptable.
            QueueFullError: Too many bodies at once.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        max_bytes = self._check_announced(scope)
        if scope["method"] not in METHODS_WITH_BODY:
            await self._app(scope, receive, send)
            return
        visit = visit_of(scope)
        with self._in_flight.reserve(visit.known_caller.tenant or "") as take:
            body = await self._read(visit, receive, max_bytes, take)
            await self._app(scope, _replay(body, receive), send)

    def _check_announced(self, scope: Scope) -> int:
        """Return the bytes allowed, of a request whose headers announce no more."""
        form = _only(scope, b"content-type", b"").decode("latin-1").partition(";")[0]
        form = form.strip().lower()
        limits = self._limits
        max_bytes = limits.max_json_bytes if form == wire.JSON_TYPE else limits.max_bytes
        announced = _only(scope, b"content-length", b"0")
        if not announced.isdigit():
            message = f"Content-Length: expected digits, got {announced!r:.40}"
            raise RefusedError(400, "InvalidRequestError", message, reason="body")
        if int(announced[:MAX_DIGITS]) > max_bytes:
            raise _too_large(max_bytes)
        if scope["method"] in METHODS_WITH_BODY:
            _check_form(form, _only(scope, b"content-encoding", b"identity"))
        return max_bytes

    async def _read(
        self, visit: Visit, receive: Receive, max_bytes: int, take: Callable[[int], None]
    ) -> bytes:
        chunks: list[bytes] = []
        started = self._clock()
        more = True
        while more:
            message = await self._next(receive, started, visit.bytes_in)
            if message["type"] == "http.disconnect":
                message_text = "expected the rest of the body, the caller hung up"
                raise RefusedError(400, "ClientGone", message_text, reason="body")
            chunk = message.get("body", b"")
            visit.bytes_in += len(chunk)
            if visit.bytes_in > max_bytes:
                raise _too_large(max_bytes)
            take(len(chunk))
            chunks.append(chunk)
            more = message.get("more_body", False)
        return b"".join(chunks)

    async def _next(self, receive: Receive, started: float, bytes_in: int) -> Message:
        limits = self._limits
        allowed_s = min(limits.grace_s + bytes_in / limits.min_bytes_per_s, limits.max_s)
        left_s = started + allowed_s - self._clock()
        try:
            async with asyncio.timeout(max(left_s, 0)):
                return await receive()
        except TimeoutError:
            message = (
                f"expected a body of at least {limits.min_bytes_per_s:.0f} bytes per second within "
                f"{limits.max_s:.0f} s, got {bytes_in} bytes in {allowed_s:.1f} s; send faster"
            )
            raise RefusedError(408, "BodyTooSlow", message, reason="body") from None


def _only(scope: Scope, name: bytes, default: bytes) -> bytes:
    """Return the value of a header that may come once: layers that choose differently are a hole."""
    found = [value for key, value in scope["headers"] if key == name]
    if len(found) > 1:
        message = f"{name.decode()}: expected this header once, got it {len(found)} times"
        raise RefusedError(400, "InvalidRequestError", message, reason="header")
    return found[0] if found else default


def _check_form(form: str, encoding: bytes) -> None:
    if form not in TYPES:
        message = f"expected content type {' or '.join(TYPES)}, got {form!r:.80}"
        raise RefusedError(415, "UnsupportedMediaType", message, reason="body")
    if encoding.strip().lower() != b"identity":
        message = f"Content-Encoding: expected none, got {encoding!r:.40}; send it as it is"
        raise RefusedError(415, "UnsupportedMediaType", message, reason="body")


def _too_large(max_bytes: int) -> RefusedError:
    message = f"expected a body of at most {max_bytes} bytes, got more; send less"
    return RefusedError(413, "BodyTooLarge", message, reason="body")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a receive that hands out the body once and then listens for the caller's leaving."""
    is_out = False

    async def replay() -> Message:
        nonlocal is_out
        if is_out:
            return await receive()
        is_out = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
