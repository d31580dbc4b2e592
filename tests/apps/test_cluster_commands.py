"""``trimoe cluster``: findings in one line each and as JSON, and what is refused before a cluster."""

import argparse
import json
import shutil
from pathlib import Path

import pytest

from apps import cluster_commands
from cluster.errors import ConfigurationError, UnavailableError
from cluster.validation.inventory import shipped

pytestmark = pytest.mark.usefixtures("ray_imported")


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    cluster_commands.add_parser(parser.add_subparsers())
    args = parser.parse_args(["cluster", *argv])
    status: int = args.run(args)
    return status


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(shipped(), tmp_path / "deploy"))


def test_the_shipped_files_are_valid(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("validate") == 0
    assert capsys.readouterr().out.endswith(": no findings\n")


def test_findings_are_lines_and_json_and_end_with_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = folder / "serve_config.yaml"
    config.write_text(config.read_text().replace("max_ongoing_requests", "max_ongoing_requets"))
    (folder / "compose.yaml").unlink()
    (folder / "values.yaml").write_text("a: 1")
    (folder / "kuberay" / "redis.yaml").write_text("a: [")
    report = tmp_path / "report.json"
    assert run("validate", "--dir", str(folder), "--json", str(report)) == 1
    lines = capsys.readouterr().out.splitlines()
    findings = json.loads(report.read_text())["findings"]
    assert len(lines) == len(findings) + 1
    assert {(f["file"], f["got"]) for f in findings} >= {
        ("serve_config.yaml", "'max_ongoing_requets'"),
        ("compose.yaml", "none"),
        ("values.yaml", "another"),
    }
    assert (
        "serve_config.yaml: applications[0].deployments[0].max_ongoing_requets: "
        "expected 'max_ongoing_requests', got 'max_ongoing_requets'"
    ) in lines
    assert [
        f for f in findings if f["file"] == "kuberay/redis.yaml" and f["expected"] == "valid YAML"
    ]


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="expected a deploy folder"):
        run("validate", "--dir", str(tmp_path / "nowhere"))


def test_a_config_with_findings_is_not_deployed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = folder / "serve_config.yaml"
    config.write_text(config.read_text().replace("min_replicas: 2", "min_replicas: 9"))
    assert run("deploy", "--config", str(config), "--address", "http://127.0.0.1:9") == 1
    assert "1 finding; nothing was deployed" in capsys.readouterr().out


def test_without_a_cluster_or_a_file_the_error_says_what_to_do(tmp_path: Path) -> None:
    config = str(shipped() / "serve_config.yaml")
    with pytest.raises(UnavailableError, match="start the cluster, or pass its --address"):
        run("deploy", "--config", config, "--address", "http://127.0.0.1:9")
    with pytest.raises(ConfigurationError, match="expected a text file"):
        run("deploy", "--config", str(tmp_path / "none.yaml"))
