"""One view along the slices: the same row of every slice, each at its place in millimetres.

It shows at a glance what the slice axis looks like: unequal steps, filled-in slices, how far
each organ reaches.  Rows are used as they are, so a tilted gantry shows as a tilted plane.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apps.imaging.finding import Findings, Organ
from apps.imaging.outputs.orientation import letter_of
from apps.imaging.outputs.overlay import Grey, Layer, grey_of, organ_layer
from apps.imaging.stack import SliceStack

MAX_HEIGHT = 900  # pixels
COSINE_45 = 0.7071


@dataclass(frozen=True, eq=False)
class CoronalView:
    """A plane through the stack.

    Args:
        row: Of the slices, that is shown.
        is_coronal: Whether the slices are axial, so that the view is coronal.
        up: Letter of the direction that is up.
        grey: Windowed CT, first line the uppermost, uint8 [lines, columns].
        organs: Over it.
        heights: Where each slice lies, 0 = top, 1 = bottom, float64 [K].
    """

    row: int
    is_coronal: bool
    up: str
    grey: Grey
    organs: Layer
    heights: NDArray[np.float64]


def coronal_view(stack: SliceStack, findings: Findings, columns: slice) -> CoronalView | None:
    """Return the view through the middle of the organs; None for a single slice.

    Args:
        stack: Of the case.
        findings: On its grid.
        columns: Which of them are shown.
    """
    if stack.num_slices < 2:
        return None
    row = _middle_row(stack, findings)
    places_mm = stack.positions_mm - stack.positions_mm[0]
    extent_mm = float(places_mm[-1])
    lines = min(MAX_HEIGHT, max(2, round(extent_mm / stack.pixel_mm[1])))
    wanted_mm = np.linspace(0.0, extent_mm, lines)
    upper = np.clip(np.searchsorted(places_mm, wanted_mm), 1, stack.num_slices - 1)
    part = (wanted_mm - places_mm[upper - 1]) / (places_mm[upper] - places_mm[upper - 1])
    hu = stack.hu[:, row, columns].astype(np.float32)
    weight = part[:, None].astype(np.float32)
    nearest = np.where(part < 0.5, upper - 1, upper)
    grey = grey_of(hu[upper - 1] * (1 - weight) + hu[upper] * weight)
    labels = findings.labels[:, row, columns][nearest]
    heights = places_mm / extent_mm
    is_rising = stack.normal[2] >= 0  # the last slice is the uppermost
    if is_rising:
        grey, labels, heights = grey[::-1], labels[::-1], 1.0 - heights
    organs = organ_layer(np.ascontiguousarray(labels), findings.organs)
    is_coronal = abs(float(stack.normal[2])) > COSINE_45
    up = letter_of(stack.normal if is_rising else -stack.normal)
    return CoronalView(row, is_coronal, up, np.ascontiguousarray(grey), organs, heights)


def _middle_row(stack: SliceStack, findings: Findings) -> int:
    """Return the row in the middle of the organs, large ones counting more."""
    found = [organ for organ in findings.organs if organ.box is not None]
    weights = [organ.volume_ml for organ in found]
    if sum(weights) <= 0:
        return int(stack.hu.shape[1] // 2)
    return int(np.average([_centre(organ) for organ in found], weights=weights))


def _centre(organ: Organ) -> float:
    return (organ.box[1] + organ.box[4] - 1) / 2 if organ.box else 0.0
