"""The letters at the edge of a picture: which way the patient lies."""

import numpy as np
from numpy.typing import NDArray

POSITIVE, NEGATIVE = "LPH", "RAF"  # DICOM's letters of left, posterior, head and their opposites


def letter_of(axis: NDArray[np.float64]) -> str:
    """Return the direction that an axis points to most.

    Args:
        axis: In DICOM's patient axes, float64 [3].
    """
    main = int(np.abs(axis).argmax())
    return POSITIVE[main] if axis[main] > 0 else NEGATIVE[main]
