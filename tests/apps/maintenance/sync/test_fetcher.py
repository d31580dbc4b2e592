"""Fetching: goes on where it broke off, is bounded, and always ends."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tuf.api.exceptions import DownloadError, DownloadHTTPError, SlowRetrievalError

from apps.maintenance.sync.fetcher import (
    FolderFetcher,
    HttpFetcher,
    TruncatedError,
    UnreachableError,
)
from benchmarks.edge_rig import QUICK, FileServer, Request

DATA = bytes(range(256)) * 4000  # about 1 MB
LENGTH = len(DATA)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[FileServer]:
    (tmp_path / "www" / "targets").mkdir(parents=True)
    (tmp_path / "www" / "targets" / "t").write_bytes(DATA)
    with FileServer(tmp_path / "www") as found:
        yield found


def fetch(fetcher: HttpFetcher, server: FileServer) -> bytes:
    return fetcher.download_bytes(f"{server.url}/targets/t", LENGTH)


def breaking(every: int) -> Callable[[Request], None]:
    """Break off after that many bytes of each transfer."""

    def answer(request: Request) -> None:
        request.send_bytes(DATA, upto=request.offset + every)

    return answer


def test_a_transfer_that_breaks_off_goes_on_in_the_same_attempt(
    files: FileServer, tmp_path: Path
) -> None:
    fetcher = HttpFetcher(tmp_path / "parts", QUICK)
    with files.answering(breaking(LENGTH // 9)):
        assert fetch(fetcher, files) == DATA
    assert fetcher.num_requests == 10  # more than may fail in a row: each had new bytes
    assert fetcher.num_bytes == LENGTH  # none came twice


def test_the_next_attempt_goes_on_with_what_the_last_one_left(
    files: FileServer, tmp_path: Path
) -> None:
    def stuck(request: Request) -> None:
        request.send_bytes(DATA, upto=max(request.offset, LENGTH // 2))

    with files.answering(stuck), pytest.raises(TruncatedError, match="broke off at byte"):
        fetch(HttpFetcher(tmp_path / "parts", QUICK), files)
    fetcher = HttpFetcher(tmp_path / "parts", QUICK)
    assert fetch(fetcher, files) == DATA
    assert fetcher.num_bytes == LENGTH - LENGTH // 2
    again = HttpFetcher(tmp_path / "parts", QUICK)
    assert fetch(again, files) == DATA
    assert again.num_bytes == 0  # all was there
    again.forget_parts()
    assert fetch(again, files) == DATA
    assert again.num_bytes == LENGTH


def test_a_server_without_ranges_sends_the_whole_again(files: FileServer, tmp_path: Path) -> None:
    def no_ranges(request: Request) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(LENGTH))
        request.end_headers()
        half = fetcher.num_requests == 1
        request.wfile.write(DATA[: LENGTH // 2] if half else DATA)
        request.close_connection = True

    fetcher = HttpFetcher(tmp_path / "parts", QUICK)
    with files.answering(no_ranges):
        assert fetch(fetcher, files) == DATA


def test_a_range_that_was_not_asked_for_is_refused(files: FileServer, tmp_path: Path) -> None:
    def shifted(request: Request) -> None:
        if not request.offset:
            request.send_bytes(DATA, upto=1000)
            return
        request.send_response(206)
        request.send_header("Content-Range", f"bytes 0-{LENGTH - 1}/{LENGTH}")
        request.send_header("Content-Length", str(LENGTH))
        request.end_headers()
        request.wfile.write(DATA)

    with files.answering(shifted), pytest.raises(UnreachableError, match="expected bytes 1000-"):
        fetch(HttpFetcher(tmp_path / "parts", QUICK), files)


def answer_with(status: int) -> Callable[[Request], None]:
    def answer(request: Request) -> None:
        request.send_response(status)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


@pytest.mark.parametrize(
    ("status", "error", "num"),
    [(404, DownloadHTTPError, 1), (403, DownloadHTTPError, 1), (503, UnreachableError, 3)],
)
def test_errors_are_asked_again_only_where_that_helps(
    files: FileServer, tmp_path: Path, status: int, error: type[DownloadError], num: int
) -> None:
    fetcher = HttpFetcher(tmp_path / "parts", QUICK)
    with files.answering(answer_with(status)), pytest.raises(error, match=str(status)):
        fetch(fetcher, files)
    assert fetcher.num_requests == num


@pytest.mark.clock
def test_one_attempt_has_one_deadline(files: FileServer, tmp_path: Path) -> None:
    """A server that gives a little each time is borne with only so long."""

    def little(request: Request) -> None:
        time.sleep(0.05)
        request.send_bytes(DATA, upto=request.offset + 10)

    fetcher = HttpFetcher(tmp_path / "parts", replace(QUICK, total_s=0.5))
    started = time.monotonic()
    with files.answering(little), pytest.raises(SlowRetrievalError, match=r"within 0\.5 s"):
        fetch(fetcher, files)
    with pytest.raises(SlowRetrievalError):
        fetch(fetcher, files)  # not even the honest one: the time is over
    assert time.monotonic() - started < 1.5


def test_parts_of_other_targets_are_dropped(files: FileServer, tmp_path: Path) -> None:
    (files.folder / "targets" / "u").write_bytes(b"other")
    fetcher = HttpFetcher(tmp_path / "parts", QUICK)
    fetch(fetcher, files)
    fetcher.download_bytes(f"{files.url}/targets/u", 5)
    assert [path.read_bytes() for path in (tmp_path / "parts").iterdir()] == [b"other"]


def test_a_folder_is_read_and_what_is_missing_is_said(tmp_path: Path) -> None:
    (tmp_path / "a b").write_bytes(b"bytes")
    fetcher = FolderFetcher()
    assert fetcher.download_bytes((tmp_path / "a b").as_uri(), 5) == b"bytes"
    with pytest.raises(DownloadHTTPError, match="on the stick"):
        fetcher.download_bytes((tmp_path / "c").as_uri(), 5)
