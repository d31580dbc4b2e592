"""The console over HTTP: pages, and the JSON they poll.

    GET  /console/, machine, alerts, rollouts, drift, ledger, audit    the pages
    GET  /console/static/...                                           style and scripts
    GET  /console/api/fleet, machine, alerts, rollouts, drift, ledger, audit
    POST /console/api/alerts/<agent>/<n>/acknowledgement               {"name": who}

A decision over a rollout goes to ``/fleet/rollouts/<n>/decisions`` like any other: what counts
is the operator's signature, which the browser makes with a key that never leaves it.
"""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from apps.console.origin import StrictHeaders, check_same_origin
from apps.console.views import Views
from apps.maintenance.sync.control import Control
from cluster.errors import AccessDeniedError, ConfigurationError, InvalidRequestError

PAGES = ("machine", "alerts", "rollouts", "drift", "ledger", "audit")  # beside the overview
MAX_BODY_BYTES = 4096
MAX_HOURS = 366 * 24
_FILES = Path(__file__).parent / "pages"
_STATUS_OF: Mapping[type[Exception], HTTPStatus] = {
    InvalidRequestError: HTTPStatus.BAD_REQUEST,
    AccessDeniedError: HTTPStatus.FORBIDDEN,
    ConfigurationError: HTTPStatus.CONFLICT,
}
Text = Annotated[str, Query(max_length=200)]
Hours = Annotated[float, Query(gt=0, le=MAX_HOURS)]


def add_console(app: FastAPI, control: Control, clock: Callable[[], float] = time.time) -> None:
    """Add the console of a fleet to an application.

    Args:
        app: Gets everything below ``/console``, and a way there from its root.
        control: Of the fleet.
        clock: Returns now, seconds since 1970; that of the control.
    """
    console = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    console.add_middleware(StrictHeaders)
    _add_errors(console)
    _add_pages(console)
    _add_figures(console, Views(control, clock))
    app.mount("/console", console)

    @app.get("/", include_in_schema=False)
    def root() -> RedirectResponse:
        return RedirectResponse("console/")


def _add_pages(console: FastAPI) -> None:
    """Add what the browser loads once."""
    console.mount("/static", StaticFiles(directory=_FILES), name="static")

    def page() -> FileResponse:
        return FileResponse(_FILES / "page.html")

    for path in ("/", *(f"/{name}" for name in PAGES)):
        console.get(path)(page)


def _add_figures(console: FastAPI, views: Views) -> None:
    """Add what the pages ask again and again."""

    @console.get("/api/fleet")
    def fleet(find: Text = "") -> Mapping[str, Any]:
        return views.fleet(find.strip())

    @console.get("/api/machine")
    def machine(agent: Text, machine: Text, hours: Hours = 168) -> Mapping[str, Any]:
        return views.machine(agent, machine, hours)

    for name in ("alerts", "rollouts", "drift", "ledger", "audit"):
        console.get(f"/api/{name}")(getattr(views, name))

    @console.post("/api/alerts/{agent}/{seq}/acknowledgement")
    async def acknowledge(agent: str, seq: int, request: Request) -> Mapping[str, Any]:
        check_same_origin(request.headers)
        name = (await _body(request)).get("name")
        if not isinstance(name, str):
            message = "name: expected text, who acknowledges"
            raise InvalidRequestError(message)
        return await run_in_threadpool(views.acknowledge, agent, seq, name)


def _add_errors(console: FastAPI) -> None:
    """Answer every error with one line."""

    def answer(status: int, text: str) -> JSONResponse:
        return JSONResponse({"message": text}, status)

    def of(status: HTTPStatus) -> Callable[[Request, Exception], JSONResponse]:
        return lambda _, error: answer(status, str(error))

    for kind, status in _STATUS_OF.items():
        console.add_exception_handler(kind, of(status))

    @console.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return answer(HTTPStatus.BAD_REQUEST, f"{first['loc'][-1]}: {first['msg']}")

    @console.exception_handler(HTTPException)
    def refused(_: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail))


async def _body(request: Request) -> Mapping[str, Any]:
    """Return a small JSON object.

    Raises:
        InvalidRequestError: It is something else.
    """
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            message = f"body: expected {MAX_BODY_BYTES} bytes at most"
            raise InvalidRequestError(message)
    found = None
    with suppress(ValueError):
        found = json.loads(data)
    if request.headers.get("content-type") != "application/json" or not isinstance(found, dict):
        message = "body: expected a JSON object, sent as application/json"
        raise InvalidRequestError(message)
    return found
