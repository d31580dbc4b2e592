"""A CT series as it was acquired: slices with a place each, in patient space.

No slice is moved or averaged here: a tilted gantry, unequal steps and a gap all show in
``origins_mm``.  Regular grids for the model are made from a stack (``resample``), and what
the model says is carried back to it, pixel for pixel.

Coordinates are DICOM's patient axes (left, posterior, superior), millimetres.

Legend: K slices, J rows, I columns.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class SliceStack:
    """Slices in order along their normal.

    Args:
        hu: Hounsfield units, int16 [K, J, I].
        origins_mm: Centre of the first pixel of each slice, float64 [K, 3].
        row_axis: Unit vector along which the column index grows, float64 [3].
        column_axis: Unit vector along which the row index grows, float64 [3].
        pixel_mm: Distance of rows, distance of columns.
        is_interpolated: Which slices were not acquired but filled in, bool [K].

    Raises:
        ValueError: Shapes disagree, or the slices are not in order along the normal.
    """

    hu: NDArray[np.int16]
    origins_mm: NDArray[np.float64]
    row_axis: NDArray[np.float64]
    column_axis: NDArray[np.float64]
    pixel_mm: tuple[float, float]
    is_interpolated: NDArray[np.bool_]

    def __post_init__(self) -> None:
        num = self.hu.shape[0]
        if self.hu.ndim != 3 or num == 0 or self.origins_mm.shape != (num, 3):
            message = (
                f"expected hu [K, J, I] and origins_mm [K, 3], got {list(self.hu.shape)} "
                f"and {list(self.origins_mm.shape)}"
            )
            raise ValueError(message)
        if self.is_interpolated.shape != (num,):
            message = f"expected is_interpolated [{num}], got {list(self.is_interpolated.shape)}"
            raise ValueError(message)
        if (np.diff(self.positions_mm) <= 0).any():
            message = f"expected rising positions, got {self.positions_mm.tolist()!r:.80}"
            raise ValueError(message)

    @property
    def num_slices(self) -> int:
        """K."""
        return len(self.hu)

    @cached_property
    def normal(self) -> NDArray[np.float64]:
        """Unit vector along which the slice index grows, float64 [3]."""
        return np.cross(self.row_axis, self.column_axis)

    @cached_property
    def positions_mm(self) -> NDArray[np.float64]:
        """Place of each slice along the normal, float64 [K]."""
        return self.origins_mm @ self.normal
