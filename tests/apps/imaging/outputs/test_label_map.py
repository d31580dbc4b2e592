"""NIfTI: places in mm computed from the slices by hand, labels copied exactly."""

import json
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray

from apps.imaging.outputs.label_map import volume_grid, write_label_map
from apps.imaging.stack import SliceStack
from tests.apps.imaging.outputs.scan import Sample


def place_ras(stack: SliceStack, column: int, row: int, index: int) -> NDArray[np.float64]:
    """Return where a pixel of a slice is, in the axes of NIfTI, from DICOM's equation C.7.6.2.1-1."""
    left = stack.origins_mm[index][0] + 1.2 * column * stack.row_axis[0]
    posterior = stack.origins_mm[index][1] + 1.6 * row * stack.column_axis[1]
    superior = stack.origins_mm[index][2] + 1.6 * row * stack.column_axis[2]
    return np.array([-left, -posterior, superior])


def written(sample: Sample, directory: Path) -> tuple[nibabel.Nifti1Image, nibabel.Nifti1Image]:
    grid = volume_grid(sample.stack)
    assert grid is not None
    write_label_map(sample.stack, sample.findings, grid, directory)
    labels = nibabel.load(directory / "labels.nii.gz")
    confidence = nibabel.load(directory / "confidence.nii.gz")
    assert isinstance(labels, nibabel.Nifti1Image)
    assert isinstance(confidence, nibabel.Nifti1Image)
    return labels, confidence


def voxels(image: nibabel.Nifti1Image) -> NDArray[np.uint8]:
    return np.asanyarray(image.dataobj)


def check_places(sample: Sample, image: nibabel.Nifti1Image) -> None:
    for column, row, index in ((0, 0, 0), (55, 0, 0), (0, 47, 0), (0, 0, 19), (31, 17, 11)):
        place = (image.affine @ [column, row, index, 1.0])[:3]
        np.testing.assert_allclose(place, place_ras(sample.stack, column, row, index), atol=1e-3)


def test_plain_slices_keep_voxels_and_places(plain: Sample, tmp_path: Path) -> None:
    labels, confidence = written(plain, tmp_path)
    check_places(plain, labels)
    np.testing.assert_array_equal(voxels(labels).transpose(2, 1, 0), plain.findings.labels)
    np.testing.assert_array_equal(voxels(confidence).transpose(2, 1, 0), plain.findings.confidence)
    assert labels.get_data_dtype() == np.uint8
    assert (int(labels.header["sform_code"]), int(labels.header["qform_code"])) == (1, 1)
    np.testing.assert_allclose(labels.get_qform(), labels.get_sform(), atol=1e-4)


def test_a_tilt_is_a_shear_in_the_affine(tilted: Sample, tmp_path: Path) -> None:
    labels, _ = written(tilted, tmp_path)
    check_places(tilted, labels)
    np.testing.assert_array_equal(voxels(labels).transpose(2, 1, 0), tilted.findings.labels)
    assert int(labels.header["qform_code"]) == 0  # a qform cannot say it


def test_unequal_steps_repeat_the_nearest_slice_and_say_so(uneven: Sample, tmp_path: Path) -> None:
    labels, _ = written(uneven, tmp_path)
    record = json.loads((tmp_path / "grid.json").read_text())
    assert record["is_resampled"]
    found = voxels(labels).transpose(2, 1, 0)
    assert len(found) == len(record["slices"]) == 9 * 4 // 4 + 1 + 10 * 7 // 4
    for index, (source, distance_mm) in enumerate(
        zip(record["slices"], record["distance_mm"], strict=True)
    ):
        np.testing.assert_array_equal(found[index], uneven.findings.labels[source])
        place = (labels.affine @ [0, 0, index, 1.0])[:3]
        away_mm = np.linalg.norm(place - place_ras(uneven.stack, 0, 0, source))
        assert abs(away_mm - distance_mm) < 1e-2
        assert away_mm <= 3.5 + 1e-6  # half the largest step
    assert set(record["slices"]) == set(range(20))


def test_filled_in_slices_are_marked(filled: Sample, tmp_path: Path) -> None:
    written(filled, tmp_path)
    record = json.loads((tmp_path / "grid.json").read_text())
    assert np.flatnonzero(record["is_interpolated"]).tolist() == [9, 10]
    assert not record["is_resampled"]
    assert record["labels"]["7"] == "Mandible"


def test_slices_off_a_line_have_no_affine(plain: Sample) -> None:
    origins = plain.stack.origins_mm.copy()
    origins[7, 0] += 0.5
    assert volume_grid(replace(plain.stack, origins_mm=origins)) is None


def test_rounded_positions_still_fit_one_affine(plain: Sample) -> None:
    origins = plain.stack.origins_mm.copy()
    origins[1::2, 2] += 0.04
    grid = volume_grid(replace(plain.stack, origins_mm=origins))
    assert grid is not None
    assert not grid.is_resampled
    assert grid.distance_mm.max() < 0.06


def test_a_single_slice_has_an_affine(plain: Sample) -> None:
    stack = plain.stack
    single = replace(
        stack,
        hu=stack.hu[:1],
        origins_mm=stack.origins_mm[:1],
        is_interpolated=stack.is_interpolated[:1],
    )
    grid = volume_grid(single)
    assert grid is not None
    np.testing.assert_allclose(grid.affine[:3, 3], place_ras(stack, 0, 0, 0))
