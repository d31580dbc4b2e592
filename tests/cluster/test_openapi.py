"""Requests generated from /openapi.json: none is answered by a 5xx, all as documented."""

from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import positive_data_acceptance
from schemathesis.core.result import Ok

from cluster import wire
from cluster.caller import Rate, Role
from cluster.keys import KeyFile, create_key
from cluster.names import is_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from schemathesis import Case, SerializationContext
    from schemathesis.core.result import Err
    from schemathesis.schemas import APIOperation

    from tests.cluster.conftest import Door

    Operation = APIOperation[Any, Any, Any, Any]

pytestmark = pytest.mark.slow

OPERATIONS = [
    "POST /v1/infer",
    "POST /v1/score",
    "POST /v1/forecast",
    "POST /v1/jobs",
    "GET /v1/jobs",
    "GET /v1/jobs/{job_id}",
    "DELETE /v1/jobs/{job_id}",
    "GET /v1/jobs/{job_id}/result",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "GET /healthz",
    "GET /readyz",
    "GET /metrics",
]


WITHOUT_PARAMETERS = {"GET /healthz", "GET /readyz"}  # nothing in them could be wrong
# That arrays go together is more than a schema can say, so what fits it may be refused.
CONSISTENT = {"POST /v1/infer", "POST /v1/jobs"}


@schemathesis.serializer(wire.BINARY_TYPE)
def send_bytes(_: "SerializationContext", value: Any) -> bytes | None:  # noqa: ANN401 - as it calls
    """Generated binary bodies go out as they are."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")


@pytest.mark.parametrize(
    ("label", "mode"),
    [
        (label, mode)
        for label in OPERATIONS
        for mode in GenerationMode
        if mode is GenerationMode.POSITIVE or label not in WITHOUT_PARAMETERS
    ],
)
def test_no_generated_request_breaks_the_gateway(
    make_door: "Callable[..., Door]", tmp_path: "Path", label: str, mode: GenerationMode
) -> None:
    path = tmp_path / "keys.json"
    token = create_key(path, "any", roles=list(Role), rate=Rate(1e9, 1e9))
    schema = schemathesis.openapi.from_asgi("/openapi.json", make_door(KeyFile(path)).api)
    operations = {found.label: found for found in map(opened, schema.get_all_operations())}
    assert sorted(operations) == sorted(OPERATIONS)
    left_out = [positive_data_acceptance] if label in CONSISTENT else []

    @settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operations[label].as_strategy(generation_mode=mode))
    def ask(case: "Case[Any]") -> None:
        if isinstance(case.body, dict) and is_name(str(case.body.get("tenant", ""))):
            case.body["tenant"] = "any"  # the key's, so that the request gets further
        headers = {"Authorization": f"Bearer {token}"}
        case.call_and_validate(headers=headers, excluded_checks=left_out)

    ask()


def opened(found: "Ok[Operation] | Err[Any]") -> "Operation":
    """Return an operation of the schema that must be valid."""
    assert isinstance(found, Ok)
    return found.ok()
