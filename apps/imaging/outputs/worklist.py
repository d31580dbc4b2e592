"""In which order a person reviews a batch, and why each case stands where it does."""

from collections.abc import Iterable
from pathlib import Path

from apps.imaging.outputs.settings import OutputSettings
from apps.imaging.outputs.summary import CaseSummary
from apps.imaging.outputs.table import write_rows
from apps.imaging.reasons import Status

RANKS = {Status.QUARANTINED: 0, Status.REPAIRED: 1, Status.CORRECT: 2}
FAR = 1.0  # unusual score beyond which calibration says nothing
DIGITS = 2  # of uncertainty: what differs by less than a hundredth is equally uncertain
HEADER = (
    "place", "case_id", "source", "status", "why", "confidence", "unusual", "is_referred",
    "doubtful_organs", "cost_mm", "report",
)  # fmt: skip


def review_key(summary: CaseSummary) -> tuple[int, float, int, str]:
    """Return what the worklist is sorted by, smallest first.

    1. Status: quarantined, repaired, correct.
    2. Uncertainty, largest first, to a hundredth.
    3. Organs without voxels or not alone in their conformal set, most first.
    4. The case's name, so that the order is one.
    """
    doubtful = len(summary.doubtful_organs)
    return RANKS[summary.status], -uncertainty(summary), -doubtful, summary.case_id


def uncertainty(summary: CaseSummary) -> float:
    """Return 1 less the case's confidence; 1 where the confidence means nothing.

    That is a quarantined case, and one farther from the training data than any that the
    confidence was calibrated on.
    """
    if summary.confidence_case is None or summary.unusual is None or summary.unusual > FAR:
        return 1.0
    return round(1.0 - summary.confidence_case, DIGITS)


def why(summary: CaseSummary) -> str:
    """Return in one line what a reviewer should look at."""
    parts = [reason.code for reason in summary.reasons]
    if summary.unusual is not None and summary.unusual > FAR:
        parts.append(f"unlike the training data ({summary.unusual:.2f})")
    if summary.is_referred and summary.status is not Status.QUARANTINED:
        parts.append("below the referral threshold")
    if summary.doubtful_organs:
        parts.append(f"in doubt: {', '.join(summary.doubtful_organs)}")
    return "; ".join(parts)


def review_order(summaries: Iterable[CaseSummary]) -> list[CaseSummary]:
    """Return cases in the order of review."""
    return sorted(summaries, key=review_key)


def write_worklist(summaries: Iterable[CaseSummary], path: Path, settings: OutputSettings) -> None:
    """Write the order of review as CSV, one row per case."""
    rows = [
        (
            place,
            summary.case_id,
            summary.source if settings.keep_identity else "",
            summary.status.value,
            why(summary),
            summary.confidence_case,
            summary.unusual,
            summary.is_referred,
            len(summary.doubtful_organs),
            summary.cost_mm,
            summary.outputs.get("report", ""),
        )
        for place, summary in enumerate(review_order(summaries), 1)
    ]
    write_rows(path, HEADER, rows)
