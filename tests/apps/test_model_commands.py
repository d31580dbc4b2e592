"""Versions of a registry are listed, tried, promoted when the gate allows it, and rolled back."""

import argparse
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from apps import model_commands
from cluster.errors import ConfigurationError, UnknownModelError
from cluster.registry import Registry
from cluster.versions import Aliases, VersionRecord


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("v1", "v2", "v3"):
        path = tmp_path / "models" / name
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(b"weights")
        digest = hashlib.sha256(b"weights").hexdigest()
        manifest = {"version": f"base-{name[1]}", "tasks": ["fraud"], "sha256": digest}
        (path / "manifest.json").write_text(json.dumps(manifest))
    root = tmp_path / "models"
    Registry(str(root)).set_aliases(Aliases(stable="base-1"))
    return root


@pytest.fixture
def run(models: Path) -> Callable[..., int]:
    def run(*words: str) -> int:
        parser = argparse.ArgumentParser()
        model_commands.add_parser(parser.add_subparsers())
        args = parser.parse_args(["models", *words, "--models", str(models)])
        status: int = args.run(args)
        return status

    return run


class Reporting(ThreadingHTTPServer):
    """Stands for a platform: it answers /v1/models."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.reports: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answering(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        assert isinstance(self.server, Reporting)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"models": self.server.reports}).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def platform() -> Iterator[Reporting]:
    with Reporting() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def report(version: str, **figures: object) -> dict[str, Any]:
    return {"model_version": version, **VersionRecord().report(), **figures}


def test_versions_are_listed_with_their_aliases_and_shown(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("list") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["v1", "base-1", "fraud", "stable"],
        ["v2", "base-2", "fraud"],
        ["v3", "base-3", "fraud"],
    ]
    assert run("show", "base-2") == 0
    assert json.loads(capsys.readouterr().out)["version"] == "base-2"


def test_a_trial_is_started_replaced_and_ended(run: Callable[..., int], models: Path) -> None:
    registry = Registry(str(models))
    assert run("trial", "v2", "--canary", "0.1") == 0
    assert registry.aliases() == Aliases("base-1", canary="base-2", canary_share=0.1)
    assert run("trial", "base-3", "--shadow", "0.5") == 0
    assert registry.aliases() == Aliases("base-1", shadow="base-3", shadow_share=0.5)
    assert run("rollback") == 0
    assert registry.aliases() == Aliases("base-1")
    with pytest.raises(ConfigurationError, match="other than the stable one"):
        run("trial", "v1", "--canary", "0.1")
    with pytest.raises(ConfigurationError, match="there is none"):
        run("rollback")


def test_the_gate_decides_what_is_promoted_and_a_rollback_returns(
    run: Callable[..., int],
    models: Path,
    platform: Reporting,
    capsys: pytest.CaptureFixture[str],
) -> None:
    registry = Registry(str(models))
    run("trial", "v2", "--canary", "0.1")
    stable = report("base-1", ok=20000, p99_ms=10.0)
    platform.reports = [stable, report("base-2", ok=2000, failed=1, p99_ms=30.0)]
    capsys.readouterr()
    assert run("promote", "v2", "--url", platform.url) == 1
    told = capsys.readouterr().out
    assert "failed requests" in told
    assert "3.00 times" in told
    assert registry.aliases().stable == "base-1"

    assert run("promote", "v2", "--url", platform.url, "--max-slowdown=3", "--max-failed=1") == 0
    assert registry.aliases() == Aliases("base-2", previous="base-1")
    assert run("rollback") == 0
    assert registry.aliases() == Aliases("base-1", previous="base-2")


def test_a_version_that_is_not_on_trial_is_not_promoted(
    run: Callable[..., int], platform: Reporting
) -> None:
    platform.reports = [report("base-1")]
    with pytest.raises(UnknownModelError, match="start with trimoe models trial base-2"):
        run("promote", "v2", "--url", platform.url)
    with pytest.raises(ConfigurationError, match="expected a running platform"):
        run("promote", "v2", "--url", "http://127.0.0.1:9")
