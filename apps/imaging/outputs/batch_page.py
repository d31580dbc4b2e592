"""The report of a batch: one HTML file with counts, worklist, reasons and times."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np

from apps.imaging.outputs.derived import NOTICE
from apps.imaging.outputs.pages import page
from apps.imaging.outputs.settings import OutputSettings
from apps.imaging.outputs.summary import CaseSummary
from apps.imaging.outputs.worklist import review_order, why
from apps.imaging.reasons import Status

TABLE, WORKLIST = "cases.csv", "worklist.csv"


def batch_page(summaries: Sequence[CaseSummary], wall_s: float, settings: OutputSettings) -> str:
    """Return the page of a batch.

    Args:
        summaries: One per case; links are made of their outputs.
        wall_s: How long the batch took.
        settings: Say whether sources may be named.
    """
    rows = [_row(summary, settings) for summary in review_order(summaries)]
    statuses = Counter(summary.status for summary in summaries)
    return page("batch.html").render(
        total=len(summaries),
        counts=[{"status": each.value, "number": statuses[each]} for each in Status],
        num_referred=sum(summary.is_referred for summary in summaries),
        per_hour=3600.0 * len(summaries) / wall_s if wall_s > 0 else None,
        wall_s=wall_s,
        case_s=_spread([sum(s.seconds.values()) for s in summaries if s.seconds]),
        quarantined=[row for row in rows if row["status"] == Status.QUARANTINED.value],
        worklist=rows,
        histogram=_histogram(summaries),
        stages=_stages(summaries),
        models=sorted({s.model_version for s in summaries if s.model_version}),
        table=TABLE,
        worklist_file=WORKLIST,
        keep_identity=settings.keep_identity,
        notice=NOTICE,
    )


def _row(summary: CaseSummary, settings: OutputSettings) -> Mapping[str, Any]:
    return {
        "case_id": summary.case_id,
        "source": summary.source if settings.keep_identity else "",
        "link": quote(summary.outputs.get("report", "")),
        "status": summary.status.value,
        "why": why(summary),
        "reasons": summary.reasons,
        "confidence": summary.confidence_case,
        "unusual": summary.unusual,
        "num_organs": len(summary.organs),
        "num_found": sum(organ.box is not None for organ in summary.organs),
        "num_slices": summary.num_slices,
        "cost_mm": summary.cost_mm,
        "seconds": sum(summary.seconds.values()),
    }


def _histogram(summaries: Sequence[CaseSummary]) -> list[Mapping[str, Any]]:
    """Return how many cases have each reason, most first."""
    counts = Counter(code for s in summaries for code in {reason.code for reason in s.reasons})
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return [{"code": code, "number": number} for code, number in ordered]


def _stages(summaries: Sequence[CaseSummary]) -> list[Mapping[str, Any]]:
    names = dict.fromkeys(name for summary in summaries for name in summary.seconds)
    values = {name: [s.seconds[name] for s in summaries if name in s.seconds] for name in names}
    return [
        {"name": name, "together": sum(times), **(_spread(times) or {})}
        for name, times in values.items()
    ]


def _spread(values: Sequence[float]) -> Mapping[str, float] | None:
    if not values:
        return None
    median, p95 = np.percentile(values, [50, 95])
    return {"median": float(median), "p95": float(p95)}
