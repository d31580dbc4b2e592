"""The platform's commands: findings, models on disk, and one clear line on bad input."""

import argparse
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from apps import platform_commands
from cluster.errors import CheckpointError, ConfigurationError


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    platform_commands.add_parser(parser.add_subparsers())
    args = parser.parse_args(argv)
    status: int = args.run(args)
    return status


@pytest.fixture
def models(tmp_path: Path) -> Path:
    path = tmp_path / "models" / "base"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    manifest = {"version": "base-1", "tasks": ["fraud"], "sha256": digest}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path.parent


def test_check_passes_with_matching_weights_and_fails_with_altered_ones(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", "--models", str(models)) == 0
    assert "base base-1: weights match" in capsys.readouterr().out
    (models / "base" / "model.safetensors").write_bytes(b"weightz")
    assert run("check", "--models", str(models)) == 1
    assert re.search("FAIL models .*the file was altered", capsys.readouterr().out)


def test_check_finds_a_second_owner_of_our_package_names(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A real foreign distribution, as an installer would leave it on the path."""
    info = tmp_path / "site" / "rival-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 1.0\n")
    (info / "RECORD").write_text("kernels/__init__.py,,\n")
    monkeypatch.syspath_prepend(str(info.parent))
    assert run("check", "--models", str(models)) == 1
    assert re.search("FAIL kernels .*also owned by rival", capsys.readouterr().out)


def test_altered_weights_do_not_start_a_platform(models: Path) -> None:
    (models / "base" / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(CheckpointError, match="the file was altered"):
        run("serve", "--models", str(models))


@pytest.mark.parametrize(
    ("host", "variables", "keys"),
    [
        ("0.0.0.0", {}, None),
        ("192.0.2.7", {}, None),
        ("some-host", {}, None),
        ("::", {}, None),
        ("127.0.0.1", {"RAY_SERVE_ENABLE_HA_PROXY": "1"}, None),  # which listens everywhere
        ("127.0.0.1", {}, "[{}]"),
        ("127.0.0.1", {"TRIMOE_API_KEYS": "no-such.json"}, None),
    ],
)
def test_a_platform_that_others_could_reach_without_a_key_does_not_start(
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    variables: Mapping[str, str],
    keys: str | None,
) -> None:
    monkeypatch.chdir(models)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    arguments = ["serve", "--models", str(models), "--host", host]
    if keys is not None:
        (models / "keys.json").write_text(keys)
        arguments += ["--api-keys", "keys.json"]
    with pytest.raises(ConfigurationError, match=r"expected (API keys|tenant|a JSON file)"):
        run(*arguments)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "file:///etc/passwd"])
def test_status_of_nothing_is_one_clear_error(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"expected (a running platform|http://)"):
        run("status", "--url", url)
