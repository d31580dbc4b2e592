"""Models on disk are found, named and verified without loading them."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import CheckpointError, ConfigurationError, UnknownModelError
from cluster.registry import find_model, list_models


def write_model(models: Path, name: str, version: str, weights: bytes = b"weights") -> Path:
    path = models / name
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(weights)
    digest = hashlib.sha256(weights).hexdigest()
    manifest = {"version": version, "tasks": ["fraud"], "sha256": digest}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_models_are_found_by_name_by_version_and_alone(tmp_path: Path) -> None:
    write_model(tmp_path, "base", "base-1")
    assert find_model(tmp_path).tasks == ("fraud",)
    write_model(tmp_path, "large", "large-7")
    assert [entry.name for entry in list_models(tmp_path)] == ["base", "large"]
    assert find_model(tmp_path, "large-7") == find_model(tmp_path, "large")
    with pytest.raises(ConfigurationError, match=r"expected one model, got \['base', 'large'\]"):
        find_model(tmp_path)
    with pytest.raises(UnknownModelError, match=r"got '\.\./base'"):
        find_model(tmp_path, "../base")


def test_altered_or_missing_weights_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path, "base", "base-1")
    find_model(tmp_path).verify()
    (path / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(CheckpointError, match="the file was altered"):
        find_model(tmp_path).verify()
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="the file is missing"):
        find_model(tmp_path).verify()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": "1", "tasks": 3, "sha256": ""}'])
def test_unreadable_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (write_model(tmp_path, "base", "1") / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json: expected version"):
        list_models(tmp_path)


def test_absent_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="pass --models"):
        list_models(tmp_path / "none")


def test_policy_clients_and_registry_need_neither_torch_nor_ray() -> None:
    code = (
        "import sys, cluster.scheduler, cluster.admission, cluster.client, cluster.registry, "
        "apps.platform_commands; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
