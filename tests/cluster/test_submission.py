"""A config onto a cluster, against a stand-in for Ray's dashboard (tests/system has a real one)."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cluster import submission
from cluster.errors import ConfigurationError, UnavailableError

CONFIG = {"applications": [{"name": "trimoe", "import_path": "a:b"}]}


class Dashboard(BaseHTTPRequestHandler):
    """The three calls of Ray's dashboard that are made; the server holds what it should say."""

    def do_GET(self) -> None:
        state: dict[str, Any] = self.server.state  # type: ignore[attr-defined]
        if self.path == "/api/ray/version":
            self.answer(state.get("version_status", 200), {"ray_version": "2.60.0"})
        else:
            steps = state["steps"]
            self.answer(200, {"applications": steps.pop(0) if len(steps) > 1 else steps[0]})

    def do_PUT(self) -> None:
        state: dict[str, Any] = self.server.state  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        state["put"] = (self.path, json.loads(body))
        self.answer(state.get("put_status", 200), {"why": "no such import"})

    def answer(self, status: int, body: object) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture
def dashboard(ray_imported: None) -> Iterator[tuple[str, dict[str, Any]]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Dashboard)
    server.state = {"steps": [{}]}  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", server.state  # type: ignore[attr-defined]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "LOOK_S", 0.01)


def app(status: str, message: str = "") -> dict[str, dict[str, str]]:
    return {"trimoe": {"status": status, "message": message}}


def test_the_config_is_put_and_its_way_to_running_is_told(
    dashboard: tuple[str, dict[str, Any]],
) -> None:
    url, state = dashboard
    state["steps"] = [{}, app("DEPLOYING"), app("DEPLOYING"), app("RUNNING")]
    client = submission.connect(url)
    submission.submit(client, CONFIG)
    assert state["put"] == ("/api/serve/applications/", CONFIG)
    told: list[str] = []
    assert submission.await_running(client, frozenset({"trimoe"}), 10, told.append)
    assert told == ["trimoe: DEPLOYING", "trimoe: RUNNING"]


def test_a_failed_deployment_is_told_with_its_reason(
    dashboard: tuple[str, dict[str, Any]],
) -> None:
    url, state = dashboard
    state["steps"] = [app("DEPLOYING"), app("DEPLOY_FAILED", "weights\n  altered")]
    told: list[str] = []
    client = submission.connect(url)
    assert not submission.await_running(client, frozenset({"trimoe"}), 10, told.append)
    assert told[-1] == "trimoe: DEPLOY_FAILED weights altered"


def test_a_wait_has_an_end(dashboard: tuple[str, dict[str, Any]]) -> None:
    url, state = dashboard
    state["steps"] = [app("DEPLOYING")]
    with pytest.raises(UnavailableError, match=r"expected trimoe to run within 0\.05 s"):
        submission.await_running(submission.connect(url), frozenset({"trimoe"}), 0.05)


def test_a_refused_config_and_a_wrong_token_say_so(dashboard: tuple[str, dict[str, Any]]) -> None:
    url, state = dashboard
    state["put_status"] = 400
    with pytest.raises(ConfigurationError, match="no such import"):
        submission.submit(submission.connect(url), CONFIG)
    state["version_status"] = 401
    with pytest.raises(ConfigurationError, match="expected the cluster's token"):
        submission.connect(url)
    state["version_status"] = 404
    with pytest.raises(UnavailableError, match="expected a Ray dashboard"):
        submission.connect(url)


def test_where_nothing_answers_the_error_comes_at_once() -> None:
    with pytest.raises(UnavailableError, match="expected the Ray dashboard, nothing answers"):
        submission.connect("http://127.0.0.1:9")


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://h:1", "http://", "http://h:x", ""])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigurationError, match="expected http://HOST:PORT"):
        submission.connect(address)
