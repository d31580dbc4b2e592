"""What a request about remaining life carries: context columns, and patches of cycles.

The order of columns is that of ``core_model.series_tasks``, and a test holds them together.
A table may have fewer sensors in use than there are columns; the others are unknown.

Legend: N rows of a table, C context columns, R request rows, S sensors in use.
"""

import numpy as np

from apps.maintenance.cmapss import Table
from apps.maintenance.fleet import Floats32
from apps.maintenance.inputs import Series
from apps.maintenance.wear import NUM_COURSE, Wear, wear_features

NUM_CHANNELS = 21
NUM_SUMMARIES = 9
PATCH_CYCLES = 5
NUM_PATCHES = 10  # back to 50 cycles


def life_inputs(table: Table, wear: Wear) -> Series:
    """Return the inputs of all rows.

    Raises:
        ValueError: More sensors move than a request has columns for.
    """
    num_used = wear.regimes.used.size
    if num_used > NUM_CHANNELS:
        message = f"sensors: expected at most {NUM_CHANNELS} that move, got {num_used}"
        raise ValueError(message)
    rows, offsets = _patches(table, wear)
    return Series(rows, offsets, _context(table, wear, num_used))


def _context(table: Table, wear: Wear, num_used: int) -> Floats32:
    found = wear_features(table, wear)
    age, course = found[:, :1], found[:, -NUM_COURSE:]
    summaries = np.full((found.shape[0], NUM_SUMMARIES, NUM_CHANNELS), np.nan, np.float32)
    summaries[:, :, :num_used] = found[:, 1:-NUM_COURSE].reshape(-1, NUM_SUMMARIES, num_used)
    return np.concatenate([age, summaries.reshape(found.shape[0], -1), course], axis=1)


def _patches(
    table: Table, wear: Wear
) -> tuple[Floats32, np.ndarray[tuple[int], np.dtype[np.int32]]]:
    scaled = wear.regimes.standardise(table).astype(np.float32)
    num, num_used = scaled.shape
    position = np.arange(num)
    first = np.searchsorted(table.unit, table.unit)
    ages = np.arange(NUM_PATCHES)[::-1] * PATCH_CYCLES
    back = ages[:, None] + np.arange(PATCH_CYCLES)[::-1]
    source = position[:, None, None] - back
    inside = source >= first[:, None, None]
    values = np.full((num, NUM_PATCHES, PATCH_CYCLES, NUM_CHANNELS), np.nan, np.float32)
    seen = scaled[np.maximum(source, 0)]
    values[..., :num_used] = np.where(inside[..., None], seen, np.nan)
    kept = inside.any(axis=2)
    head = np.zeros((num, NUM_PATCHES, 4), np.float32)
    head[:, :, 1] = ages
    head[:, :, 3] = np.nan
    rows = np.concatenate([head, values.reshape(num, NUM_PATCHES, -1)], axis=2)
    offsets = np.concatenate([[0], np.cumsum(kept.sum(axis=1))]).astype(np.int32)
    return rows[kept], offsets
