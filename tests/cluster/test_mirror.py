"""The copy of a remote model: complete and checked, or absent."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.application import load_remote_model
from cluster.errors import CheckpointError, ConfigurationError
from cluster.mirror import mirror_model
from cluster.registry import find_model

ROOT = Path(__file__).parents[2]
WEIGHTS = b"weights" * 1000


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store" / "base"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    manifest = {"version": "b-1", "tasks": ["t"], "sha256": hashlib.sha256(WEIGHTS).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder.parent


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The files of a folder over HTTP."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:  # noqa: ANN401 - passed on
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_: object) -> None:
            """Silence."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def url(store: Path) -> Iterator[str]:
    with served(store) as address:
        yield address


def test_a_copy_is_fetched_once_and_a_new_version_beside_it(
    url: str, store: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    first = mirror_model(url, "base", cache)
    find_model(first, "base").verify()
    (store / "base" / "model.safetensors").unlink()  # not needed a second time
    assert mirror_model(f"{url}/", "base", cache) == first
    other = {"version": "b-2", "tasks": [], "sha256": hashlib.sha256(b"new").hexdigest()}
    (store / "base" / "manifest.json").write_text(json.dumps(other))
    (store / "base" / "model.safetensors").write_bytes(b"new")
    second = mirror_model(url, "base", cache)
    assert second != first
    assert find_model(first).version == "b-1"
    assert find_model(second).version == "b-2"


def test_altered_weights_leave_nothing_behind(url: str, store: Path, tmp_path: Path) -> None:
    (store / "base" / "model.safetensors").write_bytes(b"altered")
    with pytest.raises(CheckpointError, match="the file was altered"):
        mirror_model(url, "base", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        ("{}", "a manifest with sha256"),
        ("nothing", "a manifest"),
        ('{"sha256": "ab"}', "64 digits"),
    ],
)
def test_a_manifest_without_a_digest_is_refused(
    url: str, store: Path, tmp_path: Path, manifest: str, reason: str
) -> None:
    (store / "base" / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=reason):
        mirror_model(url, "base", tmp_path)


def test_too_long_a_file_is_cut_off(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.mirror.MAX_WEIGHTS_BYTES", 100)
    with pytest.raises(CheckpointError, match="expected at most 100 bytes"):
        mirror_model(url, "base", tmp_path)


def test_a_missing_model_and_a_silent_host_are_one_line(url: str, tmp_path: Path) -> None:
    for address, name in ((url, "other"), ("http://127.0.0.1:9", "base")):
        with pytest.raises(CheckpointError, match="expected a file of the model") as caught:
            mirror_model(address, name, tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "name"),
    [("file:///etc", "base"), ("http://h", "../x"), ("http://h", ""), ("http://h", ".x")],
)
def test_other_schemes_and_paths_are_refused(address: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="expected"):
        mirror_model(address, name, tmp_path)


def test_the_shipped_model_loads_from_a_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with served(ROOT / "models") as address:
        assert load_remote_model(address, "fraud", "cpu").version == "fraud-1"
    assert list((tmp_path / ".cache/trimoe/models").glob("*/fraud/model.safetensors"))
