"""The HTTP API: a FastAPI application in front of any client; knows neither Serve nor ray.

    POST   /v1/infer               one request, binary or JSON by content type, answered alike
    POST   /v1/score               fraud in JSON, columns by name
    POST   /v1/forecast            maintenance in JSON, once that task is registered
    POST   /v1/jobs                the body of /v1/infer, answered later; GET lists
    GET    /v1/jobs/{id}           where it stands; DELETE cancels and forgets
    GET    /v1/jobs/{id}/result    the answer, binary or JSON
    GET    /v1/models, /v1/models/{name}
    GET    /healthz                this process answers
    GET    /readyz                 the model answers; what it reports is for holders of a key
    GET    /metrics                Prometheus text
    GET    /openapi.json

Layers, outermost first: ``journal`` (log line, metrics, errors), ``access`` (headers, key,
rate), ``body`` (length, pace), routing.  Errors are ``refusals``.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NoReturn

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRouter
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from cluster.access import Access
from cluster.backend import Backend
from cluster.body import BodyLimits, WholeBody
from cluster.caller import Role
from cluster.client import Client
from cluster.entrance import MAX_DEADLINE_MS, DeadlineHeader, Entrance, encode, form_of
from cluster.job_routes import build_job_routes
from cluster.jobs import JobBoard, JobLimits
from cluster.journal import Journal
from cluster.keys import KeyFile
from cluster.limits import RateLimits
from cluster.openapi import ANSWER_FORMS, REQUEST_FORMS, needs_key
from cluster.refusals import RefusedError
from cluster.status_routes import build_status_routes
from cluster.task_routes import build_task_routes
from cluster.visit import visit_of
from core_model.tasks import TaskSpec

NAME_OF_STATUS: Mapping[int, str] = {404: "NotFound", 405: "MethodNotAllowed"}


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """Settings of the API.

    Args:
        body: Limits of bodies.
        jobs: Limits of batch jobs.
        echo_request_id: Whether to answer with the request's id; Ray's proxy does it already.
    """

    body: BodyLimits = field(default_factory=BodyLimits)
    jobs: JobLimits = field(default_factory=JobLimits)
    echo_request_id: bool = True


def build_api(
    backend: Backend,
    tasks: Mapping[str, TaskSpec],
    keys: KeyFile | None,
    settings: ApiSettings | None = None,
) -> FastAPI:
    """Return the application.

    Args:
        backend: What it stands on.
        tasks: The registered tasks, by name.
        keys: The API keys; None opens everything to whoever can connect.
        settings: See ``ApiSettings``.
    """
    settings = settings or ApiSettings()
    entrance = Entrance(tasks, RateLimits())
    board = JobBoard(backend.client, settings.jobs, recorder=backend.recorder)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await board.close()

    api = FastAPI(
        title="trimoe",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        middleware=[
            Middleware(
                Journal, backend.recorder, backend.log, echo_request_id=settings.echo_request_id
            ),
            Middleware(Access, keys, entrance.rates),
            Middleware(WholeBody, settings.body),
        ],
        exception_handlers={HTTPException: _refuse_http, RequestValidationError: _refuse_fields},
    )
    api.include_router(_build_infer_routes(backend.client, entrance))
    api.include_router(build_task_routes(backend.client, entrance))
    api.include_router(build_job_routes(board, entrance))
    api.include_router(build_status_routes(backend))
    return api


def _build_infer_routes(client: Client, entrance: Entrance) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["infer"], dependencies=[needs_key(Role.INFER)])

    @routes.post(
        "/infer",
        response_class=Response,
        responses=ANSWER_FORMS,
        openapi_extra={"requestBody": REQUEST_FORMS},
    )
    async def infer(http_request: Request, deadline_ms: DeadlineHeader = None) -> Response:
        """Answer one request of any task, in the form it came in."""
        request = await entrance.read(http_request, entrance.task_defaults)
        visit = visit_of(http_request.scope)
        admitted = entrance.admit(visit, request, deadline_ms, MAX_DEADLINE_MS)
        form = form_of(http_request)
        return Response(await encode(await client.infer(admitted), form), media_type=form)

    return routes


def _refuse_http(_: Request, error: Exception) -> NoReturn:
    """Hand a refusal of the framework to the journal, which gives it our form."""
    if not isinstance(error, HTTPException):
        raise error
    name = NAME_OF_STATUS.get(error.status_code, "InvalidRequestError")
    message = f"expected a request as /openapi.json describes, got: {error.detail}"
    raise RefusedError(error.status_code, name, message, headers=error.headers) from None


def _refuse_fields(_: Request, error: Exception) -> NoReturn:
    """Name the first field that is wrong; never its value, which may be long or private."""
    if not isinstance(error, RequestValidationError):
        raise error
    first, *others = error.errors()
    place = ".".join(map(str, first["loc"]))
    more = f" (and {len(others)} more)" if others else ""
    message = f"{place:.200}: {first['msg']:.200}{more}; see /openapi.json"
    raise RefusedError(400, "InvalidRequestError", message) from None
