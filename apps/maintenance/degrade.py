"""What a machine that has lost an input still sends: logs only, telemetry only, or both.

Legend: N sequences, C context columns, R rows.
"""

from typing import TYPE_CHECKING

import numpy as np

from apps.maintenance.inputs import EVENT, LOG_COLUMNS, TELEMETRY_COLUMNS, Series

if TYPE_CHECKING:
    from collections.abc import Mapping

    from apps.maintenance.fleet import Bools

VARIANTS = ("both", "logs", "telemetry")


def degraded(series: Series, variant: str) -> Series:
    """Return the series without an input; what is gone is unknown, not zero.

    Args:
        series: With all its inputs.
        variant: The inputs that are left, one of ``VARIANTS``.
    """
    if variant == "both":
        return series
    is_event = series.rows[:, 0] == EVENT
    kept_rows: Mapping[str, Bools] = {"logs": is_event, "telemetry": ~is_event}
    hidden = {"logs": TELEMETRY_COLUMNS, "telemetry": LOG_COLUMNS}
    context = series.context.copy()
    context[:, hidden[variant]] = np.nan
    kept = kept_rows[variant]
    before = np.concatenate([[0], np.cumsum(kept)])
    offsets = before[series.offsets].astype(np.int32)
    return Series(series.rows[kept], offsets, context)


def joined(parts: list[Series]) -> Series:
    """Return the sequences of all parts, one part after the other."""
    bases = np.cumsum([0, *(part.rows.shape[0] for part in parts[:-1])])
    offsets = [part.offsets[:-1] + base for part, base in zip(parts, bases, strict=True)]
    end = [parts[-1].offsets[-1:] + bases[-1]]
    return Series(
        np.concatenate([part.rows for part in parts]),
        np.concatenate([*offsets, *end]).astype(np.int32),
        np.concatenate([part.context for part in parts]),
    )
