"""The routes with a fake client behind them: answers, deadlines, back-pressure, what is noted."""

import asyncio
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from cluster import wire
from cluster.errors import (
    CheckpointError,
    DeadlineExceededError,
    InvalidRequestError,
    QueueFullError,
    ReplicaLostError,
    UnavailableError,
    UnknownModelError,
)
from cluster.jobs import JobLimits
from cluster.schemas import InferRequest, ServiceClass
from core_model.builtin_tasks import FRAUD

if TYPE_CHECKING:
    from tests.cluster.conftest import Answer, Door, Keys

MakeDoor = Callable[..., "Door"]
Make = Callable[..., InferRequest]


def score_body(**fields: Any) -> bytes:  # noqa: ANN401 - passed on
    context = dict.fromkeys(FRAUD.extras["context"].columns, 0.5)
    sequence = {"rows": [dict.fromkeys(FRAUD.columns, 1)] * 3, "extras": {"context": context}}
    return json.dumps({"sequences": [sequence], **fields}).encode()


def test_infer_answers_in_the_form_it_was_asked_in(make_door: MakeDoor, make_request: Make) -> None:
    door = make_door()
    request = make_request()
    binary = asyncio.run(
        door.ask("POST", "/v1/infer", wire.encode_request(request), wire.BINARY_TYPE)
    )
    assert binary.headers["content-type"] == wire.BINARY_TYPE
    assert wire.decode_response(binary.body).outputs.tolist() == [[3, 3], [1, 1], [2, 2]]
    text = asyncio.run(door.ask("POST", "/v1/infer", wire.request_to_json(request)))
    assert wire.response_from_json(text.body).outputs.tolist() == [[3, 3], [1, 1], [2, 2]]
    assert door.client.requests[0].service_class is ServiceClass.STREAM


def test_score_takes_named_columns_and_answers_named_outputs(
    make_door: MakeDoor, keys: "Keys"
) -> None:
    door = make_door(keys.file)
    answer = asyncio.run(
        door.ask("POST", "/v1/score", score_body(), authorization=keys["alpha"], x_request_id="q")
    )
    assert (answer.status, answer.json["request_id"]) == (200, "q")
    (sequence,) = answer.json["sequences"]
    assert sequence["status"] == "ok"
    assert tuple(sequence["rows"][0]) == FRAUD.outputs
    (request,) = door.client.requests
    assert (request.tenant, request.task, request.features.shape) == ("alpha", "fraud", (3, 7))


def test_a_body_without_tenant_and_id_has_those_of_its_key_and_header(
    make_door: MakeDoor, keys: "Keys", make_request: Make
) -> None:
    body = json.loads(wire.request_to_json(make_request()))
    del body["tenant"], body["request_id"]
    sent = json.dumps(body).encode()
    keyed, opened = make_door(keys.file), make_door()
    asyncio.run(keyed.ask("POST", "/v1/infer", sent, authorization=keys["alpha"], x_request_id="q"))
    asyncio.run(opened.ask("POST", "/v1/infer", sent))
    (request,) = keyed.client.requests
    assert (request.tenant, request.request_id) == ("alpha", "q")
    assert opened.client.requests[0].tenant == "local"


def test_forecast_says_that_its_task_is_not_registered(make_door: MakeDoor) -> None:
    answer = asyncio.run(make_door().ask("POST", "/v1/forecast", b"{}"))
    assert (answer.status, answer.json["error"]) == (404, "UnknownTask")
    assert "'maintenance' is not registered here" in answer.json["message"]


@pytest.mark.parametrize(
    ("in_body", "in_header", "expected"),
    [
        (None, None, 1000.0),
        (400.0, None, 400.0),
        (None, "250.5", 250.5),
        (400.0, "250", 250.0),
        (400.0, "500", 400.0),
        (1e12, None, 3_600_000.0),
    ],
)
def test_the_smaller_deadline_wins_and_the_tasks_is_the_default(
    make_door: MakeDoor,
    make_request: Make,
    in_body: float | None,
    in_header: str | None,
    expected: float,
) -> None:
    door = make_door()
    body = json.loads(wire.request_to_json(make_request()))
    del body["deadline_ms"]
    given = {} if in_body is None else {"deadline_ms": in_body}
    headers = [] if in_header is None else [(b"x-deadline-ms", in_header.encode())]
    for path, sent in (
        ("/v1/infer", json.dumps(body | given).encode()),
        ("/v1/score", score_body(**given)),
    ):
        answer = asyncio.run(door.ask("POST", path, sent, raw_headers=headers))
        assert answer.status == 200, answer.body
    assert [request.deadline_ms for request in door.client.requests] == [expected] * 2


@pytest.mark.parametrize(
    ("error", "status", "name", "retry_after"),
    [
        (QueueFullError("queue of t: 9 wait"), 429, "QueueFullError", "1"),
        (ReplicaLostError("ActorDied: 10.0.0.7"), 503, "ReplicaLostError", "1"),
        (UnavailableError("step failed with RuntimeError"), 503, "UnavailableError", "1"),
        (DeadlineExceededError("too late"), 504, "DeadlineExceededError", None),
        (InvalidRequestError("expected a, got b"), 400, "InvalidRequestError", None),
        (UnknownModelError("expected a, got b"), 404, "UnknownModelError", None),
        (CheckpointError("/srv/models: altered"), 500, "InternalError", None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_the_core_have_their_status_and_keep_its_secrets(
    make_door: MakeDoor,
    make_request: Make,
    error: Exception,
    status: int,
    name: str,
    retry_after: str | None,
) -> None:
    door = make_door()
    door.client.error = error
    body = wire.encode_request(make_request())
    answer = asyncio.run(door.ask("POST", "/v1/infer", body, wire.BINARY_TYPE))
    assert (answer.status, answer.json["error"]) == (status, name)
    assert answer.headers.get("retry-after") == retry_after
    for secret in ("10.0.0.7", "RuntimeError", "/srv"):
        assert secret not in answer.json["message"]
    if status < 500 and status != 429:
        assert answer.json["message"] == str(error)


def test_back_pressure_until_the_deadline_is_back_pressure(
    make_door: MakeDoor, make_request: Make
) -> None:
    """What ``cluster.retry`` raises when every attempt met a full queue."""
    door = make_door()
    door.client.error = DeadlineExceededError("no answer within 50 ms; last failure: full")
    door.client.error.__cause__ = QueueFullError("full")
    body = wire.encode_request(make_request())
    answer = asyncio.run(door.ask("POST", "/v1/infer", body, wire.BINARY_TYPE))
    assert (answer.status, answer.headers["retry-after"]) == (429, "1")
    door.client.error.__cause__ = ReplicaLostError("10.0.0.7 died")
    answer = asyncio.run(door.ask("POST", "/v1/infer", body, wire.BINARY_TYPE))
    assert answer.status == 504
    assert answer.json["message"].endswith("within 50 ms; last failure: ReplicaLostError")


def test_a_tenant_above_its_rate_is_told_when_to_come_back(
    make_door: MakeDoor, keys: "Keys", make_request: Make
) -> None:
    door = make_door(keys.file)

    def ask(tenant: str, lengths: tuple[int, ...] = (1,)) -> "Answer":
        body = wire.encode_request(make_request(lengths, tenant=tenant))
        return asyncio.run(
            door.ask("POST", "/v1/infer", body, wire.BINARY_TYPE, authorization=keys[tenant])
        )

    assert [ask("gamma").status for _ in range(2)] == [200, 200]
    refused = ask("gamma")
    assert (refused.status, refused.json["error"]) == (429, "RateLimitError")
    assert refused.headers["retry-after"] == "1"
    assert ask("alpha").status == 200
    assert {"reason": "rate"} in door.recorder.labels_of("trimoe_refused_total")


def test_rows_above_the_rate_are_refused_with_the_time_they_take(
    make_door: MakeDoor, keys: "Keys", make_request: Make
) -> None:
    door = make_door(keys.file)
    body = wire.encode_request(make_request((40,), tenant="gamma"))
    statuses = []
    for _ in range(2):
        answer = asyncio.run(
            door.ask("POST", "/v1/infer", body, wire.BINARY_TYPE, authorization=keys["gamma"])
        )
        statuses.append((answer.status, answer.headers.get("retry-after")))
    assert statuses == [(200, None), (429, "4")]  # 20 in debt, 20 more to a full bucket of 20


def test_models_are_listed_and_found_by_version_or_alias(make_door: MakeDoor) -> None:
    door = make_door()
    listed = asyncio.run(door.ask("GET", "/v1/models")).json["models"]
    assert [model["model_version"] for model in listed] == ["fake-1"]
    for name in ("fake-1", "stable"):
        assert asyncio.run(door.ask("GET", f"/v1/models/{name}")).json == listed[0]
    missing = asyncio.run(door.ask("GET", "/v1/models/fake-2"))
    assert (missing.status, missing.json["error"]) == (404, "UnknownModelError")


def test_a_core_that_does_not_answer_is_not_ready_but_alive(make_door: MakeDoor) -> None:
    door = make_door()
    door.broken = UnavailableError("core: no answer from 10.0.0.7")
    ready = asyncio.run(door.ask("GET", "/readyz"))
    assert (ready.status, ready.headers["retry-after"]) == (503, "1")
    assert b"10.0.0.7" not in ready.body
    assert asyncio.run(door.ask("GET", "/healthz")).status == 200


def test_metrics_are_prometheus_text(make_door: MakeDoor) -> None:
    answer = asyncio.run(make_door().ask("GET", "/metrics"))
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert answer.body.startswith(b"ray_trimoe_")


def test_a_job_from_submission_to_deletion(
    make_door: MakeDoor, keys: "Keys", make_request: Make
) -> None:
    door = make_door(keys.file)
    body = wire.encode_request(make_request(tenant="alpha"))

    async def scenario() -> None:
        mine = keys["alpha"]
        taken = await door.ask("POST", "/v1/jobs", body, wire.BINARY_TYPE, authorization=mine)
        place = taken.headers["location"]
        assert (taken.status, taken.json["status"]) == (202, "queued")
        assert place == f"/v1/jobs/{taken.json['id']}"
        early = await door.ask("GET", f"{place}/result", authorization=mine)
        assert early.status in {200, 409}
        await door.client.asked.wait()
        await asyncio.sleep(0)
        report = (await door.ask("GET", place, authorization=mine)).json
        assert (report["status"], report["error"], report["task"]) == ("done", None, "cards")
        assert report["created_at"] <= report["started_at"] <= report["finished_at"]
        assert (await door.ask("GET", "/v1/jobs", authorization=mine)).json == {"jobs": [report]}
        as_asked = await door.ask("GET", f"{place}/result", authorization=mine)
        assert wire.decode_response(as_asked.body).request_id == "r0"
        as_json = await door.ask(
            "GET", f"{place}/result", accept=wire.JSON_TYPE, authorization=mine
        )
        assert wire.response_from_json(as_json.body).request_id == "r0"
        for method, path in (("GET", place), ("GET", f"{place}/result"), ("DELETE", place)):
            other = await door.ask(method, path, authorization=keys["beta"])
            assert (other.status, other.json["error"]) == (404, "UnknownJobError")
        assert (await door.ask("GET", "/v1/jobs", authorization=keys["beta"])).json == {"jobs": []}
        gone = await door.ask("DELETE", place, authorization=mine)
        assert (gone.status, gone.body) == (204, b"")
        assert (await door.ask("GET", place, authorization=mine)).status == 404

    asyncio.run(scenario())
    assert door.client.requests[0].service_class is ServiceClass.BATCH
    assert door.recorder.labels_of("trimoe_jobs_total") == [{"outcome": "done"}]


def test_a_job_that_failed_says_why_without_internals(
    make_door: MakeDoor, make_request: Make
) -> None:
    door = make_door()
    door.client.error = ReplicaLostError("10.0.0.7 died")

    async def scenario() -> None:
        body = wire.request_to_json(make_request())
        place = (await door.ask("POST", "/v1/jobs", body)).headers["location"]
        await door.client.asked.wait()
        await asyncio.sleep(0)
        report = (await door.ask("GET", place)).json
        assert (report["status"], report["error"]["error"]) == ("failed", "ReplicaLostError")
        assert "10.0.0.7" not in json.dumps(report)
        result = await door.ask("GET", f"{place}/result")
        assert (result.status, result.json["error"]) == (409, "JobNotDoneError")

    asyncio.run(scenario())


def test_one_job_too_many_is_back_pressure(make_door: MakeDoor, make_request: Make) -> None:
    door = make_door(jobs=JobLimits(jobs_per_tenant=1))

    async def scenario() -> None:
        body = wire.request_to_json(make_request())
        first = await door.ask("POST", "/v1/jobs", body)
        second = await door.ask("POST", "/v1/jobs", body)
        assert (first.status, second.status, second.headers["retry-after"]) == (202, 429, "1")

    asyncio.run(scenario())


def test_a_jobs_deadline_may_be_a_day_and_is_an_hour_unless_given(
    make_door: MakeDoor, make_request: Make
) -> None:
    door = make_door()
    body = json.loads(wire.request_to_json(make_request()))
    del body["deadline_ms"]

    async def scenario() -> None:
        await door.ask("POST", "/v1/jobs", json.dumps(body).encode())
        await door.ask("POST", "/v1/jobs", json.dumps(body | {"deadline_ms": 1e12}).encode())
        await asyncio.sleep(0.01)

    asyncio.run(scenario())
    hour, day = (request.deadline_ms for request in door.client.requests)
    assert 3_590_000 < hour <= 3_600_000
    assert 86_390_000 < day <= 86_400_000


def test_the_end_of_the_application_cancels_its_jobs(
    make_door: MakeDoor, make_request: Make
) -> None:
    door = make_door()

    async def scenario() -> None:
        door.client.gate = asyncio.Event()
        async with door.api.router.lifespan_context(door.api):
            await door.ask("POST", "/v1/jobs", wire.request_to_json(make_request()))
            await door.client.asked.wait()
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert left == []

    asyncio.run(scenario())


def test_every_request_is_counted_by_template_and_known_tenant(
    make_door: MakeDoor, keys: "Keys", make_request: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    door = make_door(keys.file)
    body = wire.encode_request(make_request((2, 3), tenant="beta"))
    asyncio.run(
        door.ask(
            "POST",
            "/v1/infer",
            body,
            wire.BINARY_TYPE,
            authorization=keys["beta"],
            x_request_id="abc:1",
        )
    )
    asyncio.run(door.ask("GET", "/v1/models/nobody", authorization=keys["beta"]))
    asyncio.run(door.ask("GET", "/" + "x" * 50, authorization=keys["beta"]))
    counted = door.recorder.labels_of("trimoe_http_requests_total")
    assert [tuple(labels.values()) for labels in counted] == [
        ("/v1/infer", "200", "beta"),
        ("/v1/models/{name}", "404", "beta"),
        ("none", "404", "beta"),
    ]
    assert len(door.recorder.labels_of("trimoe_http_ms")) == 3
    line = json.loads(caplog.records[0].message)
    assert line.pop("ms") >= 0
    assert line == {
        "event": "http",
        "request_id": "abc:1",
        "method": "POST",
        "route": "/v1/infer",
        "status": "200",
        "tenant": "beta",
        "key": line["key"],
        "task": "cards",
        "rows": 5,
        "bytes_in": len(body),
        "error": "",
        "reason": "",
    }
    assert len(line["key"]) == 8
    assert keys.tokens["beta"] not in caplog.text


@pytest.mark.parametrize("echo", [True, False])
def test_the_request_id_comes_back_unless_a_proxy_does_it(make_door: MakeDoor, echo: bool) -> None:
    door = make_door(echo_request_id=echo)
    answer = asyncio.run(door.ask("GET", "/healthz", x_request_id="abc-1"))
    assert answer.headers.get("x-request-id") == ("abc-1" if echo else None)


def test_a_caller_who_leaves_is_noted_as_gone(make_door: MakeDoor, make_request: Make) -> None:
    door = make_door()

    async def scenario() -> None:
        door.client.gate = asyncio.Event()
        body = wire.encode_request(make_request())
        asking = asyncio.create_task(door.ask("POST", "/v1/infer", body, wire.BINARY_TYPE))
        await door.client.asked.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(scenario())
    (labels,) = door.recorder.labels_of("trimoe_http_requests_total")
    assert labels["status"] == "499"
