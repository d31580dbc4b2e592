"""A hostile server, attack by attack: the active slot stays, and the event has a name."""

import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Snapshot, TargetFile, Targets, Timestamp

from apps.maintenance.sync.fetcher import Patience
from apps.maintenance.sync.outcomes import Outcome
from apps.maintenance.sync.publishing import publish_bundle
from apps.maintenance.sync.repository import File
from benchmarks.edge_models import make_bundle
from benchmarks.edge_rig import ONE, TWO, Box, FileServer, Request, SignedFolder

HURRIED = Patience(total_s=0.8, stall_s=0.3, max_tries=2, first_pause_s=0.01, longest_pause_s=0.02)
TENTHS = [tenth / 10 for tenth in range(10)]


def refused(box: Box, wanted: str, patience: Patience = HURRIED) -> Outcome:
    """Make an attempt; return how it ended, after it was seen to have changed nothing."""
    before = box.slots.pointer
    num_before = len(box.events)
    outcome = box.take(wanted, patience)
    assert outcome is not None
    assert box.slots.pointer == before
    assert before.version == 1
    assert box.slots.is_whole(before.active)
    assert outcome in box.events[num_before:]
    return outcome


def file_named(name: str, data: bytes) -> Callable[[Request], None]:
    """Answer as a good server, but with other bytes under one name."""

    def answer(request: Request) -> None:
        if request.path.endswith(name):
            request.send_bytes(data)
        else:
            request.send_file()

    return answer


def write_online(signed: SignedFolder, targets: Targets, signers: list[CryptoSigner]) -> None:
    """Publish targets as one does who has stolen the online keys, and ``signers`` of targets."""
    repository, folder = signed.repository, signed.folder / "metadata"
    metadata = Metadata[Targets](targets)
    for signer in signers:
        metadata.sign(signer, append=True)
    data = metadata.to_bytes()
    (folder / f"{targets.version}.targets.json").write_bytes(data)
    snapshot = repository.snapshot
    snapshot.version += 1
    snapshot.meta["targets.json"] = MetaFile.from_data(targets.version, data, ["sha256"])
    signed_snapshot = Metadata[Snapshot](snapshot)
    signed_snapshot.sign(signed.signers["snapshot"][0])
    (folder / f"{snapshot.version}.snapshot.json").write_bytes(signed_snapshot.to_bytes())
    timestamp = repository.timestamp
    timestamp.version += 1
    timestamp.snapshot_meta = MetaFile(snapshot.version)
    write_timestamp(signed, timestamp, signed.signers["timestamp"][0])


def write_timestamp(signed: SignedFolder, timestamp: Timestamp, signer: CryptoSigner) -> None:
    metadata = Metadata[Timestamp](timestamp)
    metadata.sign(signer)
    (signed.folder / "metadata" / "timestamp.json").write_bytes(metadata.to_bytes())


def test_rollback(box: Box, server: FileServer, signed: SignedFolder, tmp_path: Path) -> None:
    shutil.copytree(signed.folder, tmp_path / "old")
    publish_bundle(signed.repository, make_bundle(2))
    box.take(ONE)  # sees the newer metadata, keeps its model
    server.folder = tmp_path / "old"
    assert refused(box, ONE) is Outcome.METADATA_ROLLBACK


def test_freeze(box: Box, server: FileServer, signed: SignedFolder) -> None:
    old = (signed.folder / "metadata" / "timestamp.json").read_bytes()
    box.calendar.ahead = timedelta(days=8)
    signed.calendar.ahead = timedelta(days=8)
    publish_bundle(signed.repository, make_bundle(2))
    with server.answering(file_named("timestamp.json", old)):
        assert refused(box, TWO) is Outcome.METADATA_FROZEN
    assert box.take(TWO) is Outcome.SWITCHED  # the honest server is still believed


def test_mix_and_match(box: Box, server: FileServer, signed: SignedFolder) -> None:
    metadata = signed.folder / "metadata"
    publish_bundle(signed.repository, make_bundle(2))
    version = signed.repository.snapshot.version
    old = (metadata / f"{version - 1}.snapshot.json").read_bytes()
    with server.answering(file_named(f"{version}.snapshot.json", old)):
        assert refused(box, TWO) is Outcome.METADATA_MIXED
    targets = signed.repository.targets.version
    old = (metadata / f"{targets - 1}.targets.json").read_bytes()
    with server.answering(file_named(f"{targets}.targets.json", old)):
        assert refused(box, TWO) is Outcome.METADATA_MIXED


def test_fast_forward(box: Box, signed: SignedFolder) -> None:
    """With the stolen key of the timestamp: refused, and the honest versions still count."""
    publish_bundle(signed.repository, make_bundle(2))
    honest = (signed.folder / "metadata" / "timestamp.json").read_bytes()
    timestamp = signed.repository.timestamp
    timestamp.version = 2**31
    write_timestamp(signed, timestamp, signed.signers["timestamp"][0])
    assert refused(box, TWO) is Outcome.METADATA_FAST_FORWARD
    (signed.folder / "metadata" / "timestamp.json").write_bytes(honest)
    assert box.take(TWO) is Outcome.SWITCHED


def test_fast_forward_within_the_leap_ends_with_a_rotation(box: Box, signed: SignedFolder) -> None:
    publish_bundle(signed.repository, make_bundle(2))
    honest = (signed.folder / "metadata" / "timestamp.json").read_bytes()
    timestamp = signed.repository.timestamp
    timestamp.version += 50_000
    write_timestamp(signed, timestamp, signed.signers["timestamp"][0])
    box.take(ONE)
    (signed.folder / "metadata" / "timestamp.json").write_bytes(honest)
    assert refused(box, TWO) is Outcome.METADATA_ROLLBACK
    signed.repository.rotate("timestamp", [CryptoSigner.generate_ed25519()])
    assert box.take(TWO) is Outcome.SWITCHED


@pytest.mark.parametrize("name", ["timestamp.json", "targets.json", ".tar", "root.json"])
def test_endless_data(box: Box, server: FileServer, signed: SignedFolder, name: str) -> None:
    publish_bundle(signed.repository, make_bundle(2))

    def answer(request: Request) -> None:
        is_form = name == ".tar" and "/targets/" in request.path
        (request.send_endless if is_form or request.path.endswith(name) else request.send_file)()

    with server.answering(answer):
        assert refused(box, TWO, Patience(total_s=5)) is Outcome.ENDLESS_DATA
    assert not (box.state / "parts").exists()  # nothing of it is kept


def drip_headers(request: Request) -> None:
    for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"." * 10_000:
        request.wfile.write(bytes([byte]))
        request.wfile.flush()
        time.sleep(0.02)


@pytest.mark.clock
@pytest.mark.parametrize("answer", [Request.send_slowly, drip_headers, lambda _: time.sleep(2)])
@pytest.mark.parametrize("part", ["/metadata/", "/targets/"])
def test_slow_retrieval(
    box: Box, server: FileServer, signed: SignedFolder, answer: Callable[[Request], None], part: str
) -> None:
    publish_bundle(signed.repository, make_bundle(2))
    started = time.monotonic()
    with server.answering(
        lambda request: answer(request) if part in request.path else request.send_file()
    ):
        assert refused(box, TWO) is Outcome.SLOW_RETRIEVAL
    assert time.monotonic() - started < HURRIED.total_s + 1


def test_wrong_key(box: Box, signed: SignedFolder) -> None:
    timestamp = signed.repository.timestamp
    timestamp.version += 1
    write_timestamp(signed, timestamp, CryptoSigner.generate_ed25519())
    assert refused(box, TWO) is Outcome.WRONG_KEY


def test_a_root_that_the_old_root_did_not_sign(
    box: Box, server: FileServer, tmp_path: Path
) -> None:
    other = SignedFolder(tmp_path / "other")
    other.repository.rotate("timestamp", [CryptoSigner.generate_ed25519()])
    root = (tmp_path / "other" / "metadata" / "2.root.json").read_bytes()
    with server.answering(file_named("2.root.json", root)):
        assert refused(box, TWO) is Outcome.WRONG_KEY


def test_threshold_not_met(box: Box, signed: SignedFolder) -> None:
    targets = signed.repository.targets
    data = make_bundle(2)
    targets.targets[TWO] = TargetFile.from_data(TWO, data, ["sha256"])
    targets.version += 1
    write_online(signed, targets, list(signed.signers["targets"][:1]))
    assert refused(box, TWO) is Outcome.THRESHOLD_NOT_MET
    targets.version += 1
    write_online(signed, targets, [CryptoSigner.generate_ed25519()] * 2)
    assert refused(box, TWO) is Outcome.WRONG_KEY


@pytest.mark.parametrize("days", [9, 31, 400])
def test_expired(box: Box, signed: SignedFolder, days: int) -> None:
    """New metadata that has expired already: timestamp, snapshot, everything."""
    signed.calendar.ahead = -timedelta(days=days)
    publish_bundle(signed.repository, make_bundle(2))
    assert refused(box, TWO) is Outcome.METADATA_EXPIRED


def test_a_slow_clock_does_not_revive_what_has_expired(box: Box, signed: SignedFolder) -> None:
    """The clock of the box is a year behind; the signed time says that the snapshot is old."""
    publish_bundle(signed.repository, make_bundle(2))
    box.calendar.ahead = -timedelta(days=365)
    timestamp = signed.repository.timestamp
    timestamp.version += 1
    signed.calendar.ahead = timedelta(days=40)
    timestamp.unrecognized_fields["x-trimoe-signed-at"] = signed.calendar().isoformat()
    timestamp.expires = (signed.calendar() + timedelta(days=7)).replace(microsecond=0)
    write_timestamp(signed, timestamp, signed.signers["timestamp"][0])
    assert refused(box, TWO) is Outcome.METADATA_EXPIRED


def altered(at: float) -> Callable[[Request], None]:
    def answer(request: Request) -> None:
        data = bytearray(request.file.read_bytes()) if request.file.is_file() else bytearray()
        if "/targets/" not in request.path:
            request.send_file()
            return
        data[min(int(at * len(data)), len(data) - 1)] ^= 1
        request.send_bytes(bytes(data))

    return answer


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_altered_in_every_form(
    box: Box, server: FileServer, signed: SignedFolder, at: float
) -> None:
    offer = publish_bundle(signed.repository, make_bundle(2))
    assert offer.routes[0].base  # a delta comes first
    with server.answering(altered(at)):
        assert refused(box, TWO) is Outcome.TARGET_ALTERED


def test_an_altered_delta_falls_back_to_the_whole(
    box: Box, server: FileServer, signed: SignedFolder
) -> None:
    offer = publish_bundle(signed.repository, make_bundle(2))
    delta = offer.routes[0].path.rpartition("/")[2]

    def answer(request: Request) -> None:
        (altered(0.5) if request.path.endswith(delta) else Request.send_file)(request)

    with server.answering(answer):
        assert box.take(TWO) is Outcome.SWITCHED
    assert Outcome.TARGET_ALTERED in box.events
    assert box.slots.pointer.digest == offer.digest


@pytest.mark.parametrize("form", ["zstd", "zstd_patch", "bsdiff"])
def test_a_delta_that_was_signed_and_makes_something_else(
    box: Box, signed: SignedFolder, form: str
) -> None:
    """Whoever made the delta had the keys; the hash of the whole still decides."""
    from apps.maintenance.sync.deltas import Form, encode

    base, other = make_bundle(1), make_bundle(3)
    digest = box.slots.pointer.digest
    wrong = encode(Form(form), other, base)
    base_of = digest if Form(form).needs_base else ""
    forms = [{"path": "d/2.delta", "form": form, "base": base_of}]
    custom: dict[str, Any] = {"version": 2, "groups": ["*"], "forms": forms}
    signed.repository.publish({"d/2.delta": File(wrong, {}), TWO: File(make_bundle(2), custom)})
    assert refused(box, TWO) is Outcome.DELTA_ALTERED


@pytest.mark.parametrize("share", TENTHS)
def test_truncated(box: Box, server: FileServer, signed: SignedFolder, share: float) -> None:
    """The server breaks off at the same place of every form, again and again."""
    publish_bundle(signed.repository, make_bundle(2))

    def answer(request: Request) -> None:
        if "/targets/" in request.path:
            data = request.file.read_bytes()
            request.send_bytes(data, upto=max(int(share * len(data)), request.offset))
        else:
            request.send_file()

    with server.answering(answer):
        assert refused(box, TWO, Patience(total_s=5, max_tries=2, first_pause_s=0.01)) in {
            Outcome.TRUNCATED
        }
    assert box.take(TWO) is Outcome.SWITCHED  # goes on where it broke off


@pytest.mark.parametrize("share", TENTHS)
def test_truncated_and_passed_off_as_whole(
    box: Box, server: FileServer, signed: SignedFolder, share: float
) -> None:
    publish_bundle(signed.repository, make_bundle(2))

    def answer(request: Request) -> None:
        if "/targets/" in request.path:
            data = request.file.read_bytes()
            request.send_bytes(data[: int(share * len(data))])
        else:
            request.send_file()

    with server.answering(answer):
        assert refused(box, TWO) is Outcome.TARGET_ALTERED
    assert box.take(TWO) is Outcome.SWITCHED


@pytest.mark.parametrize("share", TENTHS[::3])
def test_truncated_metadata(
    box: Box, server: FileServer, signed: SignedFolder, share: float
) -> None:
    publish_bundle(signed.repository, make_bundle(2))

    def answer(request: Request) -> None:
        if request.file.is_file():
            data = request.file.read_bytes()
            request.send_bytes(data[: int(share * len(data))])
        else:
            request.send_file()

    with server.answering(answer):
        assert refused(box, TWO) in {Outcome.METADATA_INVALID, Outcome.METADATA_MIXED}


def send_away(request: Request) -> None:
    request.send_response(302)
    request.send_header("Location", "http://127.0.0.1:1/elsewhere")
    request.send_header("Content-Length", "0")
    request.end_headers()


def test_a_server_that_sends_elsewhere(box: Box, server: FileServer) -> None:
    with server.answering(send_away):
        assert refused(box, TWO) is Outcome.HTTP_ERROR


def test_a_server_that_is_gone(box: Box, server: FileServer) -> None:
    server.server_close()
    server.shutdown()
    assert refused(box, TWO) is Outcome.UNREACHABLE


def test_a_name_that_nobody_signed(box: Box) -> None:
    assert refused(box, "forecast-both/9.tar") is Outcome.TARGET_MISSING
