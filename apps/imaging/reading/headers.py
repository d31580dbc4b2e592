"""What one DICOM file says of itself: which object it is, and where its slices lie.

Values that cannot be used count as missing; what a missing value means is decided by
whoever has the whole series.
"""

import io
import logging
import math
import zlib
from dataclasses import dataclass
from typing import IO

import pydicom
from pydicom import Dataset, FileDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian

from apps.imaging.reading.bounds import Bounds
from apps.imaging.reading.source import RejectedError

CT_CLASSES = frozenset({
    "1.2.840.10008.5.1.4.1.1.2",  # CT Image Storage
    "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT
    "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT
})  # fmt: skip
GROUPING_TAGS: list[str] = [
    "ImageType", "SOPClassUID", "Modality", "StudyInstanceUID",
    "SeriesInstanceUID", "SeriesNumber", "AcquisitionNumber", "ImagePositionPatient",
    "FrameOfReferenceUID", "Rows", "Columns", "NumberOfFrames",
]  # fmt: skip
MACROS = (
    "PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence",
    "PixelValueTransformationSequence",
)  # fmt: skip

PREAMBLE_BYTES = 128
HEAD_BYTES = PREAMBLE_BYTES + 4
META_BYTES = 4096  # more than the elements of group 2 take
LONG_VRS = (b"OB", b"OW", b"UN", b"UT", b"SQ")
DEFLATED_UID = DeflatedExplicitVRLittleEndian.encode()
RAW_STARTS = (b"\x08\x00", b"\x02\x00")  # first group of a file without preamble

pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its messages quote values


@dataclass(frozen=True, slots=True)
class Frame:
    """One slice by its header; None where that says nothing usable.

    Args:
        position_mm: Centre of the first pixel.
        orientation: Direction of rows, then of columns.
        pixel_mm: Distance of rows, of columns.
        shape: Rows, columns.
        thickness_mm: Of the slice.
        rescale: Slope, intercept.
        frame_of_reference: UID; empty if missing.
    """

    position_mm: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    pixel_mm: tuple[float, ...] | None
    shape: tuple[int, int]
    thickness_mm: float | None
    rescale: tuple[float, float] | None
    frame_of_reference: str


def is_dicom(head: bytes) -> bool:
    """Tell from its first ``HEAD_BYTES`` whether a file claims to be DICOM."""
    if head[PREAMBLE_BYTES:] == b"DICM":
        return True
    has_vr = head[4:6].isalpha() and head[4:6].isupper()
    return head[:2] in RAW_STARTS and (has_vr or head[6:8] == b"\0\0")


def read_header(stream: IO[bytes], bounds: Bounds, tags: list[str] | None = None) -> FileDataset:
    """Return the header of a DICOM file; the stream is left where its pixels begin.

    Args:
        stream: At its start; can seek.
        bounds: Limit of what a deflated file may expand to.
        tags: The only elements that are kept; None keeps all.

    Raises:
        RejectedError: It cannot be read.
    """
    try:
        _check_deflated(stream, bounds)
        header = pydicom.dcmread(stream, stop_before_pixels=True, force=True, specific_tags=tags)
    except RejectedError:
        raise
    except Exception as error:  # noqa: BLE001 - pydicom raises of every kind on broken files
        detail = f"expected a DICOM header, reading it failed by {type(error).__name__}"
        raise RejectedError("FILE_TRUNCATED", detail) from None
    header.filename = None
    header.buffer = None  # else each header keeps, and pickles, its file
    return header


def text_of(dataset: Dataset, keyword: str) -> str:
    """Return a value as text, empty if it is missing or cannot be read."""
    try:
        value = dataset.get(keyword)
    except (ValueError, TypeError, NotImplementedError):
        return ""
    return "" if value is None else str(value).strip().strip("\0")


def class_of(header: FileDataset) -> str:
    """Return the SOP class, from the file's meta header if the object lacks it."""
    return text_of(header, "SOPClassUID") or text_of(header.file_meta, "MediaStorageSOPClassUID")


def whole_number(dataset: Dataset, keyword: str, default: int) -> int:
    """Return a value as a number, ``default`` if it is missing or none."""
    numbers = _numbers(dataset, keyword, 1)
    return default if numbers is None else int(numbers[0])


def frames_of(header: FileDataset, bounds: Bounds) -> list[Frame]:
    """Return the slices of an image, more than one if it is a multi-frame one.

    Raises:
        RejectedError: Frames have no places, or there are more or larger ones than allowed.
    """
    num = whole_number(header, "NumberOfFrames", 1)
    rows, columns = (whole_number(header, name, 0) for name in ("Rows", "Columns"))
    if not (0 < rows <= bounds.rows and 0 < columns <= bounds.rows and 0 < num <= bounds.slices):
        detail = (
            f"expected up to {bounds.slices} frames of up to {bounds.rows} rows and columns, "
            f"got {num} of {rows} x {columns}"
        )
        code = "FILE_TRUNCATED" if rows == 0 or columns == 0 else "SLICE_TOO_LARGE"
        raise RejectedError(code, detail)
    groups = header.get("PerFrameFunctionalGroupsSequence")
    if groups is None and num == 1:
        return [_frame(header, header, (rows, columns))]
    if groups is None or len(groups) != num:
        got = 0 if groups is None else len(groups)
        detail = f"expected a place for each of {num} frames, got {got}"
        raise RejectedError("FRAMES_UNPLACED", detail)
    shared = header.get("SharedFunctionalGroupsSequence") or [Dataset()]
    return [_frame(header, _flat(shared[0], group), (rows, columns)) for group in groups]


def _frame(header: FileDataset, values: Dataset, shape: tuple[int, int]) -> Frame:
    slope = _numbers(values, "RescaleSlope", 1)
    intercept = _numbers(values, "RescaleIntercept", 1)
    thickness = _numbers(values, "SliceThickness", 1)
    pixel_mm = _numbers(values, "PixelSpacing", 2)
    unit = text_of(values, "RescaleType")
    if unit not in ("", "HU", "US"):  # US is unspecified: the values are looked at in any case
        raise RejectedError("RESCALE_NOT_HU", "expected Hounsfield units, got another unit")
    return Frame(
        position_mm=_numbers(values, "ImagePositionPatient", 3),
        orientation=_numbers(values, "ImageOrientationPatient", 6),
        pixel_mm=pixel_mm if pixel_mm and min(pixel_mm) > 0 else None,
        shape=shape,
        thickness_mm=thickness[0] if thickness and thickness[0] > 0 else None,
        rescale=(slope[0], intercept[0]) if slope and intercept and slope[0] != 0 else None,
        frame_of_reference=text_of(header, "FrameOfReferenceUID"),
    )


def _flat(*groups: Dataset) -> Dataset:
    """Return what the functional groups say, those of the frame last."""
    flat = Dataset()
    for group in groups:
        for macro in MACROS:
            if group.get(macro):
                flat.update(group[macro][0])
    return flat


def position_of(header: FileDataset) -> tuple[float, ...] | None:
    """Return the centre of the first pixel, mm; None if it is missing or no place."""
    return _numbers(header, "ImagePositionPatient", 3)


def _numbers(dataset: Dataset, keyword: str, num: int) -> tuple[float, ...] | None:
    try:
        value = dataset.get(keyword)
        numbers = tuple(float(each) for each in ([value] if num == 1 else value))
    except (TypeError, ValueError, OverflowError, NotImplementedError):
        return None
    return numbers if len(numbers) == num and all(map(math.isfinite, numbers)) else None


def _check_deflated(stream: IO[bytes], bounds: Bounds) -> None:
    """Refuse a deflated file that expands too far; pydicom would expand it whole.

    Raises:
        RejectedError: It does.
        zlib.error: It cannot be expanded.
    """
    head = stream.read(META_BYTES)
    if DEFLATED_UID in head:
        stream.seek(_dataset_at(head))
        expander = zlib.decompressobj(-zlib.MAX_WBITS)
        left = bounds.file_bytes
        while packed := expander.unconsumed_tail or stream.read(io.DEFAULT_BUFFER_SIZE):
            left -= len(expander.decompress(packed, left))
            if left <= 0:
                detail = f"expected at most {bounds.file_bytes} bytes expanded, it has more"
                raise RejectedError("FILE_TOO_LARGE", detail)
    stream.seek(0)


def _dataset_at(head: bytes) -> int:
    """Return where the elements of group 2, always explicit and little endian, end."""
    at = HEAD_BYTES
    while head[at : at + 2] == b"\x02\x00":
        if head[at + 4 : at + 6] in LONG_VRS:
            at += 12 + int.from_bytes(head[at + 8 : at + 12], "little")
        else:
            at += 8 + int.from_bytes(head[at + 6 : at + 8], "little")
    return at
