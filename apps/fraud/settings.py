"""What can be set about a fraud worker, with units and defaults."""

from dataclasses import dataclass, field
from pathlib import Path

FIVE_MINUTES_MS = 300_000


@dataclass(frozen=True, slots=True)
class Topics:
    """Names of the four topics."""

    transactions: str = "transactions"
    labels: str = "labels"
    decisions: str = "decisions"
    dead_letters: str = "dead-letters"


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """Settings of one worker of a fraud service.

    Args:
        topics: Where messages are read and written.
        index: This worker; it answers partitions p with p % num_workers == index.
        num_workers: Workers that share the partitions.
        reorder_wait_ms: How long a record waits for earlier events of other partitions.
        max_request_size: Transactions per request, at most.
        max_in_flight: Requests that may be computed at once.
        max_ahead_ms: How far event time may run ahead of the record's timestamp;
            None for replays.
        snapshot_period_s: Time between snapshots of the feature state.
        state_dir: Where this worker keeps snapshots; None keeps none.
        warm_from: Table of earlier transactions for the state of a first start.
        ledger_size: Decisions kept for duplicates.
        profile_dir: Where stage times are written at the end; None writes none.
    """

    topics: Topics = field(default_factory=Topics)
    index: int = 0
    num_workers: int = 1
    reorder_wait_ms: int = 20
    max_request_size: int = 256
    max_in_flight: int = 2
    max_ahead_ms: int | None = FIVE_MINUTES_MS
    snapshot_period_s: float = 60.0
    state_dir: Path | None = None
    warm_from: Path | None = None
    ledger_size: int = 50_000
    profile_dir: Path | None = None

    @property
    def worker_dir(self) -> Path | None:
        """Directory of this worker's snapshots."""
        return None if self.state_dir is None else self.state_dir / f"worker-{self.index}"
