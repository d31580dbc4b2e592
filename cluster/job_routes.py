"""The routes of batch jobs: submit, watch, fetch, delete (see ``cluster.jobs``)."""

from dataclasses import replace
from datetime import datetime
from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel, Field

from cluster import wire
from cluster.caller import Role
from cluster.entrance import (
    MAX_JOB_DEADLINE_MS,
    DeadlineHeader,
    Entrance,
    encode,
    form_of,
    job_defaults,
)
from cluster.job import Job, JobState
from cluster.jobs import JobBoard
from cluster.openapi import ANSWER_FORMS, PROBLEMS, REQUEST_FORMS, needs_key
from cluster.refusals import Problem, refusal_of
from cluster.schemas import ServiceClass
from cluster.visit import visit_of

JobId = Annotated[
    str, Path(pattern=r"^[A-Za-z0-9_\-]{1,64}$", description="As submitting it said.")
]
NOT_DONE: Final[dict[int | str, dict[str, Any]]] = {
    409: {"model": Problem, "description": "It waits, runs or has failed."}
}


class JobReport(BaseModel):
    """Where a job stands."""

    id: str
    status: JobState
    request_id: str
    task: str
    created_at: datetime
    started_at: datetime | None = Field(description="When it began to run.")
    finished_at: datetime | None
    expires_at: datetime | None = Field(description="When it will be forgotten, once finished.")
    error: Problem | None = Field(description="Why it failed.")


class JobReports(BaseModel):
    """All jobs of a tenant, oldest first."""

    jobs: list[JobReport]


def build_job_routes(board: JobBoard, entrance: Entrance) -> APIRouter:
    """Return the routes below ``/v1/jobs``."""
    routes = APIRouter(prefix="/v1/jobs", tags=["jobs"], dependencies=[needs_key(Role.JOBS)])

    @routes.post(
        "",
        status_code=202,
        responses=PROBLEMS,
        openapi_extra={"requestBody": REQUEST_FORMS},
    )
    async def submit(
        http_request: Request, response: Response, deadline_ms: DeadlineHeader = None
    ) -> JobReport:
        """Take a request, binary or JSON as in /v1/infer, to be answered as class batch."""
        request = await entrance.read(http_request, job_defaults)
        visit = visit_of(http_request.scope)
        admitted = entrance.admit(visit, request, deadline_ms, MAX_JOB_DEADLINE_MS)
        as_batch = replace(admitted, service_class=ServiceClass.BATCH)
        job = board.submit(as_batch, form_of(http_request))
        response.headers["Location"] = f"/v1/jobs/{job.job_id}"
        return _report(job)

    @routes.get("", responses=PROBLEMS)
    async def listing(http_request: Request) -> JobReports:
        """Return all jobs of the key's tenant, oldest first."""
        return JobReports(jobs=[_report(job) for job in board.of_tenant(_tenant(http_request))])

    @routes.get("/{job_id}", responses=PROBLEMS)
    async def watch(http_request: Request, job_id: JobId) -> JobReport:
        """Return where a job stands."""
        return _report(board.find(_tenant(http_request), job_id))

    @routes.get("/{job_id}/result", response_class=Response, responses=ANSWER_FORMS | NOT_DONE)
    async def fetch(http_request: Request, job_id: JobId) -> Response:
        """Return the answer: in the form that Accept asks for, else that of the request."""
        job = board.find(_tenant(http_request), job_id)
        form = _wanted_form(http_request, job.form)
        return Response(await encode(job.result, form), media_type=form)

    @routes.delete("/{job_id}", status_code=204, responses=PROBLEMS)
    async def delete(http_request: Request, job_id: JobId) -> None:
        """Cancel a job that waits or runs, and forget it and its result."""
        board.delete(_tenant(http_request), job_id)

    return routes


def _tenant(http_request: Request) -> str | None:
    return visit_of(http_request.scope).known_caller.tenant


def _wanted_form(http_request: Request, usual: str) -> str:
    accepted = http_request.headers.get("accept", "").lower()
    wanted = [form for form in (wire.BINARY_TYPE, wire.JSON_TYPE) if form in accepted]
    return wanted[0] if len(wanted) == 1 else usual


def _report(job: Job) -> JobReport:
    refusal = None if job.error is None else refusal_of(job.error)
    return JobReport(
        id=job.job_id,
        status=job.state,
        request_id=job.request_id,
        task=job.task,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        expires_at=job.expires_at,
        error=Problem(error=refusal.name, message=refusal.message) if refusal else None,
    )
