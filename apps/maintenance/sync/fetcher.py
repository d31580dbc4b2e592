"""How bytes are fetched for TUF: over HTTP with resume, or from a folder; both end.

Rules:
    1. One fetcher serves one attempt, and the attempt has one deadline (``connection``).
    2. A broken transfer goes on where it broke (HTTP range).  Attempts without a single new
       byte are counted and bounded; those with one are bounded by the deadline.
    3. Bytes of a target stay on disk between attempts, until the target is proven or proved
       wrong.  They are never trusted: the hash of the whole is.

Knows: HTTP.  Does not know: metadata, signatures, hashes.  Redirects are not followed.
"""

import hashlib
import http.client
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from tuf.api.exceptions import DownloadError, DownloadHTTPError, SlowRetrievalError
from tuf.ngclient import FetcherInterface

from apps.maintenance.sync.connection import open_connection

_CHUNK_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Patience:
    """How long an attempt is borne with.

    Args:
        total_s: From the first byte asked for to the last one.
        stall_s: Without a byte.
        max_tries: In a row without a new byte.
        first_pause_s: After a broken transfer; doubles with each in a row.
        longest_pause_s: No pause is longer.
    """

    total_s: float = 300.0
    stall_s: float = 15.0
    max_tries: int = 6
    first_pause_s: float = 0.5
    longest_pause_s: float = 15.0


class UnreachableError(DownloadError):
    """Nobody answers."""


class TruncatedError(DownloadError):
    """Transfers break, again and again at the same byte."""


class Fetcher(FetcherInterface):
    """What both kinds have: the last bytes of each file of metadata."""

    def __init__(self) -> None:
        self.last: dict[str, bytes] = {}

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """Return bytes, as the interface says, and remember them by file name."""
        data = super().download_bytes(url, max_length)
        self.last[url.rpartition("/")[2]] = data
        return data

    def forget_parts(self) -> None:
        """Drop what is kept of targets; they were proven, or proved wrong."""


class FolderFetcher(Fetcher):
    """Reads a repository in a folder, such as one on a stick; URLs are ``file:///...``."""

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = Path(unquote(urlsplit(url).path))
        try:
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    yield chunk
        except FileNotFoundError as error:
            message = f"{path.name}: expected on the stick, got no such file"
            raise DownloadHTTPError(message, http.HTTPStatus.NOT_FOUND) from error
        except OSError as error:
            message = f"{path.name}: {error.strerror}"
            raise UnreachableError(message) from error


class HttpFetcher(Fetcher):
    """Reads a repository over HTTP.

    Args:
        parts: Folder for bytes of targets that are not whole yet.
        patience: How long the attempt may take.
    """

    def __init__(self, parts: Path, patience: Patience) -> None:
        super().__init__()
        self._parts = parts
        self._patience = patience
        self._end_s = time.monotonic() + patience.total_s
        self.num_requests = 0
        self.num_bytes = 0

    def forget_parts(self) -> None:
        """Drop what is kept of targets."""
        shutil.rmtree(self._parts, ignore_errors=True)

    def _fetch(self, url: str) -> Iterator[bytes]:
        part = self._part_of(url)
        num_had = 0
        if part is not None and part.exists():
            with part.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    num_had += len(chunk)
                    yield chunk
        if part is None:
            yield from self._fetch_rest(url, 0)
            return
        with part.open("ab") as file:
            for chunk in self._fetch_rest(url, num_had):
                file.write(chunk)
                file.flush()
                yield chunk

    def _fetch_rest(self, url: str, offset: int) -> Iterator[bytes]:
        """Yield a file from an offset, over as many transfers as it takes."""
        tries, pause_s = 0, self._patience.first_pause_s
        while True:
            num_before = offset
            try:
                for chunk in self._transfer(url, offset):
                    offset += len(chunk)
                    yield chunk
            except (OSError, http.client.HTTPException) as error:
                failure: Exception = error
            else:
                if time.monotonic() < self._end_s:
                    return
                failure = TimeoutError()  # shut at the deadline, which looks like an end
            if offset > num_before:
                tries, pause_s = 0, self._patience.first_pause_s
            tries += 1
            self._check(url, failure, tries, offset)
            time.sleep(max(0.0, min(pause_s, self._end_s - time.monotonic())))
            pause_s = min(2 * pause_s, self._patience.longest_pause_s)

    def _check(self, url: str, failure: Exception, tries: int, offset: int) -> None:
        """Raise if there is no time or hope left."""
        name = url.rpartition("/")[2]
        if time.monotonic() >= self._end_s:
            message = f"{name}: expected within {self._patience.total_s:g} s, got {offset} bytes"
            raise SlowRetrievalError(message) from failure
        if tries < self._patience.max_tries:
            return
        if isinstance(failure, TimeoutError):
            message = f"{name}: no byte within {self._patience.stall_s:g} s, {tries} times"
            raise SlowRetrievalError(message) from failure
        if isinstance(failure, _BrokenOffError):
            message = f"{name}: broke off at byte {offset}, {tries} times"
            raise TruncatedError(message) from failure
        message = f"{name}: {failure!r:.120}, {tries} times"
        raise UnreachableError(message) from failure

    def _transfer(self, url: str, offset: int) -> Iterator[bytes]:
        """Yield what one request brings.

        Raises:
            OSError, HTTPException: It broke off; what was yielded is good.
            DownloadHTTPError: The server refuses; asking again does not help.
        """
        parts = urlsplit(url)
        with open_connection(url, self._patience.stall_s, self._end_s) as connection:
            headers = {"Range": f"bytes={offset}-"} if offset else {}
            self.num_requests += 1
            connection.request("GET", quote(parts.path, safe="/%"), headers=headers)
            answer = connection.getresponse()
            if answer.status == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and offset:
                return  # all was there; whether it is right is for the hash to say
            skip = _check_status(answer, offset, url)
            for chunk in _body(answer):
                self.num_bytes += len(chunk)
                if skip >= len(chunk):
                    skip -= len(chunk)
                    continue
                yield chunk[skip:]
                skip = 0

    def _part_of(self, url: str) -> Path | None:
        """Return where bytes of a target are kept; None of metadata, which is small."""
        if "/targets/" not in urlsplit(url).path:
            return None
        self._parts.mkdir(parents=True, exist_ok=True)
        part = self._parts / hashlib.sha256(urlsplit(url).path.encode()).hexdigest()
        for other in self._parts.iterdir():
            if other != part:
                other.unlink()
        return part


class _BrokenOffError(http.client.HTTPException):
    """The server closed before the end it had announced."""


def _check_status(answer: http.client.HTTPResponse, offset: int, url: str) -> int:
    """Return how many bytes to pass over, for a server that knows no ranges."""
    name = url.rpartition("/")[2]
    if answer.status == http.HTTPStatus.PARTIAL_CONTENT and offset:
        found = answer.headers.get("Content-Range", "")
        if not found.startswith(f"bytes {offset}-"):
            message = f"{name}: expected bytes {offset}-, got {found!r:.60}"
            raise http.client.HTTPException(message)
        return 0
    if answer.status == http.HTTPStatus.OK:
        return offset
    if answer.status >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
        message = f"{name}: HTTP {answer.status}"
        raise http.client.HTTPException(message)
    message = f"{name}: expected HTTP 200, got {answer.status}"
    raise DownloadHTTPError(message, answer.status)


def _body(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yield the bytes of an answer as they come.

    Raises:
        OSError, HTTPException: They end before the announced length.
    """
    expected = answer.length
    num = 0
    while chunk := answer.read1(_CHUNK_BYTES):
        num += len(chunk)
        yield chunk
    if expected is not None and num < expected:
        message = f"expected {expected} bytes, got {num}"
        raise _BrokenOffError(message)
