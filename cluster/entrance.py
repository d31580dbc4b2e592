"""From an HTTP request to a request the platform may run: whose, for what, until when.

The tenant comes from the key, names are plain words, the smaller of the two deadlines
(header and body) counts, and the rows are charged to the tenant.  Whether arrays fit
their task is the replica's question.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final

from fastapi import Header
from pydantic import WithJsonSchema
from starlette.requests import Request

from cluster import wire
from cluster.errors import InvalidRequestError
from cluster.limits import RateLimits
from cluster.names import check_name, is_request_id
from cluster.refusals import RefusedError
from cluster.schemas import InferRequest, InferResponse, ServiceClass
from cluster.visit import Visit, visit_of
from core_model.tasks import TaskSpec

MAX_DEADLINE_MS: Final = 3_600_000.0  # a connection held for an hour helps nobody: send a job
JOB_DEADLINE_MS: Final = 3_600_000.0  # of a job that names none
MAX_JOB_DEADLINE_MS: Final = 86_400_000.0
LARGE_BODY_BYTES = 256 * 2**10  # decoding more on the event loop would hold up its neighbours

DeadlineHeader = Annotated[
    float | None,
    Header(
        alias="X-Deadline-Ms",
        gt=0,
        le=MAX_JOB_DEADLINE_MS,
        allow_inf_nan=False,
        description="Milliseconds until the answer is worthless; the smaller of this and the "
        "body's counts.",
    ),
    WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "maximum": MAX_JOB_DEADLINE_MS}),
]


@dataclass(frozen=True, slots=True, eq=False)
class Entrance:
    """Decides what may go in.

    Args:
        tasks: The registered tasks, by name.
        rates: Counts rows per tenant.
    """

    tasks: Mapping[str, TaskSpec]
    rates: RateLimits

    async def read(self, http_request: Request, defaults: wire.Defaults) -> InferRequest:
        """Return the request in a body, binary or JSON.

        Args:
            http_request: With the body.
            defaults: Fills in what the body lacks; its tenant and id are filled in here.

        Raises:
            RefusedError: It is of another type.
            InvalidRequestError: It is malformed.
        """
        form = form_of(http_request)
        decode = wire.decode_request if form == wire.BINARY_TYPE else wire.request_from_json
        visit = visit_of(http_request.scope)
        tenant = visit.known_caller.speak_for(None)
        identity = {"request_id": visit.request_id, "tenant": tenant}
        body = await http_request.body()

        def fill_in(task: str) -> Mapping[str, Any]:
            return {**defaults(task), **identity}

        if len(body) < LARGE_BODY_BYTES:
            return decode(body, fill_in)
        return await asyncio.to_thread(decode, body, fill_in)

    def admit(
        self, visit: Visit, request: InferRequest, deadline_ms: float | None, max_ms: float
    ) -> InferRequest:
        """Return the request as it may go in.

        Args:
            visit: Who asks.
            request: As decoded.
            deadline_ms: From the header.
            max_ms: No deadline is longer.

        Raises:
            InvalidRequestError: A name is none.
            AccessDeniedError: Its tenant or task is not the key's.
            RateLimitError: Its tenant has no rows left.
        """
        caller = visit.known_caller
        if not is_request_id(request.request_id):
            expected = "letters, digits or ._:/+=@-"
            message = f"request_id: expected {expected}, got {request.request_id!r:.80}"
            raise InvalidRequestError(message)
        for what in ("tenant", "task", "model_version"):
            check_name(what, getattr(request, what))
        tenant = caller.speak_for(request.tenant)
        caller.require_task(request.task)
        visit.task = request.task if request.task in self.tasks else "other"
        visit.num_rows = request.features.shape[0]
        self.rates.take_rows(caller, visit.num_rows)
        deadlines = (request.deadline_ms, deadline_ms or max_ms, max_ms)
        return replace(request, tenant=tenant, deadline_ms=min(deadlines))

    def task_defaults(self, task: str) -> Mapping[str, Any]:
        """Return what a request of that task lacks: class and deadline are the task's."""
        usual = wire.usual_defaults(task)
        spec = self.tasks.get(task)
        if spec is None:
            return usual
        service_class = ServiceClass(spec.service_class)
        return {**usual, "service_class": service_class, "deadline_ms": spec.deadline_ms}


def job_defaults(task: str) -> Mapping[str, Any]:
    """Return what a job lacks."""
    return {**wire.usual_defaults(task), "deadline_ms": JOB_DEADLINE_MS}


def form_of(http_request: Request) -> str:
    """Return the content type of a body.

    Raises:
        RefusedError: It is neither binary nor JSON.
    """
    form = http_request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if form not in {wire.BINARY_TYPE, wire.JSON_TYPE}:
        message = f"expected {wire.BINARY_TYPE} or {wire.JSON_TYPE}, got {form!r:.80}"
        raise RefusedError(415, "UnsupportedMediaType", message)
    return form


async def encode(response: InferResponse, form: str) -> bytes:
    """Return a response in the form asked for."""
    encode_as = wire.encode_response if form == wire.BINARY_TYPE else wire.response_to_json
    if response.outputs.nbytes < LARGE_BODY_BYTES:
        return encode_as(response)
    return await asyncio.to_thread(encode_as, response)
