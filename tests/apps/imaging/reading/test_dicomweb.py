"""Against a small archive on a real socket: WADO-RS and STOW-RS as in DICOM PS3.18."""

import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pydicom import dcmread

from apps.imaging.reading.bounds import Bounds
from apps.imaging.reading.dicomweb import DicomWebError, open_archive, pull_study, push_files
from apps.imaging.reading.discovery import discover
from apps.imaging.reading.door import read_case
from apps.imaging.reasons import Status
from tests.apps.imaging.reading import faults

STUDY = "1.2.3.4"
EDGE = b"--edge"


class _Archive(BaseHTTPRequestHandler):
    url: str
    held: list[bytes]
    stored: list[bytes]
    refuses = False

    def do_GET(self) -> None:
        if self.path != f"/dicom-web/studies/{STUDY}" or self.headers["X-Key"] != "yes":
            self.send_error(404)
            return
        part = b"\r\nContent-Type: application/dicom\r\n\r\n"
        body = b"".join(EDGE + part + data + b"\r\n" for data in self.held) + EDGE + b"--\r\n"
        self._answer('multipart/related; type="application/dicom"; boundary=edge', body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        start = body.index(b"\r\n\r\n") + 4
        self.stored.append(body[start : body.rindex(b"\r\n--")])
        failed = b'{"00081198": {"vr": "SQ", "Value": [{}]}}' if self.refuses else b"{}"
        self._answer("application/dicom+json", failed)

    def _answer(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def archive() -> Iterator[type[_Archive]]:
    slices = [faults.as_bytes(slice_) for slice_ in faults.generated_slices()]

    class Archive(_Archive):
        held = slices
        stored: list[bytes] = []  # noqa: RUF012 - one class for each test

    with ThreadingHTTPServer(("127.0.0.1", 0), Archive) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        Archive.url = f"http://127.0.0.1:{server.server_port}/dicom-web"
        yield Archive
        server.shutdown()
        thread.join()


KEY = {"X-Key": "yes"}


def test_a_pulled_study_is_an_input(archive: type[_Archive], tmp_path: Path) -> None:
    with open_archive(archive.url, KEY) as client:
        assert pull_study(client, STUDY, tmp_path / "study", Bounds()) == faults.NUM_SLICES
    (source,) = discover(tmp_path / "study", Bounds()).sources
    assert read_case(source, Bounds()).status is Status.CORRECT


def test_a_refusal_does_not_tell_the_study(archive: type[_Archive], tmp_path: Path) -> None:
    with (
        open_archive(archive.url) as client,
        pytest.raises(DicomWebError, match="with status 404") as refusal,
    ):
        pull_study(client, STUDY, tmp_path / "study", Bounds())
    assert STUDY not in str(refusal.value)
    assert refusal.value.__suppress_context__


def test_more_instances_than_allowed_are_not_pulled(
    archive: type[_Archive], tmp_path: Path
) -> None:
    with (
        open_archive(archive.url, KEY) as client,
        pytest.raises(DicomWebError, match="at most 5 instances"),
    ):
        pull_study(client, STUDY, tmp_path / "study", Bounds(archive_members=5))
    assert len(list((tmp_path / "study").iterdir())) == 5


def test_pushed_files_arrive_as_they_were(archive: type[_Archive], tmp_path: Path) -> None:
    paths = faults.write_all(faults.generated_slices()[:3], tmp_path)
    with open_archive(archive.url, KEY) as client:
        push_files(client, paths)
    assert [dcmread(io.BytesIO(data)) for data in archive.stored] == [dcmread(p) for p in paths]


def test_a_file_that_is_refused_is_named_by_number(archive: type[_Archive], tmp_path: Path) -> None:
    archive.refuses = True
    paths = faults.write_all(faults.generated_slices()[:2], tmp_path)
    with (
        open_archive(archive.url, KEY) as client,
        pytest.raises(DicomWebError, match="refused number 1"),
    ):
        push_files(client, paths)


def test_nobody_there(tmp_path: Path) -> None:
    with open_archive("http://127.0.0.1:9/dicom-web") as client:
        client.set_http_retry_params(retry=False)
        with pytest.raises(DicomWebError, match="check the address"):
            pull_study(client, STUDY, tmp_path / "study", Bounds())
