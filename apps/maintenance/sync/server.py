"""The platform's side over HTTP: the repository as files, reports, uploads, decisions.

    GET  /repository/...                     metadata and targets, ranges included
    POST /fleet/<agent>/report               facts of a box -> {"wanted": bundle or null}
    POST /fleet/<agent>/messages             uploads of a box -> {"acknowledged": n}
    GET  /fleet                              boxes, rollouts, stable bundles
    GET  /fleet/audit                        the newest entries of the audit log
    POST /fleet/rollouts/<n>/decisions       a decision that an operator signed

Whoever can reach it can read it and can report as any box; what boxes run is decided by
signatures.  It belongs on a network of the plant, or behind a proxy that knows the boxes.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles

from apps.maintenance.sync.boxes import BoxReport, save_messages
from apps.maintenance.sync.control import Control
from apps.maintenance.sync.operators import SignedDecision
from cluster.errors import AccessDeniedError, ConfigurationError, InvalidRequestError

MAX_BODY_BYTES = 4 * 2**20
_STATUS_OF: Mapping[type[Exception], HTTPStatus] = {
    InvalidRequestError: HTTPStatus.BAD_REQUEST,
    AccessDeniedError: HTTPStatus.FORBIDDEN,
    ConfigurationError: HTTPStatus.CONFLICT,
}


def create_app(control: Control, repository: Path) -> FastAPI:
    """Return the application.

    Args:
        control: Of the fleet.
        repository: Folder of the signed repository.
    """
    app = FastAPI(title="trimoe sync", docs_url=None, redoc_url=None)
    app.mount("/repository", StaticFiles(directory=repository), name="repository")
    for kind, status in _STATUS_OF.items():
        app.add_exception_handler(kind, _answer_with(status))
    _add_boxes(app, control)
    _add_people(app, control)
    return app


def _add_boxes(app: FastAPI, control: Control) -> None:
    """Add what boxes ask."""

    @app.post("/fleet/{agent}/report")
    async def report(agent: str, request: Request) -> Mapping[str, Any]:
        facts = BoxReport.from_record(agent, await _body(request))
        return {"wanted": await run_in_threadpool(control.rollouts.report, facts)}

    @app.post("/fleet/{agent}/messages")
    async def messages(agent: str, request: Request) -> Mapping[str, Any]:
        found = (await _body(request)).get("messages")
        if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
            message = "messages: expected a list of objects"
            raise InvalidRequestError(message)
        seq = await run_in_threadpool(save_messages, control.database, agent, found)
        return {"acknowledged": seq}


def _add_people(app: FastAPI, control: Control) -> None:
    """Add what people and the dashboard ask."""

    @app.get("/fleet")
    def fleet() -> Mapping[str, Any]:
        return control.state()

    @app.get("/fleet/audit")
    def audit(limit: int = 100) -> list[Mapping[str, Any]]:
        return [asdict(entry) for entry in control.audit(limit)]

    @app.post("/fleet/rollouts/{number}/decisions")
    async def decide(number: int, request: Request) -> Mapping[str, Any]:
        signed = SignedDecision.from_record(await _body(request))
        if signed.decision.rollout != number:
            message = f"decision: expected one over rollout {number}"
            raise InvalidRequestError(message)
        return asdict(await run_in_threadpool(control.rollouts.act, signed))


def _answer_with(status: HTTPStatus) -> Callable[[Request, Exception], JSONResponse]:
    def answer(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"message": str(error)}, status)

    return answer


async def _body(request: Request) -> dict[str, Any]:
    """Return a JSON object of bounded size.

    Raises:
        InvalidRequestError: It is larger, or something else.
    """
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            message = f"body: expected {MAX_BODY_BYTES} bytes at most"
            raise InvalidRequestError(message)
    try:
        found = json.loads(data)
    except ValueError as error:
        message = "body: expected JSON"
        raise InvalidRequestError(message) from error
    if not isinstance(found, dict):
        message = f"body: expected a JSON object, got {type(found).__name__}"
        raise InvalidRequestError(message)
    return found
