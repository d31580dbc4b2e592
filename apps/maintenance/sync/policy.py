"""When a rollout goes on, waits, or stops: counts in, a decision out.

Knows: numbers.  Does not know: boxes, bundles, time, databases.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from cluster.errors import ConfigurationError


class Status(StrEnum):
    """Where a rollout stands."""

    RUNNING = "running"
    PAUSED = "paused"
    AWAITING_APPROVAL = "awaiting_approval"
    STOPPED = "stopped"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Plan:
    """How a rollout proceeds.

    Args:
        shares: Of the group that has it at each stage, rising to 1; the first is the canary.
        min_success: Share of the boxes of a stage that must succeed before the next one.
        max_error: Share of the boxes that were given it that may fail; one more stops it.
        approvals: Stages after which an operator must approve.
        patience_s: After which a box that says nothing is waited for no longer.

    Raises:
        ConfigurationError: A value is out of its range.
    """

    shares: tuple[float, ...] = (0.05, 0.25, 1.0)
    min_success: float = 0.95
    max_error: float = 0.02
    approvals: tuple[int, ...] = (0,)
    patience_s: float = 3 * 86_400

    def __post_init__(self) -> None:
        is_rising = list(self.shares) == sorted(set(self.shares)) and self.shares[-1:] == (1.0,)
        if not is_rising or self.shares[0] <= 0:
            message = f"shares: expected rising shares above 0 that end with 1, got {self.shares}"
            raise ConfigurationError(message)
        if not (0 <= self.max_error < 1 and 0 < self.min_success <= 1 and self.patience_s > 0):
            message = (
                "expected max_error in [0, 1), min_success in (0, 1] and patience_s above 0, got "
                f"{self.max_error}, {self.min_success}, {self.patience_s}"
            )
            raise ConfigurationError(message)

    def num_at(self, stage: int, num_boxes: int) -> int:
        """Return how many boxes of a group should have it at a stage; at least one."""
        return min(num_boxes, max(1, math.ceil(self.shares[stage] * num_boxes)))


@dataclass(frozen=True, slots=True)
class Tally:
    """Boxes that were given a rollout, by how that went.

    Args:
        pending: Were told, or are watching it.
        succeeded: Run it, confirmed.
        failed: Gave it up.
        unreached: Said nothing for too long.
    """

    pending: int = 0
    succeeded: int = 0
    failed: int = 0
    unreached: int = 0

    @property
    def num(self) -> int:
        """All of them."""
        return self.pending + self.succeeded + self.failed + self.unreached


@dataclass(frozen=True, slots=True)
class Step:
    """What follows.

    Args:
        status: Where the rollout stands from now on.
        stage: At which stage.
        reason: Why; empty if nothing changed.
    """

    status: Status
    stage: int
    reason: str = ""


def decide(plan: Plan, stage: int, tally: Tally) -> Step:
    """Return what follows for a running rollout.

    Args:
        plan: Of the rollout.
        stage: At which it stands.
        tally: Of all boxes that were given it.
    """
    if tally.failed > plan.max_error * tally.num:
        reason = f"{tally.failed} of {tally.num} boxes gave it up"
        return Step(Status.STOPPED, stage, reason)
    decided = tally.succeeded + tally.failed
    if tally.pending or not decided:
        return Step(Status.RUNNING, stage)
    if tally.succeeded < plan.min_success * decided:
        reason = f"{tally.succeeded} of {decided} boxes succeeded"
        return Step(Status.STOPPED, stage, reason)
    told = f"{tally.succeeded} boxes succeeded, {tally.unreached} were not reached"
    if stage == len(plan.shares) - 1:
        return Step(Status.DONE, stage, told)
    if stage in plan.approvals:
        return Step(Status.AWAITING_APPROVAL, stage, told)
    return Step(Status.RUNNING, stage + 1, told)
