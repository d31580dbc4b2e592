"""The health endpoint of a box: whether it serves, and how it is; on the loopback address.

GET /health    200 with the status of the agent, 503 while no model serves
"""

import http.server
import json
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Self

HOST = "127.0.0.1"


class HealthServer:
    """Answers until it is closed.

    Args:
        port: 0 takes a free one.
        status: Returns how the agent is.

    Raises:
        OSError: The port is taken.
    """

    def __init__(self, port: int, status: Callable[[], Mapping[str, object]]) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = 5  # s; a client that says nothing holds a thread no longer

            def do_GET(self) -> None:
                if self.path != "/health":
                    self.send_error(HTTPStatus.NOT_FOUND)
                    return
                facts = status()
                code = HTTPStatus.OK if facts["version"] else HTTPStatus.SERVICE_UNAVAILABLE
                body = json.dumps(facts).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Say nothing: what happens is in the event log."""

        self._server = http.server.ThreadingHTTPServer((HOST, port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def port(self) -> int:
        """Where it answers."""
        return int(self._server.server_address[1])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
