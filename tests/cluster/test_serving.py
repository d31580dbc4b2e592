"""The real thing on local Ray: Serve deployment, handle and HTTP clients, workers, SIGKILL."""

import asyncio
import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from cluster import wire
from cluster.client import Client, HttpClient, infer_blocking
from cluster.errors import (
    ConfigurationError,
    DeadlineExceededError,
    InvalidRequestError,
    UnknownKeyError,
    UnknownModelError,
)
from cluster.loading import OneModel
from cluster.schemas import InferRequest, InferResponse

if TYPE_CHECKING:
    from cluster.loading import LoadedModel

pytestmark = pytest.mark.ray

Make = Callable[..., InferRequest]


@pytest.fixture(params=["handle", "http"])
def remote(
    request: pytest.FixtureRequest, platform_url: str, platform_key: str
) -> Iterator[Client]:
    if request.param == "http":
        client = HttpClient(platform_url, api_key=platform_key)
        yield client
        client.close()
    else:
        from cluster.handle import connect_blocking

        yield connect_blocking()


def replica_pid(name: str) -> int:
    """The process of the first replica of a deployment, from Ray's own state."""
    import ray

    names = ray.util.list_named_actors(all_namespaces=True)
    mine = next(each for each in names if f"#{name}#" in each["name"])
    actor: Any = ray.get_actor(mine["name"], namespace=mine["namespace"])
    return int(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())))


def test_remote_answers_equal_the_local_ones(
    remote: Client, load_tiny: "Callable[[], LoadedModel]", make_request: Make
) -> None:
    from cluster.local import LocalClient  # here: workers import this module and need no torch

    large = make_request(tuple([40] * 2500), deadline_ms=20_000.0)  # goes by object store
    assert large.features.nbytes > 2**20
    with LocalClient(load_tiny()) as local:
        for request in (make_request(), make_request((4, 4), "gauges"), large):
            ours, theirs = infer_blocking(local, request), infer_blocking(remote, request)
            np.testing.assert_allclose(theirs.outputs, ours.outputs, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(theirs.cu_seqlens, ours.cu_seqlens)
            np.testing.assert_array_equal(theirs.tokens_per_expert, ours.tokens_per_expert)
            assert theirs.request_id == request.request_id


def test_errors_of_the_replica_arrive_as_ours(remote: Client, make_request: Make) -> None:
    with pytest.raises(UnknownModelError, match="got 'tiny-2'") as caught:
        infer_blocking(remote, make_request(model_version="tiny-2"))
    assert type(caught.value) is UnknownModelError
    with pytest.raises(InvalidRequestError, match=r"expected features \[R, 3\]") as refused:
        infer_blocking(remote, make_request(features=np.zeros((6, 9), np.float32)))
    assert type(refused.value) is InvalidRequestError
    bad = make_request(deadline_ms=300.0)
    bad.features[0, 0] = 666.0
    with pytest.raises(DeadlineExceededError, match="within 300 ms"):
        infer_blocking(remote, bad)


class Caller:
    """Asks the gateway with a key, or without."""

    def __init__(self, url: str, key: str | None) -> None:
        self.place = urlsplit(url).netloc
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | Iterator[bytes] = b"",
        kind: str = wire.BINARY_TYPE,
        **headers: str,
    ) -> tuple[int, bytes, list[tuple[str, str]]]:
        """Return status, body and headers of the answer."""
        connection = http.client.HTTPConnection(self.place, timeout=30)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(
            method, path, body or None, {"Content-Type": kind, **self.headers, **named}
        )
        answer = connection.getresponse()
        found = answer.status, answer.read(), answer.getheaders()
        connection.close()
        return found

    def drip(self, path: str, timeout_s: float = 30.0) -> bytes:
        """Send a body of one byte every .2 s until there is an answer, and return that."""
        host, _, port = self.place.partition(":")
        with socket.create_connection((host, int(port)), timeout=timeout_s) as connection:
            headers = {**self.headers, "Host": host, "Content-Type": wire.BINARY_TYPE}
            lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
            head = f"POST {path} HTTP/1.1\r\n{''.join(lines)}Content-Length: 1000\r\n\r\n"
            connection.sendall(head.encode())
            end = time.monotonic() + timeout_s
            while time.monotonic() < end:
                if select.select([connection], [], [], 0.2)[0]:
                    return received(connection)
                connection.sendall(b"x")
        raise AssertionError("expected an answer")


def received(connection: socket.socket) -> bytes:
    """What the other side sent before it closed; unread bytes of ours make that a reset."""
    chunks = []
    with suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            chunks.append(chunk)
    return b"".join(chunks)


@pytest.fixture
def caller(platform_url: str, platform_key: str) -> Caller:
    return Caller(platform_url, platform_key)


def test_gateway_speaks_json_and_refuses_the_rest_clearly(
    caller: Caller, make_request: Make
) -> None:
    request = wire.request_to_json(make_request())
    status, text, headers = caller.ask(
        "POST", "/v1/infer", request, wire.JSON_TYPE, X_Request_Id="mine-1"
    )
    assert (status, wire.response_from_json(text).request_id) == (200, "r0")
    ids = [value for name, value in headers if name.lower() == "x-request-id"]
    assert ids == ["mine-1"]  # once, although Ray's proxy and the gateway both know it
    other = wire.request_to_json(make_request(model_version="no"))
    for body, kind, expected, name in (
        (b"{}", wire.JSON_TYPE, 400, b"InvalidRequestError"),
        (b"junk", wire.BINARY_TYPE, 400, b"InvalidRequestError"),
        (b"x", "application/x-pickle", 415, b"UnsupportedMediaType"),
        (other, wire.JSON_TYPE, 404, b"UnknownModelError"),
    ):
        status, text, _ = caller.ask("POST", "/v1/infer", body, kind)
        assert status == expected
        assert name in text


def test_gateway_stops_reading_a_body_above_the_limit(caller: Caller) -> None:
    chunk = b"\0" * 2**20
    chunks = (chunk for _ in range(wire.MAX_MESSAGE_BYTES // len(chunk) + 1))
    status, text, _ = caller.ask("POST", "/v1/infer", chunks)  # chunked: no length is announced
    assert status == 413
    assert b"BodyTooLarge" in text


def test_a_body_that_drips_is_cut_off_while_others_are_answered(
    caller: Caller, make_request: Make
) -> None:
    good = wire.encode_request(make_request())
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(caller.drip, "/v1/infer")
        statuses = set()
        while not slow.done():
            statuses.add(caller.ask("POST", "/v1/infer", good)[0])
            time.sleep(0.05)
    assert slow.result().startswith(b"HTTP/1.1 408 ")
    assert b"BodyTooSlow" in slow.result()
    assert statuses == {200}


def test_gateway_wants_a_key_and_its_tenant(
    caller: Caller, platform_url: str, make_request: Make
) -> None:
    body = wire.encode_request(make_request())
    for stranger in (Caller(platform_url, None), Caller(platform_url, "trimoe_guess")):
        status, text, _ = stranger.ask("POST", "/v1/infer", body)
        assert status == 401
        assert b"UnknownKeyError" in text
    assert Caller(platform_url, None).ask("GET", "/healthz")[0] == 200
    status, text, _ = caller.ask("POST", "/v1/infer", wire.encode_request(make_request(tenant="u")))
    assert (status, b"AccessDeniedError" in text) == (403, True)
    client = HttpClient(platform_url, api_key="trimoe_guess")
    with pytest.raises(UnknownKeyError, match="known key"):
        infer_blocking(client, make_request())
    client.close()


def test_a_job_runs_and_its_result_is_that_of_infer(caller: Caller, make_request: Make) -> None:
    body = wire.encode_request(make_request(tuple([40] * 300)))
    direct = wire.decode_response(caller.ask("POST", "/v1/infer", body)[1])
    status, text, headers = caller.ask("POST", "/v1/jobs", body)
    place = dict(headers)["location"]
    assert (status, place) == (202, f"/v1/jobs/{json.loads(text)['id']}")
    until(lambda: json.loads(caller.ask("GET", place)[1])["status"] == "done")
    result = wire.decode_response(caller.ask("GET", f"{place}/result")[1])
    np.testing.assert_allclose(result.outputs, direct.outputs, rtol=1e-5, atol=1e-6)
    assert caller.ask("DELETE", place)[0] == 204
    assert caller.ask("GET", place)[0] == 404


def test_metrics_of_the_gateway_reach_the_page_and_lines_the_log(caller: Caller) -> None:
    import ray

    caller.ask("GET", "/v1/models/../../etc/passwd", X_Request_Id="traversal-1")

    def is_counted() -> bool:
        status, page, _ = caller.ask("GET", "/metrics")
        assert status == 200
        lines = page.decode().splitlines()
        labels = ('route="/v1/models/{name}"', 'status="400"', 'tenant="t"')
        return any(
            line.startswith("ray_trimoe_http_requests_total{") and all(x in line for x in labels)
            for line in lines
        )

    until(is_counted, timeout_s=60)
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs" / "serve"  # type: ignore[attr-defined]
    text = "".join(path.read_text() for path in logs.glob("replica_*Gateway*"))
    assert '"request_id": "traversal-1"' in text


def test_status_command_reports_a_running_platform(
    platform_url: str, platform_key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apps.cli import main

    report = tmp_path / "status.json"
    arguments = ["status", "--url", platform_url, "--json", str(report)]
    assert main(arguments) == 0
    assert json.loads(report.read_text()) == {"status": "ready"}  # without a key no more
    monkeypatch.setenv("TRIMOE_API_KEY", platform_key)
    assert main(arguments) == 0
    assert json.loads(report.read_text())["model_version"] == "tiny-1"


def test_killed_replica_costs_no_request(platform_url: str, make_request: Make) -> None:
    from cluster.handle import connect_blocking

    remote = connect_blocking()

    async def scenario() -> list[InferResponse]:
        patient = replace(make_request(), deadline_ms=40_000.0)
        tasks = []
        for i in range(30):
            tasks.append(asyncio.create_task(remote.infer(patient)))
            if i == 10:
                os.kill(await asyncio.to_thread(replica_pid, "InferenceCore"), signal.SIGKILL)
            await asyncio.sleep(0.02)
        return await asyncio.gather(*tasks)

    assert len(asyncio.run(scenario())) == 30


def test_a_worker_needs_the_head_before_its_first_request_and_not_in_it(platform_url: str) -> None:
    """A router that starts in the first request blocks the event loop while the head is away."""
    import ray

    class Caller:
        async def is_ready(self) -> bool:
            from cluster.handle import connect

            return connect()._handle.is_initialized

    actor: Any = ray.remote(num_cpus=0)(Caller).remote()
    assert ray.get(actor.is_ready.remote())
    ray.kill(actor)


class TickingService:
    """Appends a line per tick to a file, through a request; says when it has drained."""

    def __init__(self, path: Path, index: int, client: Client, request: InferRequest) -> None:
        self.path, self.client, self.request = path / f"{index}.txt", client, request
        self.stopping = asyncio.Event()

    async def run(self) -> None:
        while not self.stopping.is_set():
            response = await self.client.infer(self.request)
            self.write(f"{os.getpid()} {response.model_version}")
            await asyncio.sleep(0.05)
        self.write("drained")

    def write(self, line: str) -> None:
        with self.path.open("a") as stream:
            stream.write(line + "\n")

    def request_stop(self) -> None:
        self.stopping.set()


class BrokenService:
    """Fails on every run."""

    def __init__(self, path: Path, error: Exception) -> None:
        self.path, self.error = path, error

    async def run(self) -> None:
        with self.path.open("a") as stream:
            stream.write("x")
        raise self.error

    def request_stop(self) -> None:
        """Nothing to stop."""


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "condition not reached in time"
        time.sleep(0.05)


def test_killed_worker_comes_back_and_all_drain_at_stop(
    platform_url: str, tmp_path: Path, make_request: Make
) -> None:
    from cluster.workers import run_workers

    request = make_request(deadline_ms=10_000.0)
    group = run_workers(lambda i, _n, client: TickingService(tmp_path, i, client, request), 2)

    def lines(index: int) -> list[str]:
        path = tmp_path / f"{index}.txt"
        return path.read_text().splitlines() if path.exists() else []

    until(lambda: min(len(lines(0)), len(lines(1))) > 3)
    victim, other = (place.pid for place in group.places())
    assert lines(0)[0] == f"{victim} tiny-1"
    os.kill(victim, signal.SIGKILL)
    until(lambda: lines(0)[-1].split()[0] not in {str(victim), ""} and len(lines(0)) > 3)
    assert not group.wait(0.1)
    assert group.num_restarts == (1, 0)
    assert {line.split()[0] for line in lines(1)} == {str(other)}
    assert group.stop(drain_s=20)
    assert [lines(0)[-1], lines(1)[-1]] == ["drained", "drained"]


def test_a_worker_that_does_not_come_up_holds_nobody_up(platform_url: str) -> None:
    import ray

    from cluster.worker import Worker
    from cluster.workers import RestartPolicy, WorkerGroup

    started = threading.Event()
    nowhere = ray.remote(num_cpus=1000)(Worker)

    def start(index: int, _node_id: str | None) -> object:
        started.set()
        return nowhere.remote(None, index)

    group = WorkerGroup(start, 1, RestartPolicy())
    assert started.wait(10)
    stopped = threading.Thread(target=group.stop, daemon=True)
    stopped.start()
    stopped.join(20)
    assert not stopped.is_alive()
    assert group.num_restarts == (0,)


@pytest.mark.parametrize(
    ("error", "num_runs"),
    [(ConfigurationError("no such topic: expected x, got y"), 1), (ValueError("boom"), 3)],
)
def test_service_that_keeps_failing_is_given_up_with_its_error(
    platform_url: str, tmp_path: Path, error: Exception, num_runs: int
) -> None:
    from cluster.workers import RestartPolicy, run_workers

    path = tmp_path / "runs"
    policy = RestartPolicy(max_failures=2, first_pause_s=0.01)
    group = run_workers(lambda *_: BrokenService(path, error), 1, policy=policy)
    with pytest.raises(Exception, match=str(error)) as caught:
        group.wait(30)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ConfigurationError) == (num_runs == 1)
    assert path.read_text() == "x" * num_runs
    group.stop(drain_s=1)


def test_a_gateway_without_keys_starts_only_where_it_is_said_to_be_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What protects a deployment file that names the gateway and forgets its keys."""
    from cluster.gateway import GatewayReplica, GatewaySettings

    core: Any = None
    monkeypatch.delenv("TRIMOE_API_KEYS", raising=False)
    for settings in (None, GatewaySettings()):
        with pytest.raises(ConfigurationError, match="set TRIMOE_API_KEYS"):
            GatewayReplica(core, settings)
    GatewayReplica(core, GatewaySettings(is_open=True))
    monkeypatch.setenv("TRIMOE_API_KEYS", str(tmp_path / "none.json"))
    with pytest.raises(ConfigurationError, match="expected a JSON file of API keys"):
        GatewayReplica(core)


def test_taken_port_and_altered_weights_are_one_line_before_ray_starts(
    platform_url: str, load_tiny: "Callable[[], LoadedModel]", tmp_path: Path
) -> None:
    from cluster.platform import PlatformConfig, start

    port = int(platform_url.rpartition(":")[2])
    with pytest.raises(ConfigurationError, match="expected a free port"):
        start(PlatformConfig(port=port), source=OneModel(load_tiny))
    code = "import sys; from apps.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "serve", "--models", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "expected one model" in done.stderr
