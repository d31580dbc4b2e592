"""The manifest: every case once, canonical bytes, there as a whole or not at all."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from apps.imaging.batch.manifest import (
    Entry,
    build_manifest,
    canonical,
    read_manifest,
    summary_of,
    write_whole,
)
from apps.imaging.outputs.summary import CaseSummary
from apps.imaging.reading.source import SetAside
from apps.imaging.reasons import Reason, Status
from cluster.errors import ConfigurationError

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
FACTS = {"sha256": "0" * 64, "bytes": 1}


def entry(case_id: str, status: Status = Status.CORRECT, version: str = "m-1") -> Entry:
    reasons = () if status is Status.CORRECT else (Reason("GAP_INTERPOLATED", "one", 2.5),)
    summary = CaseSummary(
        case_id,
        f"in/{case_id}",
        "1.2.3",
        status,
        reasons,
        2,
        (0.0, 2.5),
        model_version=version,
        outputs={"report": f"cases/{case_id}/report.html"},
    )
    return Entry(summary, {f"cases/{case_id}/report.html": FACTS}, 1)


def build(*entries: Entry, num_cases: int = 3) -> dict[str, Any]:
    return build_manifest(
        entries,
        num_cases=num_cases,
        set_aside=(SetAside("in/notes.txt", Reason("FOREIGN_FILE", "no image")),),
        outputs={"table": "cases.csv"},
        files={"cases.csv": FACTS},
        created_at=NOW,
    )


def test_it_says_of_every_case_what_the_contract_names() -> None:
    manifest = build(entry("a"), entry("b", Status.REPAIRED), entry("c", Status.QUARANTINED, ""))
    repaired = manifest["cases"][1]
    assert repaired["source"] == "in/b"
    assert repaired["series_uid"] == "1.2.3"
    assert repaired["status"] == "repaired"
    assert repaired["reasons"] == [{"code": "GAP_INTERPOLATED", "detail": "one", "cost_mm": 2.5}]
    assert repaired["num_slices"] == 2
    assert repaired["slice_positions_mm"] == [0.0, 2.5]
    assert repaired["outputs"] == {"report": "cases/b/report.html"}
    assert manifest["complete"]
    assert manifest["created_at"] == "2026-01-02T03:04:05+00:00"
    assert manifest["model_versions"] == {"m-1": 2}
    assert manifest["counts"] == {
        "cases": 3,
        "correct": 1,
        "repaired": 1,
        "quarantined": 1,
        "pending": 0,
        "set_aside": 1,
    }
    expected = {"source": "in/notes.txt", "code": "FOREIGN_FILE", "detail": "no image"}
    assert manifest["set_aside"] == [expected]
    assert manifest["files"].keys() == {*(f"cases/{i}/report.html" for i in "abc"), "cases.csv"}
    assert summary_of(repaired) == entry("b", Status.REPAIRED).summary


def test_cases_that_are_missing_are_pending() -> None:
    manifest = build(entry("a"))
    assert not manifest["complete"]
    assert manifest["counts"]["pending"] == 2


def test_a_case_that_occurs_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="every case once"):
        build(entry("a"), entry("b"), entry("a"))


def test_its_bytes_do_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    manifest = build(entry("a"))
    turned = dict(reversed(manifest.items()))
    assert list(turned) != list(manifest)
    assert canonical(turned) == canonical(manifest)
    path = tmp_path / "manifest.json"
    path.write_bytes(canonical(manifest))
    assert read_manifest(path) == json.loads(json.dumps(manifest))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]\n",
        b"{}\n",
        b'{"format":"trimoe-imaging-manifest/1"}',
        b'{"format": "trimoe-imaging-manifest/1"}\n',
        b'{"a":1,"a":2,"format":"trimoe-imaging-manifest/1"}\n',
        b"[" * 100_000,
    ],
    ids=["empty", "list", "no format", "no newline", "spaces", "a key twice", "deep"],
)
def test_what_is_not_a_canonical_manifest_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(data)
    with pytest.raises(ConfigurationError, match="canonical"):
        read_manifest(path)


def test_nan_has_no_canonical_form() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        canonical({"a": float("nan")})


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with path.open("rb") as reader:
        write_whole(path, b"after", 0o600)
        assert reader.read() == b"before"
    assert path.read_bytes() == b"after"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]
