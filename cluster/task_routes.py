"""The routes of the tasks in JSON: /v1/score and /v1/forecast (see ``cluster.forms``).

A route whose task no installed distribution declares stays, and answers 404 with the
reason, so that a client learns what is missing rather than that it has misspelt.
"""

from collections.abc import Mapping
from typing import Final, NoReturn

from fastapi import APIRouter, Request
from pydantic import BaseModel

from cluster import wire
from cluster.caller import Role
from cluster.client import Client
from cluster.entrance import MAX_DEADLINE_MS, DeadlineHeader, Entrance
from cluster.forms import TaskForm
from cluster.openapi import PROBLEMS, needs_key
from cluster.refusals import AsciiResponse, RefusedError
from cluster.visit import visit_of

TASK_OF_ROUTE: Final[Mapping[str, str]] = {"/score": "fraud", "/forecast": "maintenance"}


def build_task_routes(client: Client, entrance: Entrance) -> APIRouter:
    """Return the routes of all tasks that have one."""
    routes = APIRouter(prefix="/v1", tags=["tasks"], dependencies=[needs_key(Role.INFER)])
    for path, task in TASK_OF_ROUTE.items():
        spec = entrance.tasks.get(task)
        if spec is None:
            _add_missing(routes, path, task, sorted(entrance.tasks))
        else:
            _add(routes, path, TaskForm(spec), client, entrance)
    return routes


def _add(routes: APIRouter, path: str, form: TaskForm, client: Client, entrance: Entrance) -> None:
    async def ask(
        http_request: Request, body: BaseModel, deadline_ms: DeadlineHeader = None
    ) -> AsciiResponse:
        visit = visit_of(http_request.scope)
        tenant = visit.known_caller.speak_for(None)
        request = form.to_request(body, visit.request_id, tenant)
        admitted = entrance.admit(visit, request, deadline_ms, MAX_DEADLINE_MS)
        return AsciiResponse(form.to_answer(await client.infer(admitted)))

    ask.__annotations__["body"] = form.body  # known only now
    ask.__doc__ = f"Ask the task {form.spec.name!r}; columns by name, null where not known."
    routes.post(path, name=path[1:], response_model=form.answer, responses=PROBLEMS)(ask)


def _add_missing(routes: APIRouter, path: str, task: str, known: list[str]) -> None:
    async def refuse() -> NoReturn:
        """Say that the task is not registered here."""
        message = f"expected a task among {known}, {task!r} is not registered here; "
        advice = "install a distribution that declares it and restart"
        raise RefusedError(404, "UnknownTask", message + advice)

    anything = {"requestBody": {"content": {wire.JSON_TYPE: {}}, "required": True}}
    routes.post(
        path, name=path[1:], response_model=None, responses=PROBLEMS, openapi_extra=anything
    )(refuse)
