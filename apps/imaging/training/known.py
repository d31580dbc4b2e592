"""A case whose organs are known, as it was acquired and on the model's grid.

Legend: K J I slices, rows and columns; Z Y X voxels of the grid.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from apps.imaging.resample import PatientGrid
from apps.imaging.stack import SliceStack
from apps.imaging.training.loop import Volume
from apps.imaging.windows import GRID_MM


@dataclass(frozen=True, eq=False)
class Known:
    """A case with its truth.

    Args:
        truth: Organ of each pixel, uint8 [K, J, I].
        grid: Of the model, for its slices.
        hu: On the grid, float32 [Z, Y, X].
        volume: What is trained on.
    """

    truth: NDArray[np.uint8]
    grid: PatientGrid
    hu: NDArray[np.float32]
    volume: Volume

    @classmethod
    def of(cls, stack: SliceStack, truth: NDArray[np.uint8]) -> Self:
        """Sample slices and their truth on the grid."""
        grid = PatientGrid(stack, GRID_MM)
        hu = grid.sample()
        narrow = hu.round().clip(-1024, 3071).astype(np.int16)
        return cls(truth, grid, hu, Volume(narrow, grid.gather(truth)))
