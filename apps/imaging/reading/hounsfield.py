"""Stored values to Hounsfield units, and whether a volume's values can be such units.

What cannot be told from the values: an offset of less than about 250 HU, or a scale that is
wrong by less than about a half; no tissue need be in view whose value is known that well.

Legend: K slices, J rows, I columns.
"""

import numpy as np
from numpy.typing import NDArray

from apps.imaging.reading.source import RejectedError
from apps.imaging.reasons import Reason

INT16 = np.iinfo(np.int16)
EXACT = 1e-3  # farther from a whole number is rounding, nearer is float noise

SAMPLES_PER_AXIS = 64  # of a slice, which is enough for shares of a percent
BELOW_AIR_HU = -1250  # air is -1000, its noise is mostly cut at -1024
SMALLEST_RANGE_HU = 300  # of a volume; label maps and masks have less

AIR_HU = (-1100, -700)  # with lung
MIDDLE_HU = (-700, -300)  # edges; no organ
SOFT_HU = (-250, 350)  # fat to contrast-enhanced vessels, plastics of phantoms
FIRM_HU = (350, 700)  # edges and loose bone
DENSE_HU = (700, 1500)  # bone

BELOW_AIR_SHARE = 0.02
NO_SHARE = 0.002  # less is noise
DENSE_SHARE = 0.02


def to_hounsfield(
    stored: NDArray[np.number], slope: float, intercept: float, out: NDArray[np.int16]
) -> tuple[bool, bool]:
    """Write ``stored * slope + intercept`` to ``out``.

    Args:
        stored: Values of one slice, finite, [J, I].
        slope: HU of a step.
        intercept: HU at 0.
        out: Of the same shape.

    Returns:
        Whether values were rounded, and whether any was outside int16 and is now at its end.
    """
    low, high = float(stored.min()), float(stored.max())
    ends = (low * slope + intercept, high * slope + intercept)
    is_clipped = min(ends) < INT16.min or max(ends) > INT16.max
    is_offset = slope == 1 and intercept == int(intercept) and stored.dtype.kind in "iu"
    if is_offset and not is_clipped:
        np.add(stored, int(intercept), out=out, dtype=np.int32, casting="unsafe")
        return False, False
    values = stored * slope + intercept
    rounded = np.rint(values)
    out[...] = rounded.clip(INT16.min, INT16.max)
    return bool((np.abs(values - rounded) > EXACT).any()), is_clipped


def rounding_reasons(num_rounded: int, num_clipped: int, total: int) -> list[Reason]:
    """Return reasons for slices whose values were rounded or cut."""
    reasons = []
    if num_rounded:
        detail = f"values of {num_rounded} of {total} slices rounded to whole HU"
        reasons.append(Reason("HU_ROUNDED", detail))
    if num_clipped:
        detail = f"values of {num_clipped} of {total} slices cut to 16 bits"
        reasons.append(Reason("HU_CLIPPED", detail))
    return reasons


def check_hounsfield(hu: NDArray[np.int16]) -> None:
    """Refuse a volume whose values cannot be Hounsfield units of a body or a phantom.

    Args:
        hu: [K, J, I].

    Raises:
        RejectedError: They cannot.
    """
    row_step, column_step = (max(1, size // SAMPLES_PER_AXIS) for size in hu.shape[1:])
    fault = _fault(hu[:, ::row_step, ::column_step].ravel())
    if fault:
        raise RejectedError("VALUES_NOT_HU", f"expected Hounsfield units, {fault}")


def _fault(values: NDArray[np.int16]) -> str:
    below = values[values < BELOW_AIR_HU]
    if below.size and np.count_nonzero(below != below[0]) > BELOW_AIR_SHARE * values.size:
        return f"many values lie below {BELOW_AIR_HU}"  # padding has one value
    values = values[values >= BELOW_AIR_HU]
    if values.size == 0 or int(values.max()) - int(values.min()) < SMALLEST_RANGE_HU:
        return f"all values lie within {SMALLEST_RANGE_HU}, as in a mask"
    air, middle, soft, firm, dense = (
        float(((values >= low) & (values <= high)).mean())
        for low, high in (AIR_HU, MIDDLE_HU, SOFT_HU, FIRM_HU, DENSE_HU)
    )
    if soft < max(NO_SHARE, middle, dense):
        return f"less is of soft tissue ({soft:.1%}) than of bone or of edges"
    if air < NO_SHARE and dense > max(DENSE_SHARE, firm):
        return f"none are of air while {dense:.1%} are as dense as bone"
    return ""
