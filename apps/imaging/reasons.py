"""Why a case is not simply correct: reason codes, what was done, what it cost.

Codes are stable: manifests, worklists and reports carry them.
"""

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """What became of a case."""

    CORRECT = "correct"
    REPAIRED = "repaired"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class Reason:
    """One repair, or the cause of a quarantine.

    Args:
        code: Such as ``GAP_INTERPOLATED``; letters, digits and underscores.
        detail: One line for a person; nothing that identifies a patient.
        cost_mm: How far anatomy may be from where it is said to be, at worst.
    """

    code: str
    detail: str
    cost_mm: float = 0.0
