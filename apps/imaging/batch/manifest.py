"""``manifest.json``: what became of every case of a batch, each exactly once.

    format, complete, created_at
    counts          cases, correct, repaired, quarantined, pending, set_aside
    model_versions  version -> number of cases
    cases[]         what ``CaseSummary`` holds, and attempts: how often the case was begun
    set_aside[]     files of the input that belong to no case: source, code, detail
    outputs{}       name -> path of the report of the batch
    files{}         path -> sha256 and bytes of every output

Paths are relative to the manifest's directory.  The file is canonical JSON: keys in order, no
spaces, ASCII, one newline at the end.  So equal manifests are equal bytes, and the signature
over these bytes can be checked with common tools too.
"""

import json
import os
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from apps.imaging.batch.claims import Claims
from apps.imaging.batch.journal import sync_directory
from apps.imaging.batch.process import Record
from apps.imaging.outputs.summary import CaseSummary
from apps.imaging.reading.source import SetAside, Source
from apps.imaging.reasons import Status
from cluster.errors import ConfigurationError

FORMAT = "trimoe-imaging-manifest/1"


@dataclass(frozen=True, slots=True)
class Entry:
    """A case with its result.

    Args:
        summary: Outputs relative to the directory of the batch.
        files: Path -> sha256 and bytes of each.
        num_attempts: How often the case was begun.
    """

    summary: CaseSummary
    files: Record
    num_attempts: int


def summary_of(record: Record) -> CaseSummary:
    """Return the summary of a case that a manifest holds."""
    return CaseSummary.from_json({key: record[key] for key in record if key != "attempts"})


def entries_of(sources: Sequence[Source], claims: Claims) -> Sequence[Entry]:
    """Return the cases that have a result, in the order of the sources."""
    found = []
    for source in sources:
        state = claims[source.case_id]
        if state.result is not None:
            summary = CaseSummary.from_json(state.result["summary"])
            found.append(Entry(summary, state.result["files"], state.result["attempts"]))
    return found


def build_manifest(
    entries: Sequence[Entry],
    *,
    num_cases: int,
    set_aside: Sequence[SetAside],
    outputs: Mapping[str, str],
    files: Record,
    created_at: datetime,
) -> dict[str, Any]:
    """Return the manifest.

    Args:
        entries: Cases with a result.
        num_cases: All cases of the batch.
        set_aside: Files that belong to no case.
        outputs: The report of the batch, name -> path.
        files: Path -> sha256 and bytes of each of its files.
        created_at: Now, with a time zone.

    Raises:
        ValueError: A case occurs twice.
    """
    case_ids = [entry.summary.case_id for entry in entries]
    if len(set(case_ids)) < len(case_ids):
        message = f"manifest: expected every case once, got {len(case_ids)} of {len(set(case_ids))}"
        raise ValueError(message)
    statuses = Counter(entry.summary.status for entry in entries)
    versions = Counter(entry.summary.model_version for entry in entries)
    del versions[""]  # no model was asked
    return {
        "format": FORMAT,
        "complete": len(entries) == num_cases,
        "created_at": created_at.isoformat(timespec="seconds"),
        "counts": {
            "cases": num_cases,
            **{status.value: statuses[status] for status in Status},
            "pending": num_cases - len(entries),
            "set_aside": len(set_aside),
        },
        "model_versions": dict(versions),
        "cases": [entry.summary.as_json() | {"attempts": entry.num_attempts} for entry in entries],
        "set_aside": [
            {"source": each.label, "code": each.reason.code, "detail": each.reason.detail}
            for each in set_aside
        ],
        "outputs": dict(outputs),
        "files": {path: facts for entry in entries for path, facts in entry.files.items()}
        | dict(files),
    }


def canonical(record: Record) -> bytes:
    """Return the one form of a record that is signed.

    Raises:
        ValueError, TypeError: It is not of JSON; NaN is not either.
    """
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii") + b"\n"


def read_manifest(path: Path) -> Record:
    """Return a manifest as it was written.

    Raises:
        FileNotFoundError: There is none.
        ConfigurationError: It is not one, or not canonical.
    """
    data = path.read_bytes()
    try:
        record = json.loads(data)
        is_canonical = canonical(record) == data
    except (ValueError, RecursionError):
        record, is_canonical = None, False
    if not isinstance(record, dict) or record.get("format") != FORMAT or not is_canonical:
        message = f"manifest: expected {FORMAT} in canonical JSON, got something else"
        raise ConfigurationError(message)
    return record


def write_whole(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file so that it is there as a whole or as it was before, whatever happens."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)
    sync_directory(path.parent)
