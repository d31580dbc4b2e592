"""Loader of the OpenKBP patients as files ``pt_*.npz``: planning CT with organ contours.

For evaluation on your own copy (Babier et al., Medical Physics 2021).  The arrays hold
CT numbers + 1024, one bit per structure, and the voxel size in millimetres; axis 0 runs to
posterior, axis 1 to the patient's left, axis 2 from head to foot (read off the organs: the
jaw lies before the cord, the right parotid before the left one, the brainstem above it).

Legend: K J I slices, rows and columns.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apps.imaging.segmentation import ORGANS
from apps.imaging.stack import SliceStack

HU_OFFSET = 1024
HU_MOST = 3071  # metal is stored up to 20 times brighter


def load_patient(path: Path) -> tuple[SliceStack, NDArray[np.uint8]]:
    """Return a patient's slices and the organ of each pixel, uint8 [K, J, I].

    Where contours overlap, the organ that comes later in ``ORGANS`` has the pixel.

    Raises:
        ValueError: The file does not hold ``ct``, ``roi_bits`` and ``voxel_mm``.
    """
    with np.load(path, allow_pickle=False) as file:
        missing = sorted({"ct", "roi_bits", "voxel_mm"} - set(file.files))
        if missing:
            message = f"{path.name}: expected ct, roi_bits and voxel_mm, missing {missing}"
            raise ValueError(message)
        hu = file["ct"].astype(np.int32).transpose(2, 0, 1)[::-1] - HU_OFFSET
        bits = file["roi_bits"].transpose(2, 0, 1)[::-1]
        down, across, step = (float(mm) for mm in file["voxel_mm"])
    labels = np.zeros(bits.shape, dtype=np.uint8)
    for bit in range(len(ORGANS)):
        labels[(bits >> bit) & 1 == 1] = bit + 1
    num = hu.shape[0]
    stack = SliceStack(
        hu=np.ascontiguousarray(hu.clip(-HU_OFFSET, HU_MOST).astype(np.int16)),
        origins_mm=np.outer(np.arange(num) * step, np.array([0.0, 0.0, 1.0])),
        row_axis=np.array([1.0, 0.0, 0.0]),
        column_axis=np.array([0.0, 1.0, 0.0]),
        pixel_mm=(down, across),
        is_interpolated=np.zeros(num, dtype=np.bool_),
    )
    return stack, labels
