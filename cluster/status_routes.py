"""The routes that say what runs: models, liveness, readiness, metrics."""

from collections.abc import Sequence
from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel, ConfigDict, WithJsonSchema

from cluster.backend import Backend
from cluster.caller import Role
from cluster.errors import UnknownModelError
from cluster.names import NAME_PATTERN, check_name
from cluster.openapi import PROBLEMS, needs_key
from cluster.schemas import MAX_ID_LENGTH
from cluster.visit import visit_of

METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
METRICS_ANSWER: Final[dict[int | str, dict[str, Any]]] = {
    **PROBLEMS,
    200: {"description": "Prometheus text.", "content": {"text/plain": {}}},
}


ModelName = Annotated[  # checked by hand, for the message; the pattern is for readers
    str,
    Path(description="A version or an alias."),
    WithJsonSchema({"type": "string", "pattern": NAME_PATTERN, "maxLength": MAX_ID_LENGTH}),
]


class ModelReport(BaseModel):
    """A version that is loaded, and what it has done since, in the replica that answers.

    Args:
        ok: Requests answered.
        failed: Requests whose step failed.
        p50_ms, p99_ms: Of the latest answered requests.
        shadowed: Sequences it was asked without answering.
        disagreed: Of these, the ones whose answer differed from the stable version's.
    """

    model_version: str
    aliases: list[str]
    tasks: list[str]
    device: str
    ok: int
    failed: int
    p50_ms: float | None
    p99_ms: float | None
    shadowed: int
    disagreed: int


class ModelReports(BaseModel):
    """All models that are served."""

    models: list[ModelReport]


class Liveness(BaseModel):
    """This process answers."""

    status: str = "ok"


class Readiness(BaseModel):
    """The model answers; holders of a key see what it reports."""

    model_config = ConfigDict(extra="allow")

    status: str = "ready"


def build_status_routes(backend: Backend) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["status"])

    async def served() -> Sequence[ModelReport]:
        report = await backend.status()
        return [ModelReport.model_validate(each) for each in report["models"]]

    @routes.get("/v1/models", dependencies=[needs_key(Role.INFER)], responses=PROBLEMS)
    async def models() -> ModelReports:
        """Return what is served."""
        return ModelReports(models=list(await served()))

    @routes.get("/v1/models/{name:path}", dependencies=[needs_key(Role.INFER)], responses=PROBLEMS)
    async def model(name: ModelName) -> ModelReport:
        """Return the model of that version or alias."""
        check_name("model", name)
        known = await served()
        for report in known:
            if name in (report.model_version, *report.aliases):
                return report
        versions = [report.model_version for report in known]
        message = f"model: expected a version or alias of {versions}, got {name!r}"
        raise UnknownModelError(message)

    @routes.get("/healthz")
    async def health() -> Liveness:
        """Say that this process answers."""
        return Liveness()

    @routes.get("/readyz", responses=PROBLEMS)
    async def ready(http_request: Request) -> Readiness:
        """Say whether the model answers."""
        report = await backend.status()
        if visit_of(http_request.scope).caller is None:
            return Readiness()
        return Readiness.model_validate({"status": "ready", **report})

    @routes.get(
        "/metrics",
        dependencies=[needs_key(Role.METRICS)],
        response_class=Response,
        responses=METRICS_ANSWER,
    )
    async def metrics() -> Response:
        """Return the metrics of this node."""
        return Response(await backend.metrics_page(), media_type=METRICS_TYPE)

    return routes
