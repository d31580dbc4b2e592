"""A box that runs version 1, the signed repository and server it listens to, an MQTT broker."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from apps.maintenance.sync.outcomes import Outcome
from apps.maintenance.sync.publishing import publish_bundle
from benchmarks.edge_models import make_bundle
from benchmarks.edge_rig import ONE, Box, FileServer, SignedFolder, set_up_box
from tests.apps.maintenance.running_broker import PASSWORD, RunningBroker


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SignedFolder]:
    """Folders of such a repository and such a box, to be copied."""
    folder = tmp_path_factory.mktemp("template")
    signed = SignedFolder(folder / "repository")
    publish_bundle(signed.repository, make_bundle(1))
    with FileServer(signed.folder) as server:
        set_up_box(folder / "box", signed.root)
        box = Box(folder / "box", server.url)
        assert box.take(ONE) is Outcome.SWITCHED
        box.confirm()
        box.close()
    return folder, signed


@pytest.fixture
def signed(template: tuple[Path, SignedFolder], tmp_path: Path) -> SignedFolder:
    """A repository with version 1."""
    shutil.copytree(template[0] / "repository", tmp_path / "repository")
    return SignedFolder(tmp_path / "repository", template[1].signers)


@pytest.fixture
def server(signed: SignedFolder) -> Iterator[FileServer]:
    """Its web server."""
    with FileServer(signed.folder) as found:
        yield found


@pytest.fixture
def box(template: tuple[Path, SignedFolder], tmp_path: Path, server: FileServer) -> Iterator[Box]:
    """A box that runs version 1, confirmed."""
    shutil.copytree(template[0] / "box", tmp_path / "box", symlinks=True)
    found = Box(tmp_path / "box", server.url)
    yield found
    found.close()


@pytest.fixture
def broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningBroker]:
    """Started, and its password known to whoever connects."""
    monkeypatch.setenv("TRIMOE_MQTT_PASSWORD", PASSWORD)
    found = RunningBroker(tmp_path / "passwords")
    found.start()
    yield found
    found.close()
