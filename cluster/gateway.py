"""The HTTP door: a small FastAPI application in front of any client.

    POST /v1/infer    one request, binary or JSON by content type; the answer in the same form
    GET  /v1/models   what is served
    GET  /healthz     this process answers
    GET  /readyz      the model answers

Errors are JSON ``{"error": NAME, "message": TEXT}``.  API keys and rate limits are not here.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import ray
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from cluster import wire
from cluster.client import Client
from cluster.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    QueueFullError,
    TrimoeError,
    UnavailableError,
    UnknownModelError,
)
from cluster.handle import CORE_NAME, HandleClient, translate

STATUS_TIMEOUT_S = 5.0
STATUS_OF_ERROR: Final[Mapping[type[TrimoeError], int]] = {
    InvalidRequestError: 400,
    UnknownModelError: 404,
    QueueFullError: 429,
    DeadlineExceededError: 504,
    UnavailableError: 503,
}

Status = Callable[[], Awaitable[Mapping[str, Any]]]


def build_api(
    client: Client, status: Status, *, max_body_bytes: int = wire.MAX_MESSAGE_BYTES
) -> FastAPI:
    """Return the application.

    Args:
        client: Answers the requests.
        status: Returns what the model core reports; raises ``UnavailableError``.
        max_body_bytes: A longer body is refused while it arrives.
    """
    api = FastAPI(title="trimoe", docs_url=None, redoc_url=None)

    @api.exception_handler(TrimoeError)
    async def refuse(_: Request, error: TrimoeError) -> JSONResponse:
        codes = [code for kind, code in STATUS_OF_ERROR.items() if isinstance(error, kind)]
        return _error(codes[0] if codes else 500, type(error).__name__, str(error))

    @api.post("/v1/infer")
    async def infer(http_request: Request) -> Response:
        form = http_request.headers.get("content-type", "").split(";")[0].strip().lower()
        if form not in {wire.BINARY_TYPE, wire.JSON_TYPE}:
            expected = f"expected content type {wire.BINARY_TYPE} or {wire.JSON_TYPE}"
            return _error(415, "UnsupportedMediaType", f"{expected}, got {form!r:.80}")
        body = await read_body(http_request, max_body_bytes)
        if body is None:
            message = f"expected a body of at most {max_body_bytes} bytes, got more; send less"
            return _error(413, "BodyTooLarge", message)
        if form == wire.BINARY_TYPE:
            response = await client.infer(wire.decode_request(body))
            return Response(wire.encode_response(response), media_type=form)
        response = await client.infer(wire.request_from_json(body))
        return Response(wire.response_to_json(response), media_type=form)

    @api.get("/v1/models")
    async def models() -> Mapping[str, Any]:
        report = await status()
        served = ("model_version", "aliases", "tasks", "device")
        return {"models": [{name: report[name] for name in served}]}

    @api.get("/healthz")
    async def health() -> Mapping[str, str]:
        return {"status": "ok"}

    @api.get("/readyz")
    async def ready() -> Mapping[str, Any]:
        return {"status": "ready", **await status()}

    return api


async def read_body(request: Request, max_bytes: int) -> bytes | None:
    """Return the body, or None as soon as it is longer than allowed."""
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            return None
        chunks.append(chunk)
    return b"".join(chunks)


def _error(code: int, name: str, message: str) -> JSONResponse:
    return JSONResponse({"error": name, "message": message}, status_code=code)


def _build_in_replica() -> FastAPI:
    handle = serve.get_deployment_handle(CORE_NAME)

    async def status() -> Mapping[str, Any]:
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                report: Mapping[str, Any] = await handle.options(method_name="status").remote()
        except (RayError, RayServeException) as error:
            raise translate(error) from error
        except TimeoutError as error:
            message = f"core: expected a status within {STATUS_TIMEOUT_S:.0f} s, got none"
            raise UnavailableError(message) from error
        nodes = await asyncio.to_thread(ray.nodes)
        return {**report, "ray": ray.__version__, "ray_nodes": sum(map(_is_alive, nodes))}

    return build_api(HandleClient(handle), status)


def _is_alive(node: Mapping[str, Any]) -> bool:
    return bool(node["Alive"])


Gateway = serve.deployment(
    name="Gateway",
    max_ongoing_requests=512,
    ray_actor_options={"num_cpus": 0},
    graceful_shutdown_timeout_s=5.0,
)(serve.ingress(_build_in_replica)())
