"""What OpenAPI says of the routes beyond their types: the two body forms, errors, keys."""

from typing import Annotated, Any, Final

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from cluster import wire
from cluster.caller import Role
from cluster.names import NAME_PATTERN, REQUEST_ID_PATTERN
from cluster.refusals import Problem
from cluster.schemas import MAX_ID_LENGTH, ServiceClass
from cluster.visit import visit_of

Responses = dict[int | str, dict[str, Any]]
BEARER: Final = HTTPBearer(
    auto_error=False,
    scheme_name="apiKey",
    description="A key made with `trimoe keys create`; not needed where the platform is open.",
)
PROBLEM_TEXTS: Final = {
    400: "The request can never succeed as it is.",
    401: "No key, or one that nobody knows.",
    403: "The key is not for this tenant, task or action.",
    404: "No such model, task, job or route.",
    429: "Back-pressure or the tenant's rate; Retry-After says when to come back.",
    503: "The platform cannot answer now; Retry-After says when to come back.",
}
PROBLEMS: Final[Responses] = {
    **{code: {"model": Problem, "description": text} for code, text in PROBLEM_TEXTS.items()},
    "default": {"model": Problem, "description": "Any other refusal, in the same form."},
}
_BINARY: Final = {"type": "string", "format": "binary"}


def _array(dtypes: tuple[str, ...], num_dims: int) -> dict[str, Any]:
    size = {"type": "integer", "minimum": 0}
    shape = {"type": "array", "items": size, "minItems": num_dims, "maxItems": num_dims}
    value = {"type": ["number", "null"]}
    return {
        "type": "object",
        "properties": {
            "dtype": {"type": "string", "enum": list(dtypes)},
            "shape": shape,
            "values": {"type": "array", "items": value},
        },
        "required": ["dtype", "shape", "values"],
        "additionalProperties": False,
    }


_NAME: Final = {"type": "string", "pattern": NAME_PATTERN, "maxLength": MAX_ID_LENGTH}
_REQUEST_ID: Final = {**_NAME, "pattern": REQUEST_ID_PATTERN}
_REQUEST: Final = {
    "type": "object",
    "description": "A flat array of each field; rows of all sequences one after another.",
    "properties": {
        "request_id": _REQUEST_ID,
        "tenant": _NAME,
        "task": _NAME,
        "service_class": {"type": "string", "enum": [each.value for each in ServiceClass]},
        "deadline_ms": {"type": "number", "exclusiveMinimum": 0},
        "model_version": _NAME,
        "features": _array(("float32",), 2),
        "cu_seqlens": _array(("int32",), 1),
    },
    "patternProperties": {r"^extras\.": _array(tuple(wire.DTYPES), 2)},
    "required": ["task", "features", "cu_seqlens"],
    "additionalProperties": False,
}
_RESPONSE: Final = {
    "type": "object",
    "properties": {
        "request_id": {"type": "string"},
        "model_version": {"type": "string"},
        "queued_ms": {"type": "number"},
        "compute_ms": {"type": "number"},
        "outputs": _array(tuple(wire.DTYPES), 2),
        "cu_seqlens": _array(("int32",), 1),
        "status": _array(("uint8",), 1),
        "tokens_per_expert": _array(("int64",), 2),
    },
}
REQUEST_FORMS: Final = {
    "required": True,
    "content": {wire.JSON_TYPE: {"schema": _REQUEST}, wire.BINARY_TYPE: {"schema": _BINARY}},
}
ANSWER_FORMS: Final[Responses] = {
    **PROBLEMS,
    200: {
        "description": "The answer.",
        "content": {wire.JSON_TYPE: {"schema": _RESPONSE}, wire.BINARY_TYPE: {"schema": _BINARY}},
    },
}


def needs_key(role: Role) -> Any:  # noqa: ANN401 - FastAPI hides the type of Depends
    """Return the dependency of routes that need a key with that role."""

    async def check(
        http_request: Request,
        _: Annotated[HTTPAuthorizationCredentials | None, Security(BEARER)],
    ) -> None:
        visit_of(http_request.scope).known_caller.require(role)

    return Depends(check)
