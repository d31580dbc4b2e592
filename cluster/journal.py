"""The outermost layer of the gateway: a log line, metrics and an end for every request.

Pure ASGI.  Whatever happens inside, the caller gets an answer of ours, the line and the
metrics are written, and neither holds what the request carried: routes are templates,
tenants are those of known keys, errors are names.

The line is JSON, at level INFO (WARNING for a refusal at the door, ERROR for 5xx):

    {"event": "http", "request_id": ..., "method": ..., "route": ..., "status": ...,
     "tenant": ..., "key": ..., "task": ..., "rows": ..., "bytes_in": ..., "ms": ...,
     "error": ..., "reason": ...}
"""

import json
import logging
import time
import traceback
import uuid
from collections.abc import Callable
from typing import Final, NoReturn

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.names import is_request_id
from cluster.recorder import Recorder
from cluster.refusals import INTERNAL, RefusedError, problem_response, refusal_of
from cluster.visit import Visit, begin_visit

REQUEST_ID_HEADER: Final = "X-Request-Id"
CLIENT_GONE = 499  # nginx's code for a caller who left; nobody receives it
NO_TENANT: Final = "none"
NO_ROUTE: Final = "none"
METHODS: Final = frozenset({"GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH"})


class Journal:
    """ASGI middleware that sees every request first and last.

    Args:
        app: What it wraps.
        recorder: Takes the metrics.
        log: Takes the lines.
        echo_request_id: Whether to answer with the request's id; Ray's proxy does it already.
        clock: Returns now, seconds, monotonic.
    """

    def __init__(
        self,
        app: ASGIApp,
        recorder: Recorder,
        log: logging.Logger,
        *,
        echo_request_id: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._recorder = recorder
        self._log = log
        self._echo = echo_request_id
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or pass on what is none."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._visit(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _visit(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = _header(scope, b"x-request-id")
        is_good = given is None or is_request_id(given)
        visit = Visit(given if given and is_good else uuid.uuid4().hex, self._clock())
        begin_visit(scope, visit)
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._echo:
                    header = (REQUEST_ID_HEADER.lower().encode(), visit.request_id.encode())
                    message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        try:
            try:
                if not is_good:
                    _refuse_request_id()
                await self._app(scope, receive, send_on)
            except Exception as error:
                refusal = self._refuse(visit, error)
                if status:
                    raise  # half an answer is out; the server cuts the connection
                await problem_response(refusal)(scope, receive, send_on)
        finally:
            self._close(scope, visit, status or CLIENT_GONE)

    def _refuse(self, visit: Visit, error: Exception) -> RefusedError:
        refusal = refusal_of(error)
        visit.error, visit.reason = refusal.name, refusal.reason
        if refusal.name == INTERNAL:
            frames = [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
            fields = {"event": "failure", "request_id": visit.request_id}
            kind = {"kind": type(error).__name__, "frames": frames[-12:]}
            self._log.error("%s", json.dumps(fields | kind))
        return refusal

    def _close(self, scope: Scope, visit: Visit, status: int) -> None:
        found = scope.get("route")  # a template, where routing has found one
        route = getattr(found, "path_format", getattr(found, "path", NO_ROUTE))
        elapsed_ms = (self._clock() - visit.started) * 1e3
        tenant = (visit.caller and visit.caller.tenant) or NO_TENANT
        counted = {"route": route, "status": str(status), "tenant": tenant}
        self._recorder.record("trimoe_http_requests_total", 1, counted)
        self._recorder.record("trimoe_http_ms", elapsed_ms, {"route": route})
        if visit.reason:
            self._recorder.record("trimoe_refused_total", 1, {"reason": visit.reason})
        level = logging.ERROR if status in range(500, 600) else logging.INFO
        line = {
            "event": "http",
            "request_id": visit.request_id,
            "method": scope["method"] if scope["method"] in METHODS else "other",
            **counted,
            "key": visit.caller.key_id if visit.caller else "",
            "task": visit.task,
            "rows": visit.num_rows,
            "bytes_in": visit.bytes_in,
            "ms": round(elapsed_ms, 1),
            "error": visit.error,
            "reason": visit.reason,
        }
        self._log.log(logging.WARNING if visit.reason else level, "%s", json.dumps(line))


def _refuse_request_id() -> NoReturn:
    message = f"{REQUEST_ID_HEADER}: expected 1 to 128 letters, digits or ._:/+=@-, got another"
    raise RefusedError(400, "InvalidRequestError", message, reason="header")


def _header(scope: Scope, name: bytes) -> str | None:
    found = [value for key, value in scope["headers"] if key == name]
    return found[0].decode("latin-1") if found else None
