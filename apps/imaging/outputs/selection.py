"""Which few slices of a case a reviewer should see, and which part of them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from apps.imaging.finding import Findings, Organ
from apps.imaging.outputs.overlay import BODY_HU, WHOLE, Region
from apps.imaging.stack import SliceStack

MAX_SLICES = 9
ENOUGH = 0.8  # of an organ's largest section: another slice shows it well
MARGIN = 8  # pixels around the body
MIN_VOXELS = 50  # of organs on a slice, to speak of its confidence


def choose_slices(stack: SliceStack, findings: Findings) -> tuple[int, ...]:
    """Return at most nine slices, in order.

    First for each organ, shortest first, the slice of its largest section, unless one chosen
    already shows it well; then the least certain slice; then the first that was filled in.
    Without organs, four at equal distances.
    """
    chosen: list[int] = []
    voxels = np.zeros(stack.num_slices, dtype=np.int64)
    certain = np.zeros(stack.num_slices)
    found = [organ for organ in findings.organs if organ.box is not None]
    for organ in sorted(found, key=_length):
        counts, sums = _sections(organ, findings, stack.num_slices)
        voxels += counts
        certain += sums
        if not any(counts[index] >= ENOUGH * counts.max() for index in chosen):
            chosen.append(int(counts.argmax()))
    if not chosen:
        chosen = np.linspace(0, stack.num_slices - 1, 6).astype(int)[1:-1].tolist()
    is_told = voxels >= MIN_VOXELS
    if is_told.any():
        mean = np.where(is_told, certain / np.maximum(voxels, 1), np.inf)
        chosen.append(int(mean.argmin()))
    if stack.is_interpolated.any():
        chosen.append(int(stack.is_interpolated.argmax()))
    return tuple(sorted(dict.fromkeys(chosen[:MAX_SLICES])))


def body_region(stack: SliceStack, slices: Sequence[int]) -> Region:
    """Return the part of the pictures that holds the body on the given slices."""
    is_body = stack.hu[list(slices)] > BODY_HU
    rows, columns = np.flatnonzero(is_body.any((0, 2))), np.flatnonzero(is_body.any((0, 1)))
    return (_extent(rows), _extent(columns)) if rows.size else WHOLE


def _extent(inside: NDArray[np.intp]) -> slice:
    return slice(max(int(inside[0]) - MARGIN, 0), int(inside[-1]) + 1 + MARGIN)


def _length(organ: Organ) -> int:
    return organ.box[3] - organ.box[0] if organ.box else 0


def _sections(
    organ: Organ, findings: Findings, num_slices: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return voxels of an organ in each slice, and the sum of their confidence."""
    counts, sums = np.zeros(num_slices, dtype=np.int64), np.zeros(num_slices)
    if organ.box is not None:
        first, row, column, last, row_end, column_end = organ.box
        region = np.s_[first:last, row:row_end, column:column_end]
        is_organ = findings.labels[region] == organ.label
        counts[first:last] = np.count_nonzero(is_organ, axis=(1, 2))
        sums[first:last] = np.where(is_organ, findings.confidence[region], 0).sum(axis=(1, 2))
    return counts, sums
