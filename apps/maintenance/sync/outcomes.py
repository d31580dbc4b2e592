"""How an attempt to bring a model to an edge box ends: every end has a name.

An attempt is over when it has one of these; there is no other state to be stuck in.
"""

from enum import StrEnum

from cluster.errors import TrimoeError


class Outcome(StrEnum):
    """The final states, and the names of the events that tell of them."""

    UP_TO_DATE = "up_to_date"  # nothing newer is meant for this box
    SWITCHED = "switched"  # the new slot serves, its health is watched
    CONFIRMED = "confirmed"  # it stayed healthy for the whole window

    # the way: the next attempt goes on where this one ended
    UNREACHABLE = "unreachable"
    HTTP_ERROR = "http_error"
    SLOW_RETRIEVAL = "slow_retrieval"
    TRUNCATED = "truncated"
    DISK_FULL = "disk_full"

    # the repository: nothing of it was taken
    METADATA_ROLLBACK = "metadata_rollback"
    METADATA_FROZEN = "metadata_frozen"
    METADATA_EXPIRED = "metadata_expired"
    METADATA_MIXED = "metadata_mixed"
    METADATA_FAST_FORWARD = "metadata_fast_forward"
    METADATA_INVALID = "metadata_invalid"
    WRONG_KEY = "wrong_key"
    THRESHOLD_NOT_MET = "threshold_not_met"
    ENDLESS_DATA = "endless_data"

    # the bundle: the active slot was not touched
    TARGET_MISSING = "target_missing"
    TARGET_ALTERED = "target_altered"
    DELTA_ALTERED = "delta_altered"
    NOT_FOR_THIS_GROUP = "not_for_this_group"
    DOWNGRADE = "downgrade"
    PINNED = "pinned"
    KNOWN_BAD = "known_bad"
    BUNDLE_INVALID = "bundle_invalid"
    MODEL_FAILED = "model_failed"
    GOLDEN_MISMATCH = "golden_mismatch"

    # the watch, or a start: the previous slot serves again
    HEALTH_ERRORS = "health_errors"
    HEALTH_LATENCY = "health_latency"
    HEALTH_OUTPUT = "health_output"
    HEALTH_ALERTS = "health_alerts"
    HEALTH_CRASHES = "health_crashes"
    SLOT_DAMAGED = "slot_damaged"


MODEL_FAULTS: frozenset[Outcome] = frozenset(
    {
        Outcome.BUNDLE_INVALID,
        Outcome.MODEL_FAILED,
        Outcome.GOLDEN_MISMATCH,
        Outcome.HEALTH_ERRORS,
        Outcome.HEALTH_LATENCY,
        Outcome.HEALTH_OUTPUT,
        Outcome.HEALTH_ALERTS,
        Outcome.HEALTH_CRASHES,
    }
)
"""What counts against a version, on the box and in a rollout."""


class RefusedError(TrimoeError):
    """An attempt ended without a switch.

    Args:
        outcome: How.
        detail: What was expected and what came, one line.
    """

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(f"{outcome}: {detail}")
        self.outcome = outcome
        self.detail = detail
