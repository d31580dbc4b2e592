"""The batch as CSV, one row per case and organ; a case without organs has one row."""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from apps.imaging.finding import Organ
from apps.imaging.outputs.deidentify import Pseudonyms
from apps.imaging.outputs.settings import OutputSettings
from apps.imaging.outputs.summary import CaseSummary

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
DIGITS = 4
CASE_COLUMNS = (
    "case_id", "source", "series_uid", "status", "reasons", "cost_mm", "num_slices",
    "confidence_case", "unusual", "is_referred", "model_version", "seconds",
)  # fmt: skip
ORGAN_COLUMNS = (
    "organ", "label", "volume_ml", "mean_hu", "sd_hu", "organ_confidence", "is_sure",
)  # fmt: skip

Cell = str | float | bool | None


def write_table(summaries: Iterable[CaseSummary], path: Path, settings: OutputSettings) -> None:
    """Write all cases of a batch; sources and original UIDs only where identity is kept."""
    pseudonyms = Pseudonyms(settings)
    rows = [
        (*_case_cells(summary, pseudonyms, settings), *cells)
        for summary in summaries
        for cells in [_organ_cells(organ) for organ in summary.organs] or [(None,) * 7]
    ]
    write_rows(path, (*CASE_COLUMNS, *ORGAN_COLUMNS), rows)


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """Write a CSV file; what is not a number is left empty, text is never a formula."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows([_cell(value) for value in row] for row in rows)


def _case_cells(
    summary: CaseSummary, pseudonyms: Pseudonyms, settings: OutputSettings
) -> tuple[Cell, ...]:
    return (
        summary.case_id,
        summary.source if settings.keep_identity else "",
        pseudonyms.uid(summary.series_uid) if summary.series_uid else "",
        summary.status.value,
        ";".join(reason.code for reason in summary.reasons),
        summary.cost_mm,
        summary.num_slices,
        summary.confidence_case,
        summary.unusual,
        summary.is_referred,
        summary.model_version,
        sum(summary.seconds.values()),
    )


def _organ_cells(organ: Organ) -> tuple[Cell, ...]:
    return (
        organ.name,
        organ.label,
        organ.volume_ml,
        organ.mean_hu,
        organ.sd_hu,
        organ.confidence,
        organ.is_sure,
    )


def _cell(value: Cell) -> str | float:
    if isinstance(value, str):  # a spreadsheet would run a formula
        return f"'{value}" if value.startswith(FORMULA_STARTS) else value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or math.isnan(value):
        return ""
    return round(value, DIGITS)
