"""Every voxel must lie where nibabel's affine puts it, in patient axes of DICOM."""

import gzip
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from apps.imaging.case import Case
from apps.imaging.reading.bounds import Bounds
from apps.imaging.reading.discovery import discover
from apps.imaging.reading.door import read_case
from apps.imaging.reasons import Status

SHAPE = (14, 12, 10)  # i, j, k


def volume() -> NDArray[np.int16]:
    rng = np.random.default_rng(3)
    i, j, _ = np.ogrid[-1:1:14j, -1:1:12j, -1:1:10j]
    hu = np.where(i**2 + j**2 < 0.7, 40.0, -1000.0) + np.zeros(SHAPE)
    hu[3:5, 5:7] = 900
    return (hu + rng.normal(0, 8, SHAPE)).round().astype(np.int16)


def turned(degrees: float) -> NDArray[np.float64]:
    angle = np.radians(degrees)
    about_x = np.array([
        [1, 0, 0],
        [0, np.cos(angle), -np.sin(angle)],
        [0, np.sin(angle), np.cos(angle)],
    ])  # fmt: skip
    about_z = np.array([
        [np.cos(angle), -np.sin(angle), 0],
        [np.sin(angle), np.cos(angle), 0],
        [0, 0, 1],
    ])  # fmt: skip
    return np.asarray(about_x @ about_z)


def affine(axes: NDArray[np.float64] | list[list[float]]) -> NDArray[np.float64]:
    """Return an affine of 0.9, 0.8 and 3 mm along the columns of ``axes``."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.asarray(axes) * [0.9, 0.8, 3.0]
    matrix[:3, 3] = [11.0, -22.0, 33.0]
    return matrix


PLAIN = affine(np.eye(3))
SHEARED_SLICES = affine([[1, 0, 0], [0, 1, 0.3], [0, 0, 1]])
SHEARED_ROWS = affine([[1, 0.3, 0], [0, 1, 0], [0, 0, 1]])


def read(folder: Path) -> Case:
    (source,) = discover(folder, Bounds()).sources
    return read_case(source, Bounds())


def check_voxels(case: Case, hu: NDArray[np.int16], matrix: NDArray[np.float64]) -> None:
    stack = case.stack
    assert stack is not None
    rng = np.random.default_rng(0)
    is_reversed = not np.array_equal(stack.hu[0], hu[:, :, 0].T)
    for i, j, k in rng.integers(0, SHAPE, (40, 3)):
        x, y, z, _ = matrix @ [i, j, k, 1]
        slice_ = SHAPE[2] - 1 - k if is_reversed else k
        place = (
            stack.origins_mm[slice_]
            + i * stack.pixel_mm[1] * stack.row_axis
            + j * stack.pixel_mm[0] * stack.column_axis
        )
        assert np.abs(place - [-x, -y, z]).max() < 1e-3
        assert stack.hu[slice_, j, i] == hu[i, j, k]


@pytest.mark.parametrize(
    ("matrix", "codes"),
    [
        pytest.param(PLAIN, [], id="plain"),
        pytest.param(affine(np.diag([-1, -1, 1])), [], id="left posterior superior"),
        pytest.param(affine(np.diag([-1, 1, 1])), [], id="mirrored"),
        pytest.param(affine(np.diag([1, 1, -1])), [], id="slices downwards"),
        pytest.param(affine(turned(30)), [], id="oblique"),
        pytest.param(affine(np.eye(3)[[1, 2, 0]]), [], id="sagittal"),
        pytest.param(SHEARED_SLICES, ["TILT_SHEARED"], id="tilt"),
    ],
)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_geometry_is_kept(
    matrix: NDArray[np.float64], codes: list[str], suffix: str, tmp_path: Path
) -> None:
    nib.Nifti1Image(volume(), matrix).to_filename(tmp_path / f"ct{suffix}")
    case = read(tmp_path)
    assert [reason.code for reason in case.reasons] == codes
    assert case.status is (Status.REPAIRED if codes else Status.CORRECT)
    assert case.source == f"ct{suffix}"
    assert case.series_uid == ""
    assert case.headers == ()
    check_voxels(case, volume(), matrix)


def test_a_volume_in_an_archive(tmp_path: Path) -> None:
    nib.Nifti1Image(volume(), PLAIN).to_filename(tmp_path / "ct.nii.gz")
    with zipfile.ZipFile(tmp_path / "study.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "ct.nii.gz", "a/ct.nii.gz")
    (tmp_path / "ct.nii.gz").unlink()
    case = read(tmp_path)
    assert case.status is Status.CORRECT
    assert case.source == "study.zip!/a/ct.nii.gz"
    check_voxels(case, volume(), PLAIN)


def test_other_encodings(tmp_path: Path) -> None:
    hu, matrix = volume(), affine(turned(10))
    images = {
        "nifti2": nib.Nifti2Image(hu, matrix),
        "float": nib.Nifti1Image(hu.astype(np.float32), matrix),
        "four": nib.Nifti1Image(hu[..., None], matrix),
        "scaled": nib.Nifti1Image((hu + 1024).astype(np.uint16), matrix),
        "qform": nib.Nifti1Image(hu, matrix),
    }
    images["scaled"].header.set_slope_inter(1.0, -1024.0)
    images["qform"].set_qform(matrix, code=1)
    images["qform"].set_sform(None, code=0)
    for name, image in images.items():
        folder = tmp_path / name
        folder.mkdir()
        nib.save(image, folder / "ct.nii")
        if name == "scaled":  # nibabel scales anew when it saves
            raw = bytearray((folder / "ct.nii").read_bytes())
            raw[352:] = (hu + 1024).astype("<u2").tobytes(order="F")
            raw[112:120] = np.array([1.0, -1024.0], "<f4").tobytes()
            (folder / "ct.nii").write_bytes(raw)
        case = read(folder)
        assert case.status is Status.CORRECT, name
        check_voxels(case, hu, matrix)


def test_values_between_units_are_rounded_and_named(tmp_path: Path) -> None:
    hu = volume() + np.float32(0.4)
    nib.Nifti1Image(hu, PLAIN).to_filename(tmp_path / "ct.nii")
    case = read(tmp_path)
    assert [reason.code for reason in case.reasons] == ["HU_ROUNDED"]
    check_voxels(case, volume(), PLAIN)


def quarantine_cause(folder: Path) -> str:
    case = read(folder)
    assert case.status is Status.QUARANTINED
    assert case.stack is None
    return case.reasons[0].code


@pytest.mark.parametrize(
    ("data", "matrix", "code"),
    [
        (np.stack([volume()] * 2, axis=-1), PLAIN, "NIFTI_NOT_3D"),
        (volume()[:, :, 0], PLAIN, "NIFTI_NOT_3D"),
        (volume()[:, :, :2], PLAIN, "TOO_FEW_SLICES"),
        (np.where(volume() > 800, np.nan, volume()), PLAIN, "VOXELS_NOT_FINITE"),
        (volume().astype(np.complex64), PLAIN, "VOXELS_UNSUPPORTED"),
        ((volume() > 0).astype(np.uint8), PLAIN, "VALUES_NOT_HU"),
        (volume(), SHEARED_ROWS, "AFFINE_SHEARED"),
        (volume(), affine([[1, 1, 0], [0, 0, 0], [0, 0, 1]]), "AFFINE_SHEARED"),
        (volume(), affine([[1, 0, 0], [0, 1, 1], [0, 0, 0]]), "AFFINE_INVALID"),
    ],
)
def test_no_volume_of_known_places(
    data: NDArray[np.number], matrix: NDArray[np.float64], code: str, tmp_path: Path
) -> None:
    nib.Nifti1Image(data, matrix).to_filename(tmp_path / "ct.nii.gz")
    assert quarantine_cause(tmp_path) == code


def test_headers_that_say_too_little_or_two_things(tmp_path: Path) -> None:
    nowhere = nib.Nifti1Image(volume(), PLAIN)
    nowhere.set_sform(None, code=0)
    nowhere.set_qform(None, code=0)
    twofold = nib.Nifti1Image(volume(), PLAIN)
    twofold.set_qform(affine(np.diag([-1, 1, 1])), code=1)
    micron = nib.Nifti1Image(volume(), PLAIN)
    micron.header.set_xyzt_units("micron")
    images = {

        "ORIENTATION_MISSING": nowhere, "AFFINE_CONFLICT": twofold, "UNIT_NOT_MM": micron,
    }  # fmt: skip
    for code, image in images.items():
        (tmp_path / code).mkdir()
        nib.save(image, tmp_path / code / "ct.nii")
        assert quarantine_cause(tmp_path / code) == code


@pytest.mark.parametrize(
    ("cut", "suffix", "code"),
    [
        (-100, ".nii", "FILE_TRUNCATED"),
        (-100, ".nii.gz", "FILE_TRUNCATED"),
        (200, ".nii", "NIFTI_UNREADABLE"),
        (10, ".nii.gz", "FILE_TRUNCATED"),
        (0, ".nii", "NIFTI_UNREADABLE"),
    ],
)
def test_files_cut_short(cut: int, suffix: str, code: str, tmp_path: Path) -> None:
    path = tmp_path / f"ct{suffix}"
    nib.Nifti1Image(volume(), PLAIN).to_filename(path)
    path.write_bytes(path.read_bytes()[:cut])
    assert quarantine_cause(tmp_path) == code


def test_a_header_that_claims_too_much_is_not_believed(tmp_path: Path) -> None:
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((30_000, 30_000, 30_000))
    header.set_sform(PLAIN, code=1)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    with gzip.open(tmp_path / "bomb.nii.gz", "wb") as packed:
        packed.write(header.binaryblock + bytes(2**20))
    assert quarantine_cause(tmp_path) == "SERIES_TOO_LARGE"


def test_each_file_is_a_case(tmp_path: Path) -> None:
    for name in ("b.nii.gz", "a.nii"):
        nib.Nifti1Image(volume(), PLAIN).to_filename(tmp_path / name)
    sources = discover(tmp_path, Bounds()).sources
    assert [source.label for source in sources] == ["a.nii", "b.nii.gz"]
    assert sources[0].case_id != sources[1].case_id
