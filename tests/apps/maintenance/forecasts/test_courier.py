"""Alerts on their way out: signed, in order, retried within bounds, over restarts."""

import hmac
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from apps.maintenance.forecasts import courier as couriers
from apps.maintenance.forecasts.courier import Courier
from apps.maintenance.forecasts.webhook import Webhook, sign
from cluster.errors import ConfigurationError, InvalidRequestError, UnavailableError

SECRET = b"a secret of both sides"


class Receiver(ThreadingHTTPServer):
    """A real receiver of alerts; answers with what ``answers`` says, then 200."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[int] = []
        self.taken: list[dict[str, object]] = []
        self.keys: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/alerts?site=1"


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        timestamp = self.headers["X-Trimoe-Timestamp"]
        wanted = f"sha256={sign(SECRET, timestamp, body)}"
        is_ours = hmac.compare_digest(wanted, self.headers["X-Trimoe-Signature"])
        status = self.server.answers.pop(0) if self.server.answers else 200
        self.server.keys.append(self.headers["Idempotency-Key"])
        if status == 200 and is_ours and abs(time.time() - float(timestamp)) < 60:
            self.server.taken.append(json.loads(body))
        self.send_response(status if is_ours else 401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,))
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def test_an_alert_arrives_signed_and_once(receiver: Receiver, tmp_path: Path) -> None:
    courier = Courier("webhook", tmp_path, Webhook(receiver.url, SECRET).send)
    courier.post({"id": "M1/pump/1/raised", "chance": 0.7})
    assert courier.deliver_one()
    assert not courier.deliver_one()
    courier.close()
    assert receiver.taken == [{"id": "M1/pump/1/raised", "chance": 0.7}]
    assert receiver.keys == ["M1/pump/1/raised"]


def test_another_secret_is_no_signature(receiver: Receiver) -> None:
    with pytest.raises(InvalidRequestError, match="expected HTTP 2xx, got 401"):
        Webhook(receiver.url, b"some other secret").send({"id": "x"})
    assert receiver.taken == []


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_receiver_in_trouble_is_asked_again_under_the_same_key(
    receiver: Receiver, tmp_path: Path, status: int
) -> None:
    receiver.answers = [status] * 3
    courier = Courier("webhook", tmp_path, Webhook(receiver.url, SECRET).send, first_pause_s=0.01)
    courier.post({"id": "a"})
    courier.post({"id": "b"})
    thread = threading.Thread(target=courier.run)
    thread.start()
    while courier.num_waiting:
        time.sleep(0.01)
    courier.stop()
    thread.join()
    courier.close()
    assert [each["id"] for each in receiver.taken] == ["a", "b"]
    assert receiver.keys == ["a"] * 4 + ["b"]


def test_a_refusal_is_set_aside_and_holds_nothing_up(receiver: Receiver, tmp_path: Path) -> None:
    receiver.answers = [422]
    courier = Courier("webhook", tmp_path, Webhook(receiver.url, SECRET).send)
    courier.post({"id": "a"})
    courier.post({"id": "b"})
    while courier.deliver_one():
        pass
    courier.close()
    assert [each["id"] for each in receiver.taken] == ["b"]
    (line,) = (tmp_path / "webhook-refused.jsonl").read_text().splitlines()
    assert json.loads(line)["message"] == {"id": "a"}
    assert (courier.num_sent, courier.num_refused) == (1, 1)


def test_after_its_time_a_message_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    courier = Courier("webhook", tmp_path, Webhook("http://127.0.0.1:9/", SECRET).send)
    courier.post({"id": "a"})
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9: expected an answer"):
        courier.deliver_one()
    assert courier.num_waiting == 1
    monkeypatch.setattr(couriers, "GIVE_UP_S", 0.0)
    assert courier.deliver_one()
    courier.close()
    assert "given up after" in (tmp_path / "webhook-refused.jsonl").read_text()


@pytest.mark.parametrize(("url", "secret"), [("ftp://host", SECRET), ("http://host", b"short")])
def test_what_cannot_be_used_is_refused(url: str, secret: bytes) -> None:
    with pytest.raises(ConfigurationError, match="webhook: expected"):
        Webhook(url, secret)


POSTER = """
import sys, threading
from pathlib import Path
from apps.maintenance.forecasts.courier import Courier
from apps.maintenance.forecasts.webhook import Webhook
folder, url, first = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
courier = Courier("webhook", folder, Webhook(url, b"a secret of both sides").send, 0.01)
threading.Thread(target=courier.run, daemon=True).start()
for n in range(first, 100_000):
    courier.post({"id": str(n)})
    print(n, flush=True)
"""


@pytest.mark.slow
def test_kills_lose_no_alert_and_keep_their_order(receiver: Receiver, tmp_path: Path) -> None:
    first = 0
    for round_ in range(5):
        receiver.answers = [503] * round_
        command = [sys.executable, "-c", POSTER, str(tmp_path), receiver.url, str(first)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as poster:
            assert poster.stdout is not None
            for _ in range(20 + 7 * round_):
                last = int(poster.stdout.readline())
            os.kill(poster.pid, signal.SIGKILL)
            last = max([last, *(int(line) for line in poster.stdout)])
        first = last + 1
    receiver.answers = []
    courier = Courier("webhook", tmp_path, Webhook(receiver.url, SECRET).send)
    while courier.deliver_one():
        pass
    courier.close()
    ids = [int(str(each["id"])) for each in receiver.taken]
    once = list(dict.fromkeys(ids))
    assert set(range(first)) <= set(once)
    assert once == sorted(once)
    assert len(ids) - len(once) <= 5  # at most one a kill, under its key
