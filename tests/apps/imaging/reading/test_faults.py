"""Every fault has exactly one outcome: correct, repaired with these reasons, or quarantined.

Places must be right to 0.1 mm and values exactly, against what pydicom alone says of the
slices.  The table runs on a generated series, and on the two series of the evaluation data.
"""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import FileDataset, dcmread
from pydicom.uid import JPEG2000Lossless, RLELossless

from apps.imaging.case import Case
from apps.imaging.reading.bounds import Bounds
from apps.imaging.reading.discovery import discover
from apps.imaging.reading.door import read_case
from apps.imaging.reasons import Status
from tests.apps.imaging.reading import faults
from tests.apps.imaging.reading.faults import (
    Slices,
    beside,
    changed,
    cut,
    dropped,
    on_disk,
    without,
)

CORRECT, REPAIRED, QUARANTINED = Status.CORRECT, Status.REPAIRED, Status.QUARANTINED
POSITION_ERROR_MM = 0.1
ALL = tuple(range(faults.NUM_SLICES))
SIDEWAYS = [0, 1, 0, 0, 0, -1]


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, and what must become of it.

    Args:
        write: Writes the folder from good slices.
        status: Of the case.
        codes: Of all its reasons; of a quarantined one, of the cause.
        filled: Slices whose place is filled in.
        lost: Slices that are not in the result.
        num_aside: Files set aside when cases were looked for; None if that depends.
        num_cases: Cases that come of it, all alike.
    """

    write: Callable[[Slices, Path], None]
    status: Status
    codes: str = ""
    filled: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()
    num_aside: int | None = 0
    num_cases: int = 1


FAULTS = {
    # order and names
    "none": Fault(changed(lambda _: None), CORRECT),
    "names shuffled": Fault(faults.shuffled_names, CORRECT),
    "numbers and names reversed": Fault(faults.in_reverse, CORRECT),
    "no suffix": Fault(faults.without_suffix, CORRECT),
    "nested folders": Fault(faults.nested_folders, CORRECT, num_aside=1),
    # slices missing
    "one dropped": Fault(dropped(10), REPAIRED, "GAP_INTERPOLATED", filled=(10,)),
    "two dropped": Fault(dropped(5, 15), REPAIRED, "GAP_INTERPOLATED", filled=(5, 15)),
    "two neighbours dropped": Fault(
        dropped(10, 11), REPAIRED, "GAP_INTERPOLATED", filled=(10, 11)
    ),
    "last dropped": Fault(dropped(27), CORRECT, lost=(27,)),
    "five neighbours dropped": Fault(dropped(*range(10, 15)), QUARANTINED, "GAP_TOO_WIDE"),
    "every third dropped": Fault(dropped(*range(3, 22, 3)), QUARANTINED, "GAPS_TOO_MANY"),
    "every second dropped": Fault(
        dropped(*ALL[1::2]), REPAIRED, "SLICES_SPARSE", lost=ALL[1::2]
    ),
    "two left": Fault(dropped(*ALL[2:]), QUARANTINED, "TOO_FEW_SLICES"),
    # slices twice
    "duplicate": Fault(faults.duplicate, REPAIRED, "DUPLICATE_DROPPED"),
    "duplicate of another name": Fault(faults.duplicate_renamed, REPAIRED, "DUPLICATE_DROPPED"),
    "two pictures at one place": Fault(faults.duplicate_changed, QUARANTINED, "POSITION_CONFLICT"),
    "one UID at two places": Fault(faults.renamed_copies, QUARANTINED, "SOP_UID_REPEATED"),
    # files cut short
    "one cut": Fault(cut(-100, 10), REPAIRED, "FILE_TRUNCATED GAP_INTERPOLATED", filled=(10,)),
    "last cut": Fault(cut(-100, 27), REPAIRED, "FILE_TRUNCATED", lost=(27,)),
    "one cut in its header": Fault(
        cut(300, 10), REPAIRED, "FILE_TRUNCATED GAP_INTERPOLATED", filled=(10,), num_aside=1
    ),
    "last of no bytes": Fault(cut(0, 27), REPAIRED, "FILE_TRUNCATED", lost=(27,), num_aside=1),
    "ten cut": Fault(cut(-100, *range(0, 20, 2)), QUARANTINED, "FILE_TRUNCATED"),
    "all cut in their headers": Fault(cut(300, *ALL), QUARANTINED, "FILE_TRUNCATED", num_aside=28),
    # geometry
    "mixed spacing": Fault(faults.mixed_spacing, REPAIRED, "MIXED_SPACING"),
    "one short step": Fault(faults.short_step, REPAIRED, "MIXED_SPACING"),
    "tilt": Fault(faults.tilt, REPAIRED, "TILT_SHEARED"),
    "tilt and one dropped": Fault(
        faults.tilt_and_drop, REPAIRED, "TILT_SHEARED GAP_INTERPOLATED", filled=(10,)
    ),
    "one shifted sideways": Fault(
        changed(faults.shifted, 10), REPAIRED, "ORIGIN_SHIFTED"
    ),
    "one without position": Fault(
        changed(without("ImagePositionPatient"), 10),
        REPAIRED, "POSITION_MISSING GAP_INTERPOLATED", filled=(10,),
    ),
    "no positions": Fault(
        changed(without("ImagePositionPatient")), QUARANTINED, "POSITION_MISSING"
    ),
    "one without orientation": Fault(
        changed(without("ImageOrientationPatient"), 10),
        REPAIRED, "ORIENTATION_MISSING GAP_INTERPOLATED", filled=(10,),
    ),
    "no orientations": Fault(
        changed(without("ImageOrientationPatient")), QUARANTINED, "ORIENTATION_MISSING"
    ),
    "one of another orientation": Fault(
        changed(faults.having(ImageOrientationPatient=SIDEWAYS), 10),
        REPAIRED, "ORIENTATION_MISMATCH GAP_INTERPOLATED", filled=(10,),
    ),
    "orientation that is none": Fault(
        changed(faults.having(ImageOrientationPatient=[1, 0, 0, 1, 0, 0])),
        QUARANTINED, "ORIENTATION_INVALID",
    ),
    "one of another size": Fault(
        changed(faults.halved, 10),
        REPAIRED, "SLICE_SIZE_MISMATCH GAP_INTERPOLATED", filled=(10,),
    ),
    "one of another pixel spacing": Fault(
        changed(faults.having(PixelSpacing=[0.7, 0.7]), 10),
        REPAIRED, "PIXEL_SPACING_MISMATCH GAP_INTERPOLATED", filled=(10,),
    ),
    "no pixel spacing": Fault(changed(without("PixelSpacing")), QUARANTINED, "PIXEL_SPACING_MISSING"),
    "one of another frame of reference": Fault(
        changed(faults.having(FrameOfReferenceUID="1.2.3"), 10),
        REPAIRED, "FRAME_OF_REFERENCE_MISMATCH GAP_INTERPOLATED", filled=(10,),
    ),
    # values
    "rescale wrong in one": Fault(
        changed(faults.having(RescaleIntercept=300), 10), REPAIRED, "RESCALE_REPLACED"
    ),
    "rescale missing in one": Fault(
        changed(faults.without_rescale, 10), REPAIRED, "RESCALE_FROM_OTHERS"
    ),
    "rescale missing": Fault(changed(faults.without_rescale), QUARANTINED, "RESCALE_MISSING"),
    "intercept wrong": Fault(
        changed(faults.having(RescaleIntercept=0)), QUARANTINED, "VALUES_NOT_HU"
    ),
    "intercept too low": Fault(
        changed(faults.having(RescaleIntercept=-2048)), QUARANTINED, "VALUES_NOT_HU"
    ),
    "slope doubled": Fault(changed(faults.having(RescaleSlope=2)), QUARANTINED, "VALUES_NOT_HU"),
    "slope halved": Fault(changed(faults.having(RescaleSlope=0.5)), QUARANTINED, "VALUES_NOT_HU"),
    "rescaled to another unit": Fault(
        changed(faults.having(RescaleType="Z_EFF")), QUARANTINED, "RESCALE_NOT_HU"
    ),
    # identifiers
    "one without series UID": Fault(
        changed(without("SeriesInstanceUID"), 10), REPAIRED, "SERIES_UID_MISSING"
    ),
    "no series UID": Fault(
        changed(without("SeriesInstanceUID")), REPAIRED, "SERIES_UID_MISSING"
    ),
    "no study UID": Fault(changed(without("StudyInstanceUID")), REPAIRED, "STUDY_UID_MISSING"),
    "no frame of reference": Fault(
        changed(without("FrameOfReferenceUID")), REPAIRED, "FRAME_UID_MISSING"
    ),
    "one without SOP UID": Fault(
        changed(without("SOPInstanceUID"), 10), REPAIRED, "SOP_UID_RECOVERED"
    ),
    "no SOP UID, in the file's meta header neither": Fault(
        changed(faults.without_any_sop_uid), QUARANTINED, "SOP_UID_MISSING"
    ),
    # what lies beside a series
    "two series": Fault(faults.two_series, CORRECT, num_cases=2),
    "two acquisitions": Fault(faults.two_acquisitions, CORRECT, num_cases=2),
    "localiser beside": Fault(beside(faults.localiser), CORRECT, num_aside=1),
    "localiser that does not say so": Fault(
        beside(faults.unmarked_localiser), REPAIRED, "ORIENTATION_MISMATCH"
    ),
    "localiser in a series of its own": Fault(beside(faults.scout_series), CORRECT, num_aside=1),
    "dose report beside": Fault(beside(faults.dose_report), CORRECT, num_aside=1),
    "foreign files beside": Fault(faults.foreign_files, CORRECT, num_aside=3),
    "a pipe beside": Fault(faults.with_a_pipe, CORRECT, num_aside=1),
    "symlink loop": Fault(faults.symlink_loop, CORRECT, num_aside=2),
    "folder linked twice": Fault(faults.linked_twice, CORRECT, num_aside=1),
    # encodings
    "implicit little endian": Fault(faults.implicit, CORRECT),
    "big endian": Fault(faults.big_endian, CORRECT),
    "no preamble": Fault(faults.without_preamble, CORRECT),
    "run length": Fault(faults.compressed(RLELossless), CORRECT),
    "JPEG 2000": Fault(faults.compressed(JPEG2000Lossless), CORRECT),
    "coded image of another size": Fault(
        faults.lying_codestream, QUARANTINED, "PIXELS_UNREADABLE"
    ),
    "60,000 rows and columns": Fault(changed(faults.huge), QUARANTINED, "SLICE_TOO_LARGE"),
    # archives
    "zip": Fault(faults.in_zip, CORRECT),
    "zip in zip": Fault(faults.in_zip_in_zip, CORRECT),
    "zip in zip in zip in zip": Fault(
        faults.in_too_many_zips, QUARANTINED, "ARCHIVE_TOO_DEEP", num_aside=1
    ),
    "zip with a name outside": Fault(faults.in_zip_with_one_outside, CORRECT, num_aside=2),
    "zip with all names outside": Fault(
        faults.in_zip_outside, QUARANTINED, "MEMBER_OUTSIDE", num_aside=28
    ),
    "zip damaged": Fault(
        faults.in_damaged_zip,
        REPAIRED, "FILE_UNREADABLE GAP_INTERPOLATED", filled=(10,), num_aside=None,
    ),
    "zip locked": Fault(faults.in_locked_zip, QUARANTINED, "MEMBER_ENCRYPTED", num_aside=28),
    "zip bomb": Fault(faults.zip_bomb, QUARANTINED, "ARCHIVE_RATIO", num_aside=1),
    "zip of many members": Fault(
        faults.zip_of_a_long_directory, QUARANTINED, "ARCHIVE_TOO_MANY_MEMBERS", num_aside=1
    ),
    "zip that is none": Fault(
        on_disk("case.zip", b"PK\x03\x04 and no more"),
        QUARANTINED, "ARCHIVE_UNREADABLE", num_aside=1,
    ),
    # no series at all
    "empty folder": Fault(faults.empty_folder, QUARANTINED, "PLACE_EMPTY"),
    "text named .dcm": Fault(
        on_disk("slice.dcm", b"Dear colleague, " * 20), QUARANTINED, "FOREIGN_FILE", num_aside=1
    ),
    "another modality": Fault(
        changed(faults.having(Modality="MR")), QUARANTINED, "MODALITY_NOT_CT", num_aside=28
    ),
    "localisers only": Fault(
        changed(faults.having(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])),
        QUARANTINED, "LOCALISER", num_aside=28,
    ),
}  # fmt: skip

# Their steps and offset are others, or they are as slow on any series.
NOT_ON_GE = {
    "every second dropped", "mixed spacing", "one short step", "tilt", "tilt and one dropped",
    "rescale missing", "intercept wrong", "zip bomb",
}  # fmt: skip


def check(fault: Fault, slices: Slices, folder: Path, usual_codes: str = "") -> None:
    """Write the fault, read the folder and compare with what pydicom says of the slices."""
    hu = np.stack([_hounsfield(slice_) for slice_ in slices])
    before = [np.array(slice_.ImagePositionPatient, float) for slice_ in slices]
    fault.write(list(slices), folder)
    inventory = discover(folder, Bounds())
    if fault.num_aside is not None:
        assert len(inventory.set_aside) == fault.num_aside
    assert len(inventory.sources) == fault.num_cases
    origins = np.array(
        [s.get("ImagePositionPatient", p) for s, p in zip(slices, before, strict=True)], float
    )
    for source in inventory.sources:
        case = read_case(source, Bounds())
        if fault.status is QUARANTINED:
            assert case.status is QUARANTINED
            assert case.reasons[0].code == fault.codes
            assert case.stack is None
            assert case.headers == ()
            continue
        codes = {*fault.codes.split(), *usual_codes.split()}
        assert {reason.code for reason in case.reasons} == codes
        assert case.status is (REPAIRED if codes else CORRECT)
        kept = [k for k in range(len(slices)) if k not in fault.lost]
        check_slices(case, hu, origins, kept, fault.filled)


def check_slices(
    case: Case,
    hu: NDArray[np.int16],
    origins_mm: NDArray[np.float64],
    kept: list[int],
    filled: tuple[int, ...],
) -> None:
    stack = case.stack
    assert stack is not None
    is_filled = np.isin(kept, filled)
    assert stack.is_interpolated.tolist() == is_filled.tolist()
    assert np.abs(stack.origins_mm - origins_mm[kept]).max() <= POSITION_ERROR_MM
    assert (stack.hu[~is_filled] == hu[kept][~is_filled]).all()
    acquired = [k for k in kept if k not in filled]
    for k in filled:
        before, behind = max(a for a in acquired if a < k), min(a for a in acquired if a > k)
        share = (k - before) / (behind - before)
        expected = np.rint((1 - share) * hu[before] + share * hu[behind])
        assert np.abs(stack.hu[kept.index(k)] - expected).max() <= 1e-6
    assert [header is None for header in case.headers] == is_filled.tolist()
    uids = [header.SOPInstanceUID for header in case.headers if header is not None]
    assert len(set(uids)) == len(acquired)
    assert not any("PixelData" in header for header in case.headers if header is not None)


def _hounsfield(slice_: FileDataset) -> NDArray[np.int16]:
    values: NDArray[np.float64] = slice_.pixel_array * float(slice_.RescaleSlope) + float(
        slice_.RescaleIntercept
    )
    hu: NDArray[np.int16] = values.astype(np.int16)
    assert (hu == values).all()
    return hu


@pytest.fixture(scope="session")
def generated() -> Slices:
    return faults.generated_slices()


def _evaluation_series(name: str) -> Slices:
    folder = Path(os.environ["TRIMOE_DATA"]) / "imaging" / name
    slices = [dcmread(path) for path in folder.iterdir()]
    return sorted(slices, key=lambda slice_: float(slice_.ImagePositionPatient[2]))


@pytest.fixture(scope="session")
def philips() -> Slices:
    return _evaluation_series("dicom_philips_5mm")


@pytest.fixture(scope="session")
def ge() -> Slices:
    return _evaluation_series("dicom_ge_tilt")


@pytest.mark.parametrize("name", FAULTS)
def test_a_generated_series(name: str, generated: Slices, tmp_path: Path) -> None:
    check(FAULTS[name], copy.deepcopy(generated), tmp_path / "input")


@pytest.mark.data
@pytest.mark.parametrize("name", FAULTS)
def test_a_series_of_equal_steps(name: str, philips: Slices, tmp_path: Path) -> None:
    check(FAULTS[name], copy.deepcopy(philips), tmp_path / "input")


@pytest.mark.data
@pytest.mark.parametrize("name", [name for name in FAULTS if name not in NOT_ON_GE])
def test_a_tilted_series_of_two_steps(name: str, ge: Slices, tmp_path: Path) -> None:
    check(FAULTS[name], copy.deepcopy(ge), tmp_path / "input", "TILT_SHEARED MIXED_SPACING")


@pytest.mark.data
@pytest.mark.parametrize(
    ("k", "filled", "lost"), [(5, (5,), ()), (20, (20,), ()), (13, (), (13,)), (14, (), (14,))]
)
def test_a_slice_missing_at_either_step_or_where_they_meet(
    k: int, filled: tuple[int, ...], lost: tuple[int, ...], ge: Slices, tmp_path: Path
) -> None:
    """Where the steps meet, nothing shows where the missing slice was: none is made up."""
    fault = Fault(dropped(k), REPAIRED, "GAP_INTERPOLATED" if filled else "", filled, lost)
    check(fault, copy.deepcopy(ge), tmp_path / "input", "TILT_SHEARED MIXED_SPACING")


@pytest.mark.data
def test_stored_units_without_rescale_are_recognised(ge: Slices, tmp_path: Path) -> None:
    fault = Fault(changed(faults.without_rescale), REPAIRED, "RESCALE_ASSUMED")
    check(fault, copy.deepcopy(ge), tmp_path / "input", "TILT_SHEARED MIXED_SPACING")


@pytest.mark.data
def test_the_tilted_series_keeps_its_steps(ge: Slices, tmp_path: Path) -> None:
    faults.write_all(ge, tmp_path / "input")
    (source,) = discover(tmp_path / "input", Bounds()).sources
    case = read_case(source, Bounds())
    assert case.stack is not None
    steps = np.diff(case.stack.positions_mm)
    assert np.abs(steps[:13] - 4.0).max() < 0.01
    assert steps[13] == pytest.approx(1.08, abs=0.01)
    assert np.abs(steps[14:] - 7.0).max() < 0.01
    details = {reason.code: reason.detail for reason in case.reasons}
    assert "18.5 degrees" in details["TILT_SHEARED"]
    assert "13 x 4.00, 1 x 1.08, 13 x 7.00 mm" in details["MIXED_SPACING"]
