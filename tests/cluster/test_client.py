"""The HTTP client against a real socket: errors by status, retries, deadlines, reuse."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from cluster import wire
from cluster.client import HttpClient, infer_blocking
from cluster.errors import (
    AccessDeniedError,
    ConfigurationError,
    DeadlineExceededError,
    InvalidRequestError,
    UnknownKeyError,
    UnknownModelError,
)
from cluster.loading import LoadedModel
from cluster.local import LocalClient
from cluster.schemas import InferRequest

Make = Callable[..., InferRequest]


class Door(ThreadingHTTPServer):
    """Answers with the tiny model after the failures it was told to make."""

    daemon_threads = True

    def __init__(self, client: LocalClient) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.client = client
        self.failures: list[tuple[int, str]] = []
        self.peers: set[int] = set()
        self.keys: set[str | None] = set()
        self.refuses_unread = False
        self.hang = threading.Event()
        self.hang.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Door

    def do_POST(self) -> None:
        self.server.keys.add(self.headers["Authorization"])
        if self.server.refuses_unread:
            self.close_connection = True
            self.answer(413, b'{"error": "BodyTooLarge", "message": "send less"}')
            return
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.peers.add(self.client_address[1])
        self.server.hang.wait(5)
        if self.server.failures:
            status, name = self.server.failures.pop(0)
            if not status:
                self.close_connection = True  # dies without a word
                return
            self.answer(status, json.dumps({"error": name, "message": f"because {name}"}).encode())
        else:
            response = infer_blocking(self.server.client, wire.decode_request(body))
            self.answer(200, wire.encode_response(response))

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


@pytest.fixture
def door(load_tiny: Callable[[], LoadedModel]) -> Iterator[Door]:
    with LocalClient(load_tiny()) as local, Door(local) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def client(door: Door) -> Iterator[HttpClient]:
    client = HttpClient(door.url)
    yield client
    client.close()


def test_answer_equals_the_local_one_and_the_connection_is_kept(
    door: Door, client: HttpClient, make_request: Make
) -> None:
    for seed in range(3):
        request = make_request(seed=seed)
        ours = infer_blocking(client, request)
        np.testing.assert_array_equal(ours.outputs, infer_blocking(door.client, request).outputs)
    assert len(door.peers) == 1


def test_death_back_pressure_and_unavailability_are_retried(
    door: Door, client: HttpClient, make_request: Make
) -> None:
    door.failures = [(0, ""), (429, "QueueFullError"), (503, "ReplicaLostError")]
    assert infer_blocking(client, make_request()).model_version == "tiny-1"
    assert not door.failures


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, InvalidRequestError), (413, InvalidRequestError), (404, UnknownModelError)],
)
def test_final_status_is_our_error_with_its_message(
    door: Door, client: HttpClient, make_request: Make, status: int, kind: type[Exception]
) -> None:
    door.failures = [(status, "reason")]
    with pytest.raises(kind, match="because reason"):
        infer_blocking(client, make_request())


def test_a_refusal_before_the_body_was_read_is_heard(
    door: Door, client: HttpClient, make_request: Make
) -> None:
    door.refuses_unread = True
    large = make_request((40,) * 40_000)  # more than the sockets between us hold
    assert large.features.nbytes > 16 * 2**20
    with pytest.raises(InvalidRequestError, match="send less"):
        infer_blocking(client, large)
    door.refuses_unread = False
    assert infer_blocking(client, make_request()).request_id == "r0"


def test_a_key_is_sent_and_its_refusal_is_final(door: Door, make_request: Make) -> None:
    client = HttpClient(door.url, api_key="trimoe_x")
    infer_blocking(client, make_request())
    assert door.keys == {"Bearer trimoe_x"}
    for status, kind in ((401, UnknownKeyError), (403, AccessDeniedError)):
        door.failures = [(status, "reason")]
        with pytest.raises(kind, match="because reason"):
            infer_blocking(client, make_request())
    client.close()


def test_silent_server_ends_at_the_deadline(
    door: Door, client: HttpClient, make_request: Make
) -> None:
    door.hang.clear()
    with pytest.raises(DeadlineExceededError, match="no answer within 100 ms"):
        infer_blocking(client, make_request(deadline_ms=100.0))
    door.hang.set()


def test_absent_server_is_named(make_request: Make) -> None:
    with pytest.raises(DeadlineExceededError, match=r"127\.0\.0\.1:9: expected an answer"):
        infer_blocking(HttpClient("http://127.0.0.1:9"), make_request(deadline_ms=50.0))


def test_url_without_scheme_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="got 'localhost:8000'"):
        HttpClient("localhost:8000")
