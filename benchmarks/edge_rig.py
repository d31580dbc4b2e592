"""A signed repository and a web server that may be hostile: shared by tests and ``edge_fleet``."""

import contextlib
import http.server
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

import uvicorn
from fastapi import FastAPI
from securesystemslib.signer import CryptoSigner

from apps.maintenance.edge.agent import Agent, Clocks
from apps.maintenance.edge.settings import ROOT, Settings
from apps.maintenance.edge.sources import MemorySource, Source, Window
from apps.maintenance.edge.watch import HealthLimits
from apps.maintenance.sync.control import Control
from apps.maintenance.sync.fetcher import HttpFetcher, Patience
from apps.maintenance.sync.outcomes import Outcome
from apps.maintenance.sync.repository import Repository
from apps.maintenance.sync.server import create_app
from apps.maintenance.sync.trust import Mirror
from benchmarks.edge_models import FEATURES

QUICK = Patience(total_s=3, stall_s=0.5, max_tries=3, first_pause_s=0.01, longest_pause_s=0.05)
ONE, TWO, THREE = (f"forecast-both/{version}.tar" for version in (1, 2, 3))
NUM_KEYS: Mapping[str, int] = {"root": 3, "targets": 3, "snapshot": 1, "timestamp": 1}
THRESHOLDS: Mapping[str, int] = {"root": 2, "targets": 2, "snapshot": 1, "timestamp": 1}


class Calendar:
    """A calendar that tests move."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        """Return the time."""
        return datetime.now(UTC) + self.ahead


class SignedFolder:
    """A repository with all its keys.

    Args:
        folder: Where it lies; an empty one is made if there is none.
        signers: Keys by role; new ones by default.
    """

    def __init__(
        self, folder: Path, signers: Mapping[str, Sequence[CryptoSigner]] | None = None
    ) -> None:
        self.folder = folder
        self.calendar = Calendar()
        self.signers = signers or {
            role: [CryptoSigner.generate_ed25519() for _ in range(num)]
            for role, num in NUM_KEYS.items()
        }
        if not folder.exists():
            Repository.create(folder, self.signers, THRESHOLDS, self.calendar)
        every = [signer for role in sorted(self.signers) for signer in self.signers[role]]
        self.repository = Repository(folder, every, self.calendar)

    @property
    def root(self) -> bytes:
        """What a box is set up with."""
        return (self.folder / "metadata" / "1.root.json").read_bytes()


BRISK = Settings(
    agent="box",
    group="plant",
    sync_s=0.05,
    cap_bytes=16 * 2**20,
    health_port=0,
    limits=HealthLimits(window_s=0.1, min_forecasts=5),
)


def windows(num: int, *, regime: float = 0.0, wear: float = 0.3) -> Sequence[Window]:
    """Return windows of ``num`` machines, as in ordinary operation or in another regime."""
    values = dict.fromkeys(FEATURES, 0.1) | {"wear": wear, "regime": regime}
    return [Window(f"m{idx}", "2026-01-01T00:00:00Z", values) for idx in range(num)]


def set_up_box(state: Path, root: bytes, settings: Settings = BRISK) -> None:
    """Write what ``trimoe edge init`` writes."""
    state.mkdir(parents=True, exist_ok=True)
    (state / ROOT).write_bytes(root)
    settings.write(state)


Answer = Callable[["Request"], None]


class Request(http.server.BaseHTTPRequestHandler):
    """A request to the server below; what answers it is the server's ``answer``."""

    protocol_version = "HTTP/1.1"
    server: "FileServer"

    def do_GET(self) -> None:
        """Answer as the server was told to."""
        with contextlib.suppress(ConnectionError):
            self.server.answer(self)

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    @property
    def file(self) -> Path:
        """The file that was asked for."""
        return self.server.folder / self.path.removeprefix("/repository/").lstrip("/")

    @property
    def offset(self) -> int:
        """Where it should begin."""
        text = self.headers.get("Range", "bytes=0-")
        return int(text.removeprefix("bytes=").removesuffix("-"))

    def send_bytes(self, data: bytes, *, upto: int | None = None) -> None:
        """Send a file as a good server would; with ``upto``, break off at that byte of it."""
        offset = self.offset
        if offset and offset >= len(data):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if offset else 200)
        if offset:
            self.send_header("Content-Range", f"bytes {offset}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - offset))
        self.end_headers()
        self.wfile.write(data[offset:upto])
        if upto is not None:
            self.close_connection = True

    def send_file(self) -> None:
        """Send the file that was asked for, or 404."""
        if self.file.is_file():
            self.send_bytes(self.file.read_bytes())
        else:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def send_endless(self) -> None:
        """Send zeros until the other side closes."""
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(bytes(65536))

    def send_slowly(self) -> None:
        """Send one byte at a time, faster than a stall and far too slow for the whole."""
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        for _ in range(100_000):
            self.wfile.write(b".")
            self.wfile.flush()
            time.sleep(0.05)


class FileServer(http.server.ThreadingHTTPServer):
    """Serves a folder on the loopback address, by default as a good server would."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path, answer: Answer = Request.send_file) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.folder = folder
        self.answer = answer
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        """Its root."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that were killed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def answering(self, answer: Answer) -> Iterator[None]:
        """Answer otherwise for a while."""
        before, self.answer = self.answer, answer
        try:
            yield
        finally:
            self.answer = before


class Box:
    """An agent that is told what to take.

    Args:
        state: Its folder, set up.
        url: Of the server where it reads.
        source: Of its windows; one in memory by default, for ``feed``.
    """

    def __init__(self, state: Path, url: str, source: Source | None = None) -> None:
        self.state = state
        self.calendar = Calendar()
        self.url = url
        self.memory = MemorySource()
        self.source = source or self.memory
        self.open()

    def open(self) -> None:
        """Start the agent, as after a restart."""
        clocks = Clocks(now=self.calendar)
        self.agent = Agent(self.state, self.source, patience=QUICK, clocks=clocks)
        self.agent.start()
        self.slots = self.agent.slots

    def close(self) -> None:
        """End it."""
        self.agent.outbox.close()

    def take(self, wanted: str | None, patience: Patience = QUICK) -> Outcome | None:
        """Make one attempt over HTTP."""
        return self.agent.update_from(
            Mirror(f"{self.url}/repository", HttpFetcher(self.state / "parts", patience)),
            wanted,
        )

    def confirm(self) -> None:
        """Let the watch end, well or not."""
        while self.agent.serving.is_watching:
            self.agent.forecast_once()

    def feed(self, num: int, *, regime: float = 0.0, wear: float = 0.3) -> None:
        """Add windows of ``num`` machines."""
        self.memory.add(windows(num, regime=regime, wear=wear))

    @property
    def events(self) -> list[str]:
        """Names of all events so far."""
        return [each["event"] for each in self.agent.events.tail(10**6)]


def sync_server(control: Control, repository: Path) -> contextlib.AbstractContextManager[str]:
    """Serve the platform's side on the loopback address while the block runs; yield its URL."""
    return serving(create_app(control, repository))


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve an application on the loopback address while the block runs; yield its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
