"""The loader puts OpenKBP's arrays the right way round."""

from pathlib import Path

import numpy as np
import pytest

from apps.imaging.openkbp import load_patient


def test_axes_are_posterior_left_and_down(tmp_path: Path) -> None:
    ct = np.zeros((6, 5, 4), dtype=np.int16)
    ct[1, 3, 0] = 1024 + 100  # anterior, to the left, at the top
    bits = np.zeros((6, 5, 4), dtype=np.uint16)
    bits[1, 3, 0] = 1 << 6 | 1 << 8  # mandible, and a target volume that is nobody's organ
    np.savez(tmp_path / "pt_1.npz", ct=ct, roi_bits=bits, voxel_mm=np.array([4.0, 3.5, 2.5]))
    stack, labels = load_patient(tmp_path / "pt_1.npz")
    assert stack.hu.shape == (4, 6, 5)
    assert stack.pixel_mm == (4.0, 3.5)
    (place,) = np.argwhere(labels)
    assert place.tolist() == [3, 1, 3]
    assert labels[3, 1, 3] == 7
    assert stack.hu[3, 1, 3] == 100
    assert stack.hu[0, 0, 0] == -1024
    np.testing.assert_allclose(np.diff(stack.positions_mm), 2.5)


def test_another_file_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "pt_2.npz", ct=np.zeros((2, 2, 2)))
    with pytest.raises(ValueError, match=r"pt_2.npz: expected .* missing \['roi_bits'"):
        load_patient(tmp_path / "pt_2.npz")
