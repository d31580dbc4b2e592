"""What must not get in: refused, told in one line, logged, and nobody else notices."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

import pytest

from cluster import wire
from cluster.access import MAX_HEADER_BYTES, MAX_HEADERS, MAX_PATH_BYTES
from cluster.body import BodyLimits
from cluster.schemas import InferRequest

if TYPE_CHECKING:
    from tests.cluster.conftest import Answer, Door, Keys

MakeDoor = Callable[..., "Door"]
Make = Callable[..., InferRequest]
ROUTES = [
    ("POST", "/v1/infer"),
    ("POST", "/v1/score"),
    ("POST", "/v1/forecast"),
    ("POST", "/v1/jobs"),
    ("GET", "/v1/jobs"),
    ("GET", "/v1/jobs/x"),
    ("GET", "/v1/jobs/x/result"),
    ("DELETE", "/v1/jobs/x"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/stable"),
    ("GET", "/metrics"),
    ("GET", "/no/such/route"),
    ("GET", "/healthz/"),
]


class Untouched(AsyncIterator[bytes]):
    """A body that must not be read."""

    async def __anext__(self) -> bytes:
        raise AssertionError("expected no byte to be read")


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    """The gateway's log lines, parsed."""
    return [json.loads(record.message) for record in caplog.records]


def is_problem(answer: "Answer", status: int, name: str) -> bool:
    """Whether an answer is a refusal in our form, in one line."""
    problem = answer.json
    return (
        (answer.status, problem["error"]) == (status, name)
        and set(problem) == {"error", "message"}
        and "\n" not in problem["message"]
        and "Traceback" not in problem["message"]
    )


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_without_a_known_key_nothing_is_answered_and_no_body_is_read(
    make_door: MakeDoor, keys: "Keys", method: str, path: str
) -> None:
    door = make_door(keys.file)
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        read += 1
        yield b"{}"

    for num_before, header in enumerate(
        (None, "Bearer nobody", "Basic eDp5", "Bearer", "\xff\xfe")
    ):
        headers = [] if header is None else [(b"authorization", header.encode("latin-1"))]
        answer = asyncio.run(door.ask(method, path, body(), raw_headers=headers))
        assert is_problem(answer, 401, "UnknownKeyError"), header
        assert answer.headers["www-authenticate"] == "Bearer"
        assert (read, door.client.requests) == (0, []), header
        refused = door.recorder.labels_of("trimoe_refused_total")
        assert refused == [{"reason": "key"}] * (num_before + 1), header


def test_two_keys_in_one_request_are_none(make_door: MakeDoor, keys: "Keys") -> None:
    headers = [(b"authorization", keys[name].encode()) for name in ("alpha", "beta")]
    door = make_door(keys.file)
    answer = asyncio.run(door.ask("GET", "/v1/models", raw_headers=headers))
    assert is_problem(answer, 401, "UnknownKeyError")


def test_a_probe_needs_no_key_and_learns_nothing(make_door: MakeDoor, keys: "Keys") -> None:
    door = make_door(keys.file)
    assert asyncio.run(door.ask("GET", "/healthz")).json == {"status": "ok"}
    assert asyncio.run(door.ask("GET", "/readyz")).json == {"status": "ready"}
    known = asyncio.run(door.ask("GET", "/readyz", authorization=keys["delta"])).json
    assert known["model_version"] == "fake-1"
    wrong = asyncio.run(door.ask("GET", "/readyz", authorization="Bearer x"))
    assert is_problem(wrong, 401, "UnknownKeyError")


@pytest.mark.parametrize("path", ["/v1/infer", "/v1/jobs"])
def test_a_request_for_another_tenant_or_task_is_refused(
    make_door: MakeDoor, keys: "Keys", make_request: Make, path: str
) -> None:
    door = make_door(keys.file)
    for tenant, task in (("alpha", "cards"), ("beta", "gauges")):
        request = make_request((2,), task, tenant=tenant)
        body = wire.encode_request(request)
        answer = asyncio.run(
            door.ask("POST", path, body, wire.BINARY_TYPE, authorization=keys["beta"])
        )
        assert is_problem(answer, 403, "AccessDeniedError")
    assert door.client.requests == []


def test_a_key_without_the_role_is_refused(
    make_door: MakeDoor, keys: "Keys", make_request: Make
) -> None:
    door = make_door(keys.file)
    body = wire.encode_request(make_request(tenant="delta"))
    for method, path in (("POST", "/v1/jobs"), ("GET", "/v1/jobs"), ("GET", "/metrics")):
        answer = asyncio.run(
            door.ask(method, path, body, wire.BINARY_TYPE, authorization=keys["delta"])
        )
        assert is_problem(answer, 403, "AccessDeniedError")
    assert asyncio.run(door.ask("GET", "/metrics", authorization=keys["alpha"])).status == 200


def test_a_gigabyte_is_refused_by_its_announcement(make_door: MakeDoor, keys: "Keys") -> None:
    door = make_door(keys.file)

    for kind in (wire.BINARY_TYPE, wire.JSON_TYPE):
        for method in ("POST", "GET"):
            answer = asyncio.run(
                door.ask(
                    method,
                    "/v1/infer",
                    Untouched(),
                    kind,
                    authorization=keys["alpha"],
                    content_length=str(2**30),
                )
            )
            assert is_problem(answer, 413, "BodyTooLarge")
            assert answer.headers["connection"] == "close"


@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        (wire.BINARY_TYPE, BodyLimits().max_bytes),
        (wire.JSON_TYPE, BodyLimits().max_json_bytes),
    ],
)
def test_a_gigabyte_in_chunks_is_read_up_to_the_limit_and_no_further(
    make_door: MakeDoor, keys: "Keys", kind: str, limit: int
) -> None:
    door = make_door(keys.file)
    chunk = bytes(2**20)
    num_sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal num_sent
        for _ in range(1024):
            num_sent += 1
            yield chunk

    answer = asyncio.run(door.ask("POST", "/v1/jobs", body(), kind, authorization=keys["alpha"]))
    assert is_problem(answer, 413, "BodyTooLarge")
    assert num_sent == limit // len(chunk) + 1
    assert door.recorder.labels_of("trimoe_refused_total") == [{"reason": "body"}]


@pytest.mark.parametrize("length", ["-1", "5 5", "0x10", "1e3", "\xb2"])
def test_a_length_that_is_none_is_refused(make_door: MakeDoor, length: str) -> None:
    answer = asyncio.run(make_door().ask("POST", "/v1/infer", b"{}", content_length=length))
    assert is_problem(answer, 400, "InvalidRequestError")


def test_headers_that_two_layers_could_read_differently_are_refused(
    make_door: MakeDoor, make_request: Make
) -> None:
    good = wire.request_to_json(make_request())
    for name, values in (
        (b"content-type", (wire.JSON_TYPE, wire.BINARY_TYPE)),
        (b"content-length", (str(len(good)), str(len(good)))),
    ):
        once, twice = ([(name, value.encode()) for value in values[:n]] for n in (1, 2))
        door = make_door()
        accepted = asyncio.run(door.ask("POST", "/v1/infer", good, raw_headers=once))
        assert accepted.status == 200
        refused = asyncio.run(door.ask("POST", "/v1/infer", good, raw_headers=twice))
        assert is_problem(refused, 400, "InvalidRequestError")


def test_a_body_that_drips_is_cut_off_and_others_are_answered_meanwhile(
    make_door: MakeDoor, make_request: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    door = make_door(body=BodyLimits(grace_s=0.5, min_bytes_per_s=1000.0))
    good = wire.encode_request(make_request())

    async def drip() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0.02)

    async def scenario() -> "tuple[Answer, list[Answer]]":
        slow = asyncio.create_task(door.ask("POST", "/v1/infer", drip(), wire.BINARY_TYPE))
        others = []
        while not slow.done():
            others.append(await door.ask("POST", "/v1/infer", good, wire.BINARY_TYPE))
            await asyncio.sleep(0.01)
        return await slow, others

    slow, others = asyncio.run(scenario())
    assert is_problem(slow, 408, "BodyTooSlow")
    assert slow.headers["connection"] == "close"
    assert len(others) > 2
    assert {answer.status for answer in others} == {200}
    (refused,) = [line for line in lines(caplog) if line["reason"]]
    assert (refused["status"], refused["reason"]) == ("408", "body")


def test_a_fast_body_may_take_longer_than_the_grace_but_not_for_ever(
    make_door: MakeDoor, make_request: Make
) -> None:
    body = wire.encode_request(make_request())

    async def in_parts(pause_s: float) -> AsyncIterator[bytes]:
        for i in range(0, len(body), 40):
            yield body[i : i + 40]
            await asyncio.sleep(pause_s)

    quick = make_door(body=BodyLimits(grace_s=0.05, min_bytes_per_s=100.0))
    assert (
        asyncio.run(quick.ask("POST", "/v1/infer", in_parts(0.02), wire.BINARY_TYPE)).status == 200
    )
    capped = make_door(body=BodyLimits(max_s=0.05, min_bytes_per_s=100.0))
    answer = asyncio.run(capped.ask("POST", "/v1/infer", in_parts(0.02), wire.BINARY_TYPE))
    assert is_problem(answer, 408, "BodyTooSlow")


def test_too_many_bodies_at_once_are_refused_and_room_comes_back(
    make_door: MakeDoor, make_request: Make
) -> None:
    body = wire.encode_request(make_request())
    door = make_door(body=BodyLimits(total_bytes=len(body) + 10, tenant_bytes=len(body) + 10))

    async def scenario() -> "tuple[Answer, Answer, Answer]":
        door.client.gate = asyncio.Event()
        held = asyncio.create_task(door.ask("POST", "/v1/infer", body, wire.BINARY_TYPE))
        await door.client.asked.wait()
        refused = await door.ask("POST", "/v1/infer", body, wire.BINARY_TYPE)
        door.client.gate.set()
        return refused, await held, await door.ask("POST", "/v1/infer", body, wire.BINARY_TYPE)

    refused, held, later = asyncio.run(scenario())
    assert is_problem(refused, 429, "QueueFullError")
    assert refused.headers["retry-after"] == "1"
    assert (held.status, later.status) == (200, 200)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"TRM1",
        b"TRM1" + b"\xff" * 64,
        b"\x80\x04\x95" + b"pickle" * 10,
        b"\x93NUMPY\x01\x00",
        b"PK\x03\x04" + bytes(64),
    ],
    ids=["empty", "prefix", "lengths", "pickle", "npy", "zip"],
)
def test_a_malformed_binary_is_refused(make_door: MakeDoor, body: bytes) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield body

    door = make_door()
    for path in ("/v1/infer", "/v1/jobs"):
        answer = asyncio.run(door.ask("POST", path, chunks(), wire.BINARY_TYPE))
        assert is_problem(answer, 400, "InvalidRequestError")
    assert door.client.requests == []


def test_a_flipped_bit_anywhere_is_refused(make_door: MakeDoor, make_request: Make) -> None:
    good = wire.encode_request(make_request())
    door = make_door()
    for place in range(0, len(good), 17):
        bad = bytearray(good)
        bad[place] ^= 0x10
        answer = asyncio.run(door.ask("POST", "/v1/infer", bytes(bad), wire.BINARY_TYPE))
        assert is_problem(answer, 400, "InvalidRequestError")


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"1" * 5000,
        b"\xff\xfe{}",
        b'{"request_id": "\\ud800", "task": "cards"}',
        b"NaN",
        b"null",
        b'{"task": {}, "request_id": 1}',
    ],
    ids=["lists", "objects", "digits", "utf16", "surrogate", "nan", "null", "types"],
)
@pytest.mark.parametrize("path", ["/v1/infer", "/v1/score", "/v1/jobs"])
def test_json_that_breaks_parsers_is_refused(make_door: MakeDoor, path: str, body: bytes) -> None:
    answer = asyncio.run(make_door().ask("POST", path, body))
    assert is_problem(answer, 400, "InvalidRequestError")


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "..%2F..%2Fetc%2Fpasswd",
        "..",
        "%2e%2e",
        "a/../b",
        "a..b",
        ".hidden",
        "%00",
        "a" * 129,
        "caf%C3%A9",
        "$(id)",
        "a%20b",
    ],
)
def test_a_model_name_is_a_plain_word(make_door: MakeDoor, make_request: Make, name: str) -> None:
    door = make_door()
    answer = asyncio.run(door.ask("GET", f"/v1/models/{name}"))
    assert is_problem(answer, 400, "InvalidRequestError")
    if "%" not in name and len(name) <= 128:
        body = wire.encode_request(make_request(model_version=name))
        answer = asyncio.run(door.ask("POST", "/v1/infer", body, wire.BINARY_TYPE))
        assert is_problem(answer, 400, "InvalidRequestError")
    assert door.client.requests == []


@pytest.mark.parametrize(
    "value",
    ["", "soon", "-5", "0", "nan", "inf", "1e400", "86400001", "5 ms", "0x10", "\xe9", "1,5"],
)
@pytest.mark.parametrize("path", ["/v1/infer", "/v1/jobs"])
def test_a_deadline_header_of_garbage_is_refused(
    make_door: MakeDoor, make_request: Make, path: str, value: str
) -> None:
    body = wire.encode_request(make_request())
    door = make_door()
    answer = asyncio.run(door.ask("POST", path, body, wire.BINARY_TYPE, x_deadline_ms=value))
    assert is_problem(answer, 400, "InvalidRequestError")
    assert door.client.requests == []


@pytest.mark.parametrize("value", ["", "a b", 'x"}\n{"', "\xe9", "a" * 129, "${jndi:x}"])
def test_a_request_id_that_could_forge_a_log_line_is_refused(
    make_door: MakeDoor, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    answer = asyncio.run(make_door().ask("GET", "/healthz", x_request_id=value))
    assert is_problem(answer, 400, "InvalidRequestError")
    (line,) = lines(caplog)
    assert line["request_id"] == answer.headers["x-request-id"] != value


def test_headers_and_paths_without_end_are_refused(make_door: MakeDoor) -> None:
    door = make_door()
    many = [(f"x-{i}".encode(), b"1") for i in range(MAX_HEADERS + 1)]
    answer = asyncio.run(door.ask("GET", "/healthz", raw_headers=many))
    assert is_problem(answer, 431, "HeadersTooLarge")
    long = asyncio.run(door.ask("GET", "/healthz", cookie="x" * MAX_HEADER_BYTES))
    assert is_problem(long, 431, "HeadersTooLarge")
    path = asyncio.run(door.ask("GET", "/healthz?" + "x" * MAX_PATH_BYTES))
    assert is_problem(path, 414, "PathTooLong")


@pytest.mark.parametrize("kind", ["application/x-pickle", "text/plain", "multipart/form-data", ""])
def test_a_type_nobody_reads_is_refused_before_its_body(make_door: MakeDoor, kind: str) -> None:
    for path in ("/v1/infer", "/v1/score", "/v1/jobs"):
        answer = asyncio.run(make_door().ask("POST", path, Untouched(), kind))
        assert is_problem(answer, 415, "UnsupportedMediaType")
    packed = asyncio.run(make_door().ask("POST", "/v1/infer", Untouched(), content_encoding="gzip"))
    assert is_problem(packed, 415, "UnsupportedMediaType")


def test_neither_answers_nor_logs_tell_what_broke_inside_or_what_was_sent(
    make_door: MakeDoor, make_request: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    door = make_door()
    request = make_request()
    request.features[0, 0] = 4242.125
    door.client.error = ValueError("4242.125 in /srv/models/secret.bin")
    answer = asyncio.run(door.ask("POST", "/v1/infer", wire.request_to_json(request)))
    assert is_problem(answer, 500, "InternalError")
    text = answer.body.decode() + caplog.text
    assert "4242" not in text
    assert "secret" not in text
    assert "ValueError" in caplog.text


def test_every_refusal_is_one_line_with_the_caller_and_without_the_body(
    make_door: MakeDoor, keys: "Keys", make_request: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    door = make_door(keys.file)
    body = wire.request_to_json(make_request(tenant="beta", request_id="patient-17"))
    asyncio.run(
        door.ask("POST", "/v1/infer", body, authorization=keys["alpha"], x_request_id="seen")
    )
    (line,) = lines(caplog)
    expected = {"event": "http", "request_id": "seen", "status": "403", "tenant": "alpha"}
    assert expected.items() <= line.items()
    assert line["reason"] == "key"
    assert "patient-17" not in caplog.text
    assert keys.tokens["alpha"] not in caplog.text
