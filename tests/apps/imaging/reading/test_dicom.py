"""Series of forms that need no repair, or one that the table of faults does not show."""

import copy
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset
from pydicom.uid import EnhancedCTImageStorage, JPEGLSLossless

from apps.imaging.case import Case
from apps.imaging.reading.bounds import Bounds
from apps.imaging.reading.discovery import discover
from apps.imaging.reading.door import read_case
from apps.imaging.reading.pixels import coded_shape
from apps.imaging.reasons import Status
from tests.apps.imaging.reading import faults
from tests.apps.imaging.reading.faults import Slices, write_all


@pytest.fixture
def slices() -> Slices:
    return copy.deepcopy(faults.generated_slices())


def read(folder: Path) -> Case:
    (source,) = discover(folder, Bounds()).sources
    return read_case(source, Bounds())


def codes(case: Case) -> list[str]:
    return [reason.code for reason in case.reasons]


def stored(slices: Iterable[Dataset]) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.stack([slice_.pixel_array for slice_ in slices]).astype(np.int64)


def test_a_rescale_of_its_own_is_kept_where_it_fits(slices: Slices, tmp_path: Path) -> None:
    """One slice is stored with half the step and another offset, and says so."""
    expected = stored(slices) - 1024
    values = (expected[10] + 1500) * 2
    slices[10].PixelData = values.astype("<u2").tobytes()
    slices[10].RescaleSlope, slices[10].RescaleIntercept = 0.5, -1500
    write_all(slices, tmp_path)
    case = read(tmp_path)
    assert case.status is Status.CORRECT
    assert case.stack is not None
    assert (case.stack.hu == expected).all()


def test_signed_values_and_fractions_of_a_unit(slices: Slices, tmp_path: Path) -> None:
    expected = stored(slices) - 1024
    for slice_, values in zip(slices, expected, strict=True):
        slice_.PixelData = (values * 3).astype("<i2").tobytes()
        slice_.PixelRepresentation = 1
        slice_.RescaleSlope, slice_.RescaleIntercept = "0.33333", 0
    write_all(slices, tmp_path)
    case = read(tmp_path)
    assert codes(case) == ["HU_ROUNDED"]
    assert case.stack is not None
    assert (case.stack.hu == expected).all()


def test_values_beyond_16_bits_are_cut_and_named(slices: Slices, tmp_path: Path) -> None:
    expected = stored(slices) - 1024
    values = np.frombuffer(slices[3].PixelData, "<u2").copy()
    values[5] = 60_000
    slices[3].PixelData = values.tobytes()
    slices[3].BitsStored, slices[3].HighBit = 16, 15
    write_all(slices, tmp_path)
    case = read(tmp_path)
    assert codes(case) == ["HU_CLIPPED"]
    expected[3].flat[5] = 32_767
    assert case.stack is not None
    assert (case.stack.hu == expected).all()


def test_jpeg_ls(slices: Slices, tmp_path: Path) -> None:
    expected = stored(slices) - 1024
    for slice_ in slices:
        slice_.compress(JPEGLSLossless, generate_instance_uid=False)
    write_all(slices, tmp_path)
    case = read(tmp_path)
    assert case.status is Status.CORRECT
    assert case.stack is not None
    assert (case.stack.hu == expected).all()


def test_jpeg_lossless(slices: Slices, tmp_path: Path) -> None:
    gdcm = pytest.importorskip("gdcm")  # pydicom cannot write it
    expected = stored(slices) - 1024
    for path in write_all(slices, tmp_path):
        reader, writer = gdcm.ImageReader(), gdcm.ImageWriter()
        reader.SetFileName(str(path))
        assert reader.Read()
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
    case = read(tmp_path)
    assert case.status is Status.CORRECT
    assert case.stack is not None
    assert (case.stack.hu == expected).all()


def enhanced(slices: Slices) -> Dataset:
    """Return one multi-frame object with the frames in another order."""
    whole = copy.deepcopy(slices[0])
    whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    for keyword in (
        "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
        "RescaleSlope", "RescaleIntercept",
    ):  # fmt: skip
        delattr(whole, keyword)
    measures, shared, orientation = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [2.5, 2.5], 5.0
    orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    whole.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for slice_ in reversed(slices):
        place, values, group = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = slice_.ImagePositionPatient
        values.RescaleSlope, values.RescaleIntercept, values.RescaleType = 1, -1024, "HU"
        group.PlanePositionSequence, group.PixelValueTransformationSequence = [place], [values]
        groups.append(group)
    whole.PerFrameFunctionalGroupsSequence = groups
    whole.NumberOfFrames = len(slices)
    whole.PixelData = b"".join(slice_.PixelData for slice_ in reversed(slices))
    return whole


def test_frames_of_one_object_are_slices(slices: Slices, tmp_path: Path) -> None:
    write_all([enhanced(slices)], tmp_path)
    case = read(tmp_path)
    assert case.status is Status.CORRECT
    assert case.stack is not None
    assert (case.stack.hu == stored(slices) - 1024).all()
    places = [slice_.ImagePositionPatient for slice_ in slices]
    assert np.abs(case.stack.origins_mm - np.array(places, float)).max() < 1e-9
    assert len({id(header) for header in case.headers}) == 1


def test_one_object_of_many_frames_is_a_series_beside_others(
    slices: Slices, tmp_path: Path
) -> None:
    whole = enhanced(slices)
    whole.SeriesInstanceUID = "1.2.3"
    write_all([whole, *slices], tmp_path)
    sources = discover(tmp_path, Bounds()).sources
    assert [read_case(each, Bounds()).status for each in sources] == [Status.CORRECT] * 2


def test_frames_without_places_are_refused(slices: Slices, tmp_path: Path) -> None:
    whole = enhanced(slices)
    del whole.PerFrameFunctionalGroupsSequence
    write_all([whole], tmp_path)
    assert codes(read(tmp_path)) == ["FRAMES_UNPLACED"]


def test_oblique_slices_are_ordered_along_their_normal(slices: Slices, tmp_path: Path) -> None:
    """Sagittal slices from left to right and coronal ones from back to front."""
    for name, orientation, direction in (
        ("sagittal", [0, 1, 0, 0, 0, -1], (-1, 0, 0)),
        ("coronal", [1, 0, 0, 0, 0, -1], (0, 1, 0)),
        ("feet first", [-1, 0, 0, 0, 1, 0], (0, 0, -1)),
    ):
        for k, slice_ in enumerate(slices):
            slice_.ImageOrientationPatient = orientation
            slice_.ImagePositionPatient = [5.0 * k * axis for axis in direction]
        write_all(slices, tmp_path / name)
        case = read(tmp_path / name)
        assert case.status is Status.CORRECT
        assert case.stack is not None
        assert np.abs(case.stack.normal - direction).max() < 1e-9
        assert (np.diff(case.stack.positions_mm) > 0).all()
        assert (case.stack.hu == stored(slices) - 1024).all()


def test_a_missing_series_uid_is_made_up_the_same_over_runs(slices: Slices, tmp_path: Path) -> None:
    for slice_ in slices:
        del slice_.SeriesInstanceUID
    write_all(slices, tmp_path)
    first, second = read(tmp_path), read(tmp_path)
    assert first.series_uid == ""
    uids = {
        header.SeriesInstanceUID for case in (first, second) for header in case.headers if header
    }
    assert len(uids) == 1


@pytest.mark.parametrize(
    ("frame", "shape"),
    [
        (b"\xff\xd8\xff\xc4\x00\x04ab\xff\xc3\x00\x0b\x10\x02\x00\x01\x00", (512, 256)),
        (b"\xff\xd8\xff\xf7\x00\x0b\x10\x02\x00\x01\x00", (512, 256)),
        (b"\xff\x4f\xff\x51\x00\x29\0\0" + bytes([0, 0, 1, 10, 0, 0, 2, 0, 0, 0, 0, 10]) + bytes(4), (512, 256)),
        (b"\xff\xd8\xff\xd9", None),
        (b"", None),
    ],
)  # fmt: skip
def test_coded_images_state_their_size(frame: bytes, shape: tuple[int, int] | None) -> None:
    assert coded_shape(frame) == shape


@pytest.mark.slow
def test_four_hundred_slices_are_found_and_read_fast(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    coarse = rng.integers(-1000, 200, (64, 64)).astype(np.int16)
    hu = np.repeat(np.repeat(coarse, 8, axis=0), 8, axis=1)
    series = {"StudyInstanceUID": "1.2", "SeriesInstanceUID": "1.3", "FrameOfReferenceUID": "1.4"}
    write_all((faults.ct_slice(hu, (0, 0, 5 * k), **series) for k in range(400)), tmp_path)
    times_s = []
    for _ in range(3):
        start = time.process_time()  # of this process alone, whatever else runs
        (source,) = discover(tmp_path, Bounds()).sources
        case = read_case(source, Bounds())
        times_s.append(time.process_time() - start)
        assert case.status is Status.CORRECT
        if times_s[-1] < 2.0:
            break  # another one proves no more
    assert min(times_s) < 2.0
