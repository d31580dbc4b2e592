"""The one door to the model: a protocol with one async method, and its HTTP form.

The same calls reach a Ray handle (``cluster.handle``), this process
(``cluster.local``) or an edge box (``cluster.onnx``); an application is given a
client and never builds one.  Standard library and numpy only.
"""

import asyncio
import http.client
import json
import os
import queue
from typing import Protocol
from urllib.parse import urlsplit

from cluster.errors import (
    AccessDeniedError,
    ConfigurationError,
    DeadlineExceededError,
    InvalidRequestError,
    QueueFullError,
    ReplicaLostError,
    TrimoeError,
    UnavailableError,
    UnknownKeyError,
    UnknownModelError,
)
from cluster.retry import RetryPolicy
from cluster.schemas import InferRequest, InferResponse
from cluster.wire import BINARY_TYPE, decode_response, encode_request

ERROR_OF_STATUS: dict[int, type[TrimoeError]] = {
    400: InvalidRequestError,
    401: UnknownKeyError,
    403: AccessDeniedError,
    404: UnknownModelError,
    413: InvalidRequestError,
    415: InvalidRequestError,
    429: QueueFullError,
    504: DeadlineExceededError,
}


class Client(Protocol):
    """Anything that answers requests."""

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer one request.

        Raises:
            InvalidRequestError: The request can never succeed.
            UnavailableError: Deadline, back-pressure or a lost replica, retries included.
        """
        ...


def infer_blocking(client: Client, request: InferRequest) -> InferResponse:
    """The blocking form, for scripts and tests; not inside an event loop."""
    return asyncio.run(client.infer(request))


def api_key_from_environment() -> str | None:
    """Return the token that $TRIMOE_API_KEY holds, if it does."""
    return os.environ.get("TRIMOE_API_KEY") or None


class HttpClient:
    """Reaches a gateway over HTTP, in the binary form; connections are kept and reused.

    Args:
        url: Root of the gateway, such as ``"http://127.0.0.1:8000"``.
        retry: Pauses between attempts.
        api_key: Token for a gateway that asks for one.

    Raises:
        ConfigurationError: The URL is not an http(s) one.
    """

    def __init__(
        self, url: str, retry: RetryPolicy | None = None, *, api_key: str | None = None
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            message = f"url: expected http://HOST:PORT or https://HOST:PORT, got {url!r}"
            raise ConfigurationError(message)
        self._parts = parts
        self._retry = retry or RetryPolicy()
        key = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._headers = {"Content-Type": BINARY_TYPE, "Accept": BINARY_TYPE, **key}
        self._idle: queue.SimpleQueue[http.client.HTTPConnection] = queue.SimpleQueue()

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer one request (see ``Client``)."""
        return await self._retry.send(
            request, lambda attempt: asyncio.to_thread(self._post, attempt)
        )

    def close(self) -> None:
        """Close the connections that are not in use."""
        while not self._idle.empty():
            self._idle.get().close()

    def _post(self, request: InferRequest) -> InferResponse:
        connection = self._take_connection(request.deadline_ms / 1e3)
        path = f"{self._parts.path.rstrip('/')}/v1/infer"
        try:
            try:
                connection.request("POST", path, encode_request(request), self._headers)
                is_sent = True
            except (BrokenPipeError, ConnectionResetError):
                is_sent = False  # refused before it was read to its end: the reason is there
            answer = connection.getresponse()
            status, body = answer.status, answer.read()
        except TimeoutError as error:
            connection.close()
            message = f"request {request.request_id}: no answer within {request.deadline_ms:.0f} ms"
            raise DeadlineExceededError(message) from error
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            message = f"{self._parts.netloc}: expected an answer, got {error!r:.120}; is it up?"
            raise ReplicaLostError(message) from error
        if not is_sent:
            connection.close()
        self._idle.put(connection)
        if status != http.client.OK:
            raise _error_of(status, body)
        return decode_response(body)

    def _take_connection(self, timeout_s: float) -> http.client.HTTPConnection:
        try:
            connection = self._idle.get_nowait()
        except queue.Empty:
            is_tls = self._parts.scheme == "https"
            kind = http.client.HTTPSConnection if is_tls else http.client.HTTPConnection
            connection = kind(str(self._parts.hostname), self._parts.port)
        connection.timeout = timeout_s
        if connection.sock is not None:
            connection.sock.settimeout(timeout_s)
        return connection


def _error_of(status: int, body: bytes) -> TrimoeError:
    try:
        message = str(json.loads(body)["message"])
    except (ValueError, LookupError, TypeError):
        message = f"HTTP {status}: {body[:120]!r}"
    return ERROR_OF_STATUS.get(status, UnavailableError)(message)
