"""The geometry of a stack: axes, order, steps, gaps and tilt.  Numpy only.

What is done to a series, and said in a reason:
    1. Slices are ordered by their place along the normal, not by name or number.
    2. A lone step that is a multiple of the usual step, the wider one where two meet, is a gap:
       slices are missing.  Up to a bound they are filled in, between the values of the neighbours.
    3. Steps that differ otherwise are how the series was acquired: all slices stay where
       they are, as they do under a tilted gantry.

Slices missing at either end leave no trace in the geometry.

Legend: K slices, J rows, I columns, S = K - 1 steps.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from apps.imaging.reading.bounds import Bounds
from apps.imaging.reading.source import RejectedError
from apps.imaging.reasons import Reason
from apps.imaging.stack import SliceStack

Floats = NDArray[np.float64]

SAME_PLACE_MM = 0.05
AXIS_ERROR = 0.01  # of length and of the right angle; headers have 3 digits and more
STEP_ERROR_MM = 0.1  # places are often rounded to this
STEP_ERROR = 0.01  # and spiral steps drift
USUAL_RUN = 4  # so many equal steps in a row are how it was acquired
TILT_DEGREES = 0.1
ORIGIN_SHIFT_MM = 0.5
SPARSE = 1.5  # step by thickness
STEPS_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Gap:
    """Slices missing between two neighbours.

    Args:
        after: Index of the neighbour before it.
        num_missing: Slices to fill in.
    """

    after: int
    num_missing: int


def unit_axes(orientation: Sequence[float]) -> tuple[Floats, Floats]:
    """Return the unit vectors along rows and along columns, at a right angle.

    Args:
        orientation: Both, as in ImageOrientationPatient.

    Raises:
        RejectedError: They are not nearly of unit length and at a right angle.
    """
    row, column = np.asarray(orientation, np.float64).reshape(2, 3)
    row_length, column_length = float(np.linalg.norm(row)), float(np.linalg.norm(column))
    errors = abs(row_length - 1), abs(column_length - 1), abs(float(row @ column))
    if max(errors) > AXIS_ERROR:
        detail = "expected unit vectors at a right angle as orientation, got others"
        raise RejectedError("ORIENTATION_INVALID", detail)
    row = row / row_length
    column = column - (column @ row) * row
    return row, column / np.linalg.norm(column)


def tilt_reasons(origins_mm: Floats, normal: Floats) -> list[Reason]:
    """Return reasons for a stack that does not rise straight along its normal.

    Args:
        origins_mm: Of slices in order, [K, 3].
        normal: Of the slices, [3].
    """
    if len(origins_mm) < 2:
        return []
    rise = (origins_mm - origins_mm[0]) @ normal
    aside = origins_mm - origins_mm[0] - np.outer(rise, normal)
    slope = rise @ aside / (rise @ rise)  # of the line they lie on, if they do
    tilt = np.degrees(np.arctan(np.linalg.norm(slope)))
    shift_mm = np.linalg.norm(aside - np.outer(rise, slope), axis=1)
    shift_mm = float(np.ptp(shift_mm))
    reasons = []
    if tilt > TILT_DEGREES:
        detail = f"gantry tilted by {tilt:.1f} degrees; every slice is kept at its place"
        reasons.append(Reason("TILT_SHEARED", detail))
    if shift_mm > ORIGIN_SHIFT_MM:
        detail = f"slices shifted sideways by up to {shift_mm:.1f} mm; each is kept at its place"
        reasons.append(Reason("ORIGIN_SHIFTED", detail))
    return reasons


def find_gaps(positions_mm: Floats, bounds: Bounds) -> list[Gap]:
    """Return where slices are missing.

    Args:
        positions_mm: Along the normal, rising, [K].
        bounds: The widest gap, and how many slices may be missing in all.

    Raises:
        RejectedError: A gap or their number is beyond the bounds.
    """
    steps = np.diff(positions_mm)
    gaps = []
    for index, usual in enumerate(_usual_around(steps)):
        step = float(steps[index])
        if step <= max(usual) + _error(step):
            continue
        if step > bounds.gap_mm:
            detail = f"expected neighbours within {bounds.gap_mm:g} mm, two are {step:.2f} apart"
            raise RejectedError("GAP_TOO_WIDE", detail)
        multiple = _multiple(step, max(usual))
        if multiple > 1:
            gaps.append(Gap(index, multiple - 1))
    num_missing = sum(gap.num_missing for gap in gaps)
    if num_missing > max(1.0, bounds.lost_share * (len(positions_mm) + num_missing)):
        detail = f"expected few gaps, {num_missing} slices are missing beside {len(positions_mm)}"
        raise RejectedError("GAPS_TOO_MANY", detail)
    return gaps


def step_reasons(
    positions_mm: Floats, gaps: Sequence[Gap], thickness_mm: float | None
) -> list[Reason]:
    """Return reasons for gaps, for steps that differ and for steps wider than the slices.

    Args:
        positions_mm: Along the normal, rising, [K].
        gaps: As found in them.
        thickness_mm: Usual thickness of the slices.
    """
    steps = np.diff(positions_mm)
    reasons = []
    if gaps:
        widest_mm = max(float(steps[gap.after]) for gap in gaps)
        num = sum(gap.num_missing for gap in gaps)
        detail = f"{num} missing slices filled in; neighbours up to {widest_mm:.2f} mm apart"
        reasons.append(Reason("GAP_INTERPOLATED", detail, cost_mm=widest_mm / 2))
    acquired = np.delete(steps, [gap.after for gap in gaps])
    if acquired.size and np.ptp(acquired) > _error(float(acquired.max())):
        detail = f"steps of {_runs(acquired)} mm; every slice is kept at its place"
        reasons.append(Reason("MIXED_SPACING", detail, cost_mm=float(np.ptp(acquired)) / 2))
    step_mm = float(np.median(acquired)) if acquired.size else 0.0
    if thickness_mm is not None and step_mm > SPARSE * thickness_mm + STEP_ERROR_MM:
        detail = f"slices of {thickness_mm:g} mm every {step_mm:.2f} mm; between them is no data"
        reasons.append(Reason("SLICES_SPARSE", detail, cost_mm=(step_mm - thickness_mm) / 2))
    return reasons


def fill_gaps(stack: SliceStack, gaps: Sequence[Gap]) -> tuple[SliceStack, NDArray[np.intp]]:
    """Return the stack with its missing slices, and which acquired slice each one is.

    Args:
        stack: As acquired.
        gaps: As found in it.

    Returns:
        The stack, and indices into the acquired slices, -1 where filled in.
    """
    if not gaps:
        return stack, np.arange(stack.num_slices)
    places = np.concatenate([
        np.arange(stack.num_slices, dtype=np.float64),
        *(gap.after + np.arange(1, gap.num_missing + 1) / (gap.num_missing + 1) for gap in gaps),
    ])  # fmt: skip
    places.sort()
    before = places.astype(np.intp)
    weight = places - before
    behind = np.minimum(before + 1, stack.num_slices - 1)
    hu = stack.hu[before]
    for k in np.flatnonzero(weight):
        ends = stack.hu[before[k]].astype(np.float32), stack.hu[behind[k]].astype(np.float32)
        hu[k] = np.rint(ends[0] + np.float32(weight[k]) * (ends[1] - ends[0]))
    origins = stack.origins_mm
    filled = SliceStack(
        hu=hu,
        origins_mm=origins[before] + weight[:, None] * (origins[behind] - origins[before]),
        row_axis=stack.row_axis,
        column_axis=stack.column_axis,
        pixel_mm=stack.pixel_mm,
        is_interpolated=weight > 0,
    )
    return filled, np.where(weight > 0, -1, before)


def _error(step_mm: float) -> float:
    return STEP_ERROR_MM + STEP_ERROR * step_mm


def _multiple(step_mm: float, usual_mm: float) -> int:
    """Return how many usual steps a step is, 0 if no whole number."""
    nearest = round(step_mm / usual_mm)
    return nearest if abs(step_mm - nearest * usual_mm) <= _error(step_mm) else 0


def _usual_around(steps: Floats) -> list[tuple[float, ...]]:
    """Return for each step the nearest usual steps before and behind it, or itself."""
    usual = _is_usual(steps)
    chosen = np.flatnonzero(usual)
    around: list[tuple[float, ...]] = []
    for index, step in enumerate(steps):
        if usual[index]:
            around.append((float(step),))
            continue
        at = int(np.searchsorted(chosen, index))
        around.append(tuple(float(steps[k]) for k in chosen[max(0, at - 1) : at + 1]))
    return around


def _is_usual(steps: Floats) -> NDArray[np.bool_]:
    """Return which steps are how the series was acquired, bool [S].

    Those are steps of which several follow each other, and those that are frequent without
    being a multiple of a shorter usual one; failing that, the most frequent ones.
    """
    kinds = _kinds(steps)
    counts = Counter(kinds)
    runs = Counter(dict.fromkeys(counts, 0))
    for kind, group in groupby(kinds):
        runs[kind] = max(runs[kind], sum(1 for _ in group))
    of_kind = {kind: float(np.median(steps[np.equal(kinds, kind)])) for kind in counts}
    usual: list[int] = []
    for kind in sorted(counts):  # shorter steps first
        is_multiple = any(_multiple(of_kind[kind], of_kind[k]) > 1 for k in usual)
        if runs[kind] >= USUAL_RUN or (counts[kind] >= USUAL_RUN and not is_multiple):
            usual.append(kind)
    if not usual and counts:
        usual = [min(counts, key=lambda kind: (-counts[kind], kind))]
    return np.isin(kinds, usual)


def _kinds(steps: Floats) -> list[int]:
    """Number steps so that those with one number are equal but for rounding."""
    order = np.argsort(steps, kind="stable")
    kinds = np.zeros(len(steps), np.intp)
    kind, first = -1, -np.inf
    for index in order:
        if steps[index] - first > _error(float(steps[index])):
            kind, first = kind + 1, float(steps[index])
        kinds[index] = kind
    return [int(kind) for kind in kinds]


def _runs(steps: Floats) -> str:
    """Return such as ``13 x 4.00, 1 x 1.08, 13 x 7.00``."""
    runs = [
        list(group)
        for _, group in groupby(zip(_kinds(steps), steps, strict=True), key=lambda pair: pair[0])
    ]
    shown = [f"{len(run)} x {np.mean([step for _, step in run]):.2f}" for run in runs[:STEPS_SHOWN]]
    return ", ".join(shown) + (", ..." if len(runs) > STEPS_SHOWN else "")
