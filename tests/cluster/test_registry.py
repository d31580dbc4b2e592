"""Models on disk are found, named and verified without loading them."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import CheckpointError, ConfigurationError, UnknownModelError
from cluster.registry import Registry
from cluster.versions import Aliases


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
    assert Registry(str(tmp_path)).find().tasks == ("fraud",)
    write_model(tmp_path, "large", "large-7")
    assert [entry.name for entry in Registry(str(tmp_path)).models()] == ["base", "large"]
    assert Registry(str(tmp_path)).find("large-7") == Registry(str(tmp_path)).find("large")
    with pytest.raises(ConfigurationError, match=r"expected one model, got \['base', 'large'\]"):
        Registry(str(tmp_path)).find()
    with pytest.raises(UnknownModelError, match=r"got '\.\./base'"):
        Registry(str(tmp_path)).find("../base")


def test_altered_or_missing_weights_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path, "base", "base-1")
    Registry(str(tmp_path)).find().verify()
    (path / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(CheckpointError, match="the file was altered"):
        Registry(str(tmp_path)).find().verify()
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="the file is missing"):
        Registry(str(tmp_path)).find().verify()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": "1", "tasks": 3, "sha256": ""}'])
def test_unreadable_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (write_model(tmp_path, "base", "1") / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json: expected version"):
        Registry(str(tmp_path)).models()


def test_absent_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="pass --models"):
        Registry(str(tmp_path / "none")).models()


def test_policy_clients_and_registry_need_neither_torch_nor_ray() -> None:
    code = (
        "import sys, cluster.scheduler, cluster.admission, cluster.client, cluster.registry, "
        "apps.platform_commands; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_aliases_are_the_only_model_until_somebody_sets_them(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path))
    write_model(tmp_path, "base", "base-7")
    assert registry.aliases() == Aliases(stable="base-7")
    write_model(tmp_path, "large", "large-7")
    with pytest.raises(ConfigurationError, match="expected one model"):
        registry.aliases()
    registry.set_aliases(Aliases("large-7", previous="base-7"))
    assert registry.aliases() == Aliases("large-7", previous="base-7")
    with pytest.raises(UnknownModelError, match="got \\['other-1'\\]"):
        registry.set_aliases(Aliases("other-1"))
    (tmp_path / "aliases.json").write_text('{"stabel": "x"}')
    with pytest.raises(ConfigurationError, match="expected aliases, got"):
        registry.aliases()


def test_a_registry_behind_a_url_is_fetched_once_and_verified(tmp_path: Path) -> None:
    import fsspec

    write_model(tmp_path / "src", "base", "base-7")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "src" / "base"), "/bucket/models/base", recursive=True)
    registry = Registry("memory://bucket/models", cache=tmp_path / "cache")
    assert [entry.version for entry in registry.models()] == ["base-7"]
    assert registry.fetch().path.is_relative_to(tmp_path / "cache")
    registry.set_aliases(Aliases("base-7"))
    assert registry.aliases() == Aliases("base-7")
    memory.pipe_file("/bucket/models/base/model.safetensors", b"altered")
    registry.fetch("base-7")  # the copy here is still the stated one
    Path(registry.fetch("base").path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="altered, restore it"):
        registry.fetch("base")
    with pytest.raises(UnknownModelError, match="expected letters, digits"):
        registry.find("../base")
