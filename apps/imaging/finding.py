"""What the model says of one case, on the grid of its slices.

Legend: K slices, J rows, I columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Organ:
    """One segmented organ.

    Args:
        name: Such as ``Mandible``.
        label: Its value in the label map.
        volume_ml: Of its voxels.
        mean_hu: Over its voxels; NaN if it has none.
        sd_hu: Likewise.
        box: First slice, row, column, and those behind the last; None if it has no voxel.
        confidence: Calibrated probability that its voxels are right, on average, 0 to 1.
        is_sure: Whether its conformal set holds this organ alone.
    """

    name: str
    label: int
    volume_ml: float
    mean_hu: float
    sd_hu: float
    box: tuple[int, int, int, int, int, int] | None
    confidence: float
    is_sure: bool


@dataclass(frozen=True, eq=False)
class Findings:
    """Segmentation of a case with what a reviewer needs beside it.

    Args:
        labels: 0 = none, else the label of an organ, uint8 [K, J, I].
        confidence: Calibrated probability of the label, 255 = certain, uint8 [K, J, I].
        local_share: Weight of the local experts against the global ones, 255 = all,
            uint8 [K, J, I].
        organs: One entry per organ of the task, also those without voxels.
        unusual: Out-of-distribution score of input and geometry, 0 = like the training
            data, 1 = the farthest of its validation cases, above 1 beyond.
        confidence_case: Of the whole case, lowered by repairs, 0 to 1.
        is_referred: Whether the case is below the referral threshold.
        model_version: What computed it.
        seconds: Time of each stage.
    """

    labels: NDArray[np.uint8]
    confidence: NDArray[np.uint8]
    local_share: NDArray[np.uint8]
    organs: tuple[Organ, ...]
    unusual: float
    confidence_case: float
    is_referred: bool
    model_version: str
    seconds: Mapping[str, float]
