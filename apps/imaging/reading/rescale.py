"""The Hounsfield units of a whole series, where slices may lack their rescale or have a wrong one.

Legend: K slices, J rows, I columns.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from apps.imaging.reading.hounsfield import check_hounsfield, rounding_reasons, to_hounsfield
from apps.imaging.reading.source import RejectedError
from apps.imaging.reasons import Reason

Rescale = tuple[float, float]  # slope, intercept

AS_STORED: Rescale = (1.0, 0.0)


def hounsfield_of(
    stored: Sequence[NDArray[np.integer]], rescales: Sequence[Rescale | None], found: list[Reason]
) -> NDArray[np.int16]:
    """Return the values of all slices, int16 [K, J, I].

    A slice without rescale takes the usual one.  One whose rescale is not the usual one keeps
    it, unless the usual one fits its neighbour better.  Without any rescale, stored values are
    taken for HU if they look like it.

    Args:
        stored: K slices in order, each [J, I].
        rescales: Of each.
        found: Takes the reasons.

    Raises:
        RejectedError: The values cannot be Hounsfield units.
    """
    stated = Counter(rescale for rescale in rescales if rescale is not None)
    usual = stated.most_common(1)[0][0] if stated else AS_STORED
    hu = np.empty((len(stored), *stored[0].shape), np.int16)
    done = [
        to_hounsfield(values, *(rescale or usual), out)
        for values, rescale, out in zip(stored, rescales, hu, strict=True)
    ]
    if 2 * stated[usual] > len(stored):
        _replace_misfits(hu, stored, rescales, usual, found)
    _check(hu, rescales, found)
    found += rounding_reasons(sum(r for r, _ in done), sum(c for _, c in done), len(hu))
    return hu


def _replace_misfits(
    hu: NDArray[np.int16],
    stored: Sequence[NDArray[np.integer]],
    rescales: Sequence[Rescale | None],
    usual: Rescale,
    found: list[Reason],
) -> None:
    regular = np.array([k for k, rescale in enumerate(rescales) if rescale in (None, usual)])
    num_replaced = 0
    for k, rescale in enumerate(rescales):
        if rescale in (None, usual):
            continue
        neighbour = hu[regular[np.abs(regular - k).argmin()]]
        as_usual = np.empty_like(hu[k])
        to_hounsfield(stored[k], *usual, as_usual)
        if _distance(as_usual, neighbour) < _distance(hu[k], neighbour):
            hu[k] = as_usual
            num_replaced += 1
    if num_replaced:
        detail = f"{num_replaced} slices had a rescale that does not fit; took the others'"
        found.append(Reason("RESCALE_REPLACED", detail))


def _check(hu: NDArray[np.int16], rescales: Sequence[Rescale | None], found: list[Reason]) -> None:
    num_missing = sum(rescale is None for rescale in rescales)
    try:
        check_hounsfield(hu)
    except RejectedError as error:
        if num_missing == len(rescales):
            detail = f"no rescale given, and as stored: {error.reason.detail}"
            raise RejectedError("RESCALE_MISSING", detail) from None
        raise
    if num_missing == len(rescales):
        detail = "no rescale given; stored values look like Hounsfield units and are taken so"
        found.append(Reason("RESCALE_ASSUMED", detail))
    elif num_missing:
        detail = f"{num_missing} slices without rescale; took the others'"
        found.append(Reason("RESCALE_FROM_OTHERS", detail))


def _distance(a: NDArray[np.int16], b: NDArray[np.int16]) -> float:
    return float(np.abs(a.astype(np.int32) - b).mean())
