"""The signed repository: thresholds, rotation, refresh, expiry, sticks and permits."""

import json
from datetime import timedelta
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root

from apps.maintenance.edge.stick import take_stick
from apps.maintenance.sync.keys import load_key, load_keys, make_key, make_keys
from apps.maintenance.sync.outcomes import Outcome
from apps.maintenance.sync.publishing import find_offer, publish_bundle, sign_bundle
from apps.maintenance.sync.repository import Repository
from apps.maintenance.sync.sticks import export_stick
from benchmarks.edge_models import make_bundle
from benchmarks.edge_rig import ONE, TWO, Box, SignedFolder
from cluster.errors import ConfigurationError


def with_keys(signed: SignedFolder, **numbers: int) -> Repository:
    """Return the repository as who holds only so many keys of each role sees it."""
    signers = [each for role, num in numbers.items() for each in signed.signers[role][:num]]
    return Repository(signed.folder, signers)


def test_too_few_keys_sign_nothing(signed: SignedFolder) -> None:
    before = sorted(signed.folder.rglob("*"))
    one_key = with_keys(signed, targets=1, snapshot=1, timestamp=1)
    with pytest.raises(ConfigurationError, match="targets: expected 2 of its keys, got 1"):
        publish_bundle(one_key, make_bundle(2))
    with pytest.raises(ConfigurationError, match="timestamp: expected 1 of its keys, got 0"):
        publish_bundle(with_keys(signed, targets=2, snapshot=1), make_bundle(2))
    with pytest.raises(ConfigurationError, match="root"):
        with_keys(signed, root=1, targets=3, snapshot=1, timestamp=1).rotate(
            "timestamp", [CryptoSigner.generate_ed25519()]
        )
    assert sorted(signed.folder.rglob("*")) == before
    publish_bundle(with_keys(signed, targets=2, snapshot=1, timestamp=1), make_bundle(2))


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_boxes_follow_a_rotation_of_every_role(box: Box, signed: SignedFolder, role: str) -> None:
    signed.repository.rotate(role, [CryptoSigner.generate_ed25519() for _ in range(3)])
    publish_bundle(signed.repository, make_bundle(2))
    assert box.take(TWO) is Outcome.SWITCHED


def test_the_old_keys_no_longer_count_after_a_rotation(box: Box, signed: SignedFolder) -> None:
    old = Repository(signed.folder, [key for keys in signed.signers.values() for key in keys])
    signed.repository.rotate("targets", [CryptoSigner.generate_ed25519() for _ in range(3)])
    with pytest.raises(ConfigurationError, match="targets"):
        sign_bundle(old, make_bundle(2))
    root = Metadata[Root].from_file(str(signed.folder / "metadata" / "2.root.json"))
    revoked = {key.public_key.keyid for key in signed.signers["targets"]}
    assert not revoked & set(root.signed.roles["targets"].keyids)
    assert box.take(ONE) is Outcome.UP_TO_DATE


def test_a_refresh_keeps_boxes_fed(box: Box, signed: SignedFolder) -> None:
    signed.calendar.ahead = box.calendar.ahead = timedelta(days=20)
    assert box.take(ONE) is Outcome.METADATA_FROZEN
    signed.repository.refresh()
    assert box.take(ONE) is Outcome.UP_TO_DATE


def test_a_version_is_published_once(signed: SignedFolder) -> None:
    with pytest.raises(ConfigurationError, match="new version"):
        publish_bundle(signed.repository, make_bundle(1, seed=3))
    with pytest.raises(ConfigurationError, match=r"there are: forecast-both/1\.tar"):
        find_offer(signed.repository, "forecast-both/7.tar")


def test_a_stick_brings_a_bundle_to_a_box_without_a_network(
    box: Box, signed: SignedFolder, tmp_path: Path
) -> None:
    offer = publish_bundle(signed.repository, make_bundle(2))
    publish_bundle(signed.repository, make_bundle(3))
    files = export_stick(signed.repository, offer, tmp_path / "stick")
    assert not [path for path in files if path.name.endswith(".3.tar")]
    take_stick(tmp_path / "stick", box.state)
    assert box.agent.sync_once() is Outcome.SWITCHED
    assert box.slots.pointer.version == 2
    assert not (box.state / "stick").exists()


def test_a_stick_is_trusted_no_more_than_a_server(
    box: Box, signed: SignedFolder, tmp_path: Path
) -> None:
    offer = publish_bundle(signed.repository, make_bundle(2))
    stick = tmp_path / "stick"
    for path in export_stick(signed.repository, offer, stick):
        if "/targets/" in str(path):
            path.write_bytes(bytes(reversed(path.read_bytes())))
    take_stick(stick, box.state)
    assert box.agent.sync_once() is Outcome.TARGET_ALTERED
    other = SignedFolder(tmp_path / "other")
    foreign = publish_bundle(other.repository, make_bundle(2))
    export_stick(other.repository, foreign, tmp_path / "foreign")
    take_stick(tmp_path / "foreign", box.state)
    assert box.agent.sync_once() is Outcome.WRONG_KEY
    (stick / "wanted.json").write_text(json.dumps({"wanted": "../../etc/passwd"}))
    take_stick(stick, box.state)
    assert box.agent.sync_once() is Outcome.TARGET_MISSING
    assert box.slots.pointer.version == 1


def test_a_stick_that_is_none_is_refused(box: Box, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="sync export"):
        take_stick(tmp_path / "empty", box.state)
    (tmp_path / "links" / "metadata").mkdir(parents=True)
    (tmp_path / "links" / "metadata" / "timestamp.json").symlink_to("/etc/hostname")
    with pytest.raises(ConfigurationError, match="no links"):
        take_stick(tmp_path / "links", box.state)


def test_keys_are_for_their_holder_alone(tmp_path: Path) -> None:
    make_keys(tmp_path, {"targets": 2})
    assert len(load_keys([tmp_path])) == 2
    path = tmp_path / "targets-1.pem"
    with pytest.raises(ConfigurationError, match="never overwritten"):
        make_key(path)
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="expected mode 600, got 644"):
        load_key(path)
    path.chmod(0o600)
    path.write_bytes(b"no key")
    with pytest.raises(ConfigurationError, match="Ed25519"):
        load_key(path)
    with pytest.raises(FileNotFoundError):
        load_keys([tmp_path / "elsewhere"])
