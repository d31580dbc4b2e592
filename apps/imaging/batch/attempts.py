"""Attempts at cases: claimed, then settled or given back; what is kept of them is kept at once.

An attempt writes into a directory of its own.  When it ends well, and its claim is still open,
the directory becomes that of the case and the result goes into the journal, both under the
journal's lock.  So the outputs in ``cases/`` are those of the attempt whose result counts;
outputs without a result, of a process killed in between, make room for the next.
"""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from apps.imaging.batch.claims import Event, Kind, RetryLimits
from apps.imaging.batch.journal import Journal, encode_line, sync_directory
from apps.imaging.batch.layout import Layout
from apps.imaging.batch.lease import LeaseWatch
from apps.imaging.outputs.summary import CaseSummary
from apps.imaging.reading.source import Source
from apps.imaging.reasons import Reason, Status

_WORKER = re.compile(r"(?P<driver>[a-z0-9]+)-[a-z0-9-]+")
_CHUNK_BYTES = 2**20
LOST = Reason("WORKER_LOST", "its worker process ended or fell silent")


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at a case.

    Args:
        case_id: Of which case.
        fence: Of its claim.
        is_alone: Whether nothing may run beside it: a process ended under an earlier one.
        directory: Where it writes.
    """

    case_id: str
    fence: int
    is_alone: bool
    directory: Path


class Attempts:
    """The attempts of one worker.

    Args:
        layout: Of the output directory.
        journal: Of the batch, with a heading.
        watch: Tells which other workers and drivers are alive.
        worker: This worker: ``<driver>-...``.
        sources: Cases to choose from, in order, by their ids.
        limits: How often a case is tried.
    """

    def __init__(
        self,
        layout: Layout,
        journal: Journal,
        watch: LeaseWatch,
        worker: str,
        sources: Mapping[str, Source],
        limits: RetryLimits,
    ) -> None:
        self._layout = layout
        self._journal = journal
        self._watch = watch
        self._worker = worker
        self._sources = sources
        self._case_ids = tuple(sources)
        self._limits = limits

    def are_over(self) -> bool:
        """Tell whether all cases to choose from have their result."""
        self._journal.refresh()
        return self._journal.claims.num_settled(self._case_ids) == len(self._case_ids)

    def claim(self, *, alone: bool) -> Attempt | None:
        """Claim the next case, None if there is none just now.

        Before, claims of workers that are gone are ended, and exhausted cases quarantined.

        Args:
            alone: Whether this worker has no other attempt under way.

        Raises:
            UnavailableError, ConfigurationError: See ``Journal.locked``.
        """
        claims = self._journal.claims
        with self._journal.locked():
            self._end_lost()
            for case_id in claims.exhausted(self._case_ids, self._limits):
                self._quarantine(case_id)
            chosen = claims.choose(self._case_ids, self._limits, alone=alone)
            if chosen is None:
                return None
            fence = self._open(chosen)
        directory = self._layout.attempt(chosen, fence)
        directory.mkdir(parents=True)
        return Attempt(chosen, fence, claims[chosen].is_suspect, directory)

    def commit(self, attempt: Attempt, summary: CaseSummary, files: Mapping[str, Any]) -> None:
        """Make an attempt's outputs and its summary those of the case.

        Args:
            attempt: Ended well.
            summary: Of the case, outputs relative to the attempt's directory.
            files: What ``seal`` returned for that directory.

        Raises:
            FencedError: Its claim is not open any more; nothing is kept.
            ValueError: The summary is of another case, names what was not written, or is
                not of JSON.
        """
        if summary.case_id != attempt.case_id or not set(summary.outputs.values()) <= files.keys():
            message = f"case {attempt.case_id}: expected its summary, and every output it names"
            raise ValueError(message)
        num_attempts = self._journal.claims[attempt.case_id].num_claims
        event = self._result(attempt.fence, summary, files, num_attempts)
        encode_line(event.as_record())  # before anything is moved
        with self._journal.locked():
            self._journal.claims.check(event)
            self._keep(attempt)
            self._journal.append(event)

    def end(self, attempt: Attempt, kind: Kind, reason: Reason | None = None) -> None:
        """End an attempt without a result and remove what it wrote."""
        event = self._event(kind, attempt.case_id, attempt.fence, reason=reason)
        with self._journal.locked():
            if self._journal.claims.is_current(attempt.case_id, attempt.fence):
                self._journal.append(event)
        shutil.rmtree(attempt.directory, ignore_errors=True)

    def _open(self, case_id: str) -> int:
        fence = self._journal.claims.last_fence + 1
        self._journal.append(self._event(Kind.CLAIM, case_id, fence, worker=self._worker))
        return fence

    def _end_lost(self) -> None:
        """End the claims of workers that are gone."""
        for case_id, state in list(self._journal.claims.held.items()):
            if state.holder == self._worker or self._watch.is_held(state.holder):
                continue
            has_driver = self._watch.is_held(driver_of(state.holder))
            kind = Kind.LOST if has_driver else Kind.ORPHANED
            self._journal.append(self._event(kind, case_id, state.fence, reason=LOST))

    def _quarantine(self, case_id: str) -> None:
        """Give an exhausted case its result."""
        state = self._journal.claims[case_id]
        last = state.cause or LOST
        num = state.num_failed + state.num_lost + state.num_unavailable
        reason = Reason(last.code, f"given up after {num} attempts; the last: {last.detail}")
        self._make_room(case_id)
        source = self._sources[case_id]
        status = Status.QUARANTINED
        summary = CaseSummary(case_id, source.label, source.series_uid, status, (reason,))
        self._journal.append(self._result(self._open(case_id), summary, {}, state.num_claims))

    def _result(
        self, fence: int, summary: CaseSummary, files: Mapping[str, Any], num_attempts: int
    ) -> Event:
        """Return the event, with paths from the output directory."""
        folder = self._layout.case(summary.case_id).relative_to(self._layout.root)
        outputs = {name: str(folder / path) for name, path in summary.outputs.items()}
        record = {
            "summary": replace(summary, outputs=outputs).as_json(),
            "files": {str(folder / path): facts for path, facts in files.items()},
            "attempts": num_attempts,
        }
        return self._event(Kind.RESULT, summary.case_id, fence, result=record)

    def _event(self, kind: Kind, case_id: str, fence: int, **what: Any) -> Event:  # noqa: ANN401 - of Event
        return Event(kind, case_id, fence, at_s=time.time(), **what)

    def _keep(self, attempt: Attempt) -> None:
        """Put an attempt's directory where the case's belongs."""
        self._make_room(attempt.case_id)
        attempt.directory.rename(self._layout.case(attempt.case_id))
        sync_directory(self._layout.cases)

    def _make_room(self, case_id: str) -> None:
        """Remove outputs without a result: their worker ended between the two."""
        target = self._layout.case(case_id)
        if target.exists():
            left = self._layout.attempt(case_id, self._journal.claims.last_fence)
            left = left.with_name(f"{left.name}.left")
            target.rename(left)
            shutil.rmtree(left, ignore_errors=True)


def driver_of(worker: str) -> str:
    """Return the driver a worker belongs to.

    Raises:
        ValueError: That is no worker's name.
    """
    parts = _WORKER.fullmatch(worker)
    if parts is None:
        message = f"worker: expected <driver>-<name>, got {worker!r:.60}"
        raise ValueError(message)
    return parts["driver"]


def seal(directory: Path) -> dict[str, dict[str, Any]]:
    """Make the files below a directory lasting; return path -> sha256 and bytes of each.

    Raises:
        ValueError: There is something else than plain files and directories.
    """
    paths = [path.relative_to(directory).as_posix() for path in _files_below(directory)]
    return seal_files(directory, paths)


def seal_files(directory: Path, paths: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Make files lasting; return path -> sha256 and bytes of each."""
    sealed = {}
    for path in paths:
        with (directory / path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
            num_bytes = os.fstat(file.fileno()).st_size
        sealed[path] = {"sha256": digest, "bytes": num_bytes}
    return sealed


def sweep(layout: Layout, journal: Journal) -> None:
    """Remove what attempts left behind that are over.

    Attempts that began since the journal was last read have higher fences, and stay.
    """
    claims = journal.claims
    for path in layout.attempts.iterdir():
        case_id, _, fence = path.name.removesuffix(".left").rpartition(".")
        if int(fence) <= claims.last_fence and not claims.is_current(case_id, int(fence)):
            shutil.rmtree(path, ignore_errors=True)


def _files_below(directory: Path) -> Iterator[Path]:
    """Yield all files in order of their paths, and make the directories themselves lasting."""
    for path in sorted(directory.iterdir()):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            message = "outputs: expected files and directories, got a link or a device"
            raise ValueError(message)
        if path.is_dir():
            yield from _files_below(path)
        else:
            yield path
    sync_directory(directory)
