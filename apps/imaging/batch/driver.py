"""The driver of a batch: has its cases run, looks on, and says what came of them.

The driver claims nothing and records nothing; workers do (``workers``).  So it may be killed
at any moment: its workers end, and another driver goes on from the journal.
"""

import fcntl
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from apps.imaging.batch.attempts import seal_files, sweep
from apps.imaging.batch.claims import Claims
from apps.imaging.batch.evidence import publish
from apps.imaging.batch.journal import Journal
from apps.imaging.batch.layout import Layout
from apps.imaging.batch.lease import Lease, LeaseWatch
from apps.imaging.batch.manifest import build_manifest, entries_of
from apps.imaging.batch.plan import Batch, open_batch
from apps.imaging.batch.process import Record
from apps.imaging.batch.progress import Show, Tally
from apps.imaging.batch.workers import WorkerPlan
from apps.imaging.reasons import Status

LOOK_S = 0.25


class Crew(Protocol):
    """Supervised workers, such as a ``cluster.workers.WorkerGroup``."""

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for all workers to end; return whether they have.

        Raises:
            TrimoeError: One of them was given up.
        """
        ...


Hire = Callable[[WorkerPlan], AbstractContextManager[Crew]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run of a driver ended.

    Args:
        is_done: Whether all its cases have their result; else it was told to stop.
        tally: Of its cases.
        num_before: Cases that had a result when it began.
        seconds: How long it took.
        manifest: What was written; None if it was told to stop.
    """

    is_done: bool
    tally: Tally
    num_before: int
    seconds: float
    manifest: Record | None

    @property
    def cases_per_h(self) -> float:
        """Cases an hour, the start of the platform included."""
        return (self.tally.num_settled - self.num_before) * 3600.0 / max(self.seconds, 1e-9)


def run_batch(
    batch: Batch,
    hire: Hire,
    key: Ed25519PrivateKey,
    *,
    is_resumed: bool = False,
    stopping: threading.Event,
    show: Show,
) -> Outcome:
    """Run the cases of a shard that have no result yet, and write the manifest.

    Args:
        batch: What is to be run.
        hire: Runs workers while its block does; called only if a case is left.
        key: Signs the manifest.
        is_resumed: Whether to go on with a batch that was begun.
        stopping: Set to end early; what is done stays done.
        show: Takes a tally a few times a second.

    Raises:
        ConfigurationError: The directory holds something else, or is not to be resumed; or
            no case can be processed.
        UnavailableError: The journal cannot be locked.
    """
    layout = Layout(batch.out)
    case_ids = [each.case_id for each in batch.own_sources]
    driver, began_s = secrets.token_hex(6), time.monotonic()
    with ExitStack() as stack:
        journal = stack.enter_context(open_batch(batch, is_resumed=is_resumed))
        stack.enter_context(Lease(layout.leases, driver, batch.workers.lease_s))
        sweep(layout, journal)
        num_before = tally_of(journal.claims, case_ids).num_settled
        if num_before < len(case_ids) and not stopping.is_set():
            process = batch.application.process
            plan = WorkerPlan(batch.out, driver, batch.own_sources, process, batch.workers)
            with hire(plan) as crew:
                watch_crew(journal, case_ids, crew, stopping, show)
            journal.refresh()  # they may have ended some more
        tally = tally_of(journal.claims, case_ids)
        show(tally)
        is_done = tally.num_settled == tally.num_cases
        manifest = finish(batch, journal, key) if is_done else None
        sweep(layout, journal)
        LeaseWatch(layout.leases, batch.workers.lease_s).sweep()
        return Outcome(is_done, tally, num_before, time.monotonic() - began_s, manifest)


def watch_crew(
    journal: Journal,
    case_ids: Sequence[str],
    crew: Crew,
    stopping: threading.Event,
    show: Show,
) -> None:
    """Look on until all cases have their result, the workers have ended, or it is time to stop.

    Raises:
        TrimoeError: A worker was given up.
    """
    while not stopping.wait(LOOK_S):
        have_ended = crew.wait(0.0)
        journal.refresh()
        tally = tally_of(journal.claims, case_ids)
        show(tally)
        if have_ended or tally.num_settled == tally.num_cases:
            return


def tally_of(claims: Claims, case_ids: Sequence[str]) -> Tally:
    """Return how many cases are where."""
    states = [claims[case_id] for case_id in case_ids]
    statuses = Counter(each.result["summary"]["status"] for each in states if each.result)
    return Tally(
        num_cases=len(states),
        num_settled=statuses.total(),
        num_repaired=statuses[Status.REPAIRED],
        num_quarantined=statuses[Status.QUARANTINED],
        num_held=sum(bool(each.holder) for each in states),
    )


def finish(batch: Batch, journal: Journal, key: Ed25519PrivateKey) -> Record:
    """Write the report of the batch and the signed manifest; return the latter.

    It speaks of all cases that have a result, those of other shards too, so the last driver
    to finish writes the whole.
    """
    layout = Layout(batch.out)
    with _one_at_a_time(layout):
        journal.refresh()
        layout.manifest.unlink(missing_ok=True)
        entries = entries_of(batch.inventory.sources, journal.claims)
        summaries = [entry.summary for entry in entries]
        outputs = batch.application.report(summaries, batch.out, journal.claims.busy_s)
        manifest = build_manifest(
            entries,
            num_cases=len(batch.inventory.sources),
            set_aside=batch.inventory.set_aside,
            outputs=outputs,
            files=seal_files(batch.out, outputs.values()),
            created_at=datetime.now(UTC),
        )
        publish(layout, manifest, key)
    return manifest


@contextmanager
def _one_at_a_time(layout: Layout) -> Iterator[None]:
    """Hold back other drivers that finish, while the block runs."""
    with layout.journal.with_name("finish").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
