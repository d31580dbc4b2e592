"""The real thing on local Ray: Serve deployment, handle and HTTP clients, workers, SIGKILL."""

import asyncio
import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
    UnknownModelError,
)
from cluster.schemas import InferRequest, InferResponse

if TYPE_CHECKING:
    from cluster.loading import LoadedModel

pytestmark = pytest.mark.ray

Make = Callable[..., InferRequest]


@pytest.fixture(params=["handle", "http"])
def remote(request: pytest.FixtureRequest, platform_url: str) -> Iterator[Client]:
    if request.param == "http":
        client = HttpClient(platform_url)
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


def post(
    url: str, body: bytes | Iterator[bytes], content_type: str, path: str = "/v1/infer"
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    connection.request("POST", path, body=body, headers={"Content-Type": content_type})
    answer = connection.getresponse()
    status, text = answer.status, answer.read()
    connection.close()
    return status, text


def test_gateway_speaks_json_and_refuses_the_rest_clearly(
    platform_url: str, make_request: Make
) -> None:
    status, text = post(platform_url, wire.request_to_json(make_request()), "application/json")
    assert (status, wire.response_from_json(text).request_id) == (200, "r0")
    for body, kind, expected, name in (
        (b"{}", wire.JSON_TYPE, 400, b"InvalidRequestError"),
        (b"junk", wire.BINARY_TYPE, 400, b"InvalidRequestError"),
        (b"x", "application/x-pickle", 415, b"UnsupportedMediaType"),
        (
            wire.request_to_json(make_request(model_version="no")),
            wire.JSON_TYPE,
            404,
            b"UnknownModelError",
        ),
    ):
        status, text = post(platform_url, body, kind)
        assert status == expected
        assert name in text


def test_gateway_stops_reading_a_body_above_the_limit(platform_url: str) -> None:
    chunk = b"\0" * 2**20
    chunks = (chunk for _ in range(wire.MAX_MESSAGE_BYTES // len(chunk) + 1))
    status, text = post(platform_url, chunks, wire.BINARY_TYPE)  # chunked: no length is announced
    assert status == 413
    assert b"BodyTooLarge" in text


def test_status_command_reports_a_running_platform(platform_url: str, tmp_path: Path) -> None:
    from apps.cli import main

    report = tmp_path / "status.json"
    assert main(["status", "--url", platform_url, "--json", str(report)]) == 0
    assert '"model_version": "tiny-1"' in report.read_text()


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


def test_taken_port_and_altered_weights_are_one_line_before_ray_starts(
    platform_url: str, load_tiny: "Callable[[], LoadedModel]", tmp_path: Path
) -> None:
    from cluster.platform import PlatformConfig, start

    port = int(platform_url.rpartition(":")[2])
    with pytest.raises(ConfigurationError, match="expected a free port"):
        start(PlatformConfig(port=port), load=load_tiny)
    code = "import sys; from apps.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "serve", "--models", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "expected one model" in done.stderr
