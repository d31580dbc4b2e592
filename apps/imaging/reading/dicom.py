"""A DICOM series as a stack of slices in Hounsfield units.

Rules:
    1. A slice that cannot be read, or lacks or contradicts what most others say of geometry,
       is set aside; beyond a share of such slices the series is not trusted.
    2. Slices at one place must be one picture, of which one is kept.
    3. UIDs that a segmentation must refer to are recovered from the file or its neighbours.

Legend: K slices, J rows, I columns.
"""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray
from pydicom import FileDataset
from pydicom.uid import generate_uid

from apps.imaging.reading.agreement import Losses, agreeing
from apps.imaging.reading.archives import MemberReader
from apps.imaging.reading.bounds import Bounds
from apps.imaging.reading.decoder import Decoder
from apps.imaging.reading.geometry import (
    SAME_PLACE_MM,
    fill_gaps,
    find_gaps,
    step_reasons,
    tilt_reasons,
    unit_axes,
)
from apps.imaging.reading.headers import Frame, frames_of, read_header, text_of
from apps.imaging.reading.pixels import stored_pixels
from apps.imaging.reading.rescale import hounsfield_of
from apps.imaging.reading.source import Member, RejectedError, Source, reason_of
from apps.imaging.reasons import Reason
from apps.imaging.stack import SliceStack

_SHARED_UIDS = {  # by all slices, and the code where one is missing
    "StudyInstanceUID": "STUDY_UID_MISSING",
    "SeriesInstanceUID": "SERIES_UID_MISSING",
    "FrameOfReferenceUID": "FRAME_UID_MISSING",
}


@dataclass(frozen=True, slots=True, eq=False)
class _Slice:
    header: FileDataset
    frame: Frame
    stored: NDArray[np.integer]


def read_series(
    source: Source, bounds: Bounds, found: list[Reason]
) -> tuple[SliceStack, tuple[FileDataset | None, ...]]:
    """Return the slices of a series in order, and the header of each.

    Args:
        source: Its files.
        bounds: Limits.
        found: Takes the reasons, in the order in which things are found.

    Returns:
        The stack, and headers without pixels, None where a slice was filled in.

    Raises:
        RejectedError: It cannot be repaired.
    """
    slices, failures = _load(source.members, bounds)
    losses = Losses(len(slices) + len(failures), bounds, found)
    for code, num in Counter(failure.code for failure in failures).items():
        losses.add(code, next(f.detail for f in failures if f.code == code), num)
    slices = [slices[k] for k in agreeing([each.frame for each in slices], losses)]
    _complete_uids([each.header for each in slices], source.case_id, found)
    slices, stack = _stacked(slices, found)
    if stack.num_slices < bounds.min_slices:
        detail = f"expected at least {bounds.min_slices} slices, got {stack.num_slices}"
        raise RejectedError("TOO_FEW_SLICES", detail)
    _check_distinct([each.header for each in slices])
    found += tilt_reasons(stack.origins_mm, stack.normal)
    gaps = find_gaps(stack.positions_mm, bounds)
    found += step_reasons(stack.positions_mm, gaps, _usual_thickness(slices))
    filled, acquired = fill_gaps(stack, gaps)
    return filled, tuple(None if k < 0 else slices[k].header for k in acquired)


def _load(members: Sequence[Member], bounds: Bounds) -> tuple[list[_Slice], list[Reason]]:
    """Return the slices of all files, and why the other files have none."""
    slices: list[_Slice] = []
    failures: list[Reason] = []
    num_voxels = 0
    with MemberReader(bounds) as reader, Decoder() as decoder:
        for member in members:
            try:
                of_file = _load_file(reader.read(member), decoder, bounds)
            except Exception as error:  # noqa: BLE001 - one file never takes others with it
                failures.append(reason_of(error))
                continue
            slices += of_file
            num_voxels += sum(each.stored.size for each in of_file)
            if num_voxels > bounds.voxels or len(slices) > bounds.slices:
                detail = f"expected at most {bounds.slices} slices and {bounds.voxels} voxels"
                raise RejectedError("SERIES_TOO_LARGE", detail)
    return slices, failures


def _load_file(raw: bytes, decoder: Decoder, bounds: Bounds) -> list[_Slice]:
    stream = io.BytesIO(raw)
    header = read_header(stream, bounds)
    frames = frames_of(header, bounds)
    num_voxels = len(frames) * frames[0].shape[0] * frames[0].shape[1]
    if num_voxels > bounds.voxels:
        detail = f"expected at most {bounds.voxels} voxels, got {num_voxels}"
        raise RejectedError("SERIES_TOO_LARGE", detail)
    stored = stored_pixels(raw, stream.tell(), header, decoder)
    return [_Slice(header, frame, stored[k]) for k, frame in enumerate(frames)]


def _stacked(slices: list[_Slice], found: list[Reason]) -> tuple[list[_Slice], SliceStack]:
    """Return the slices in order, without duplicates, and their stack."""
    frame = slices[0].frame
    orientation = cast("tuple[float, ...]", frame.orientation)  # `agreeing` kept no other
    row, column = unit_axes(orientation)
    origins = np.array([each.frame.position_mm for each in slices], np.float64)
    order = np.argsort(origins @ np.cross(row, column), kind="stable")
    slices, origins = [slices[k] for k in order], origins[order]
    hu = hounsfield_of([s.stored for s in slices], [s.frame.rescale for s in slices], found)
    kept = _distinct(hu, origins, np.cross(row, column), found)
    if len(kept) < len(slices):
        slices, origins, hu = [slices[k] for k in kept], origins[kept], hu[kept]
    stack = SliceStack(
        hu=hu,
        origins_mm=origins,
        row_axis=row,
        column_axis=column,
        pixel_mm=cast("tuple[float, float]", frame.pixel_mm),
        is_interpolated=np.zeros(len(slices), bool),
    )
    return slices, stack


def _usual_thickness(slices: list[_Slice]) -> float | None:
    known = [s.frame.thickness_mm for s in slices if s.frame.thickness_mm is not None]
    return float(np.median(known)) if known else None


def _distinct(
    hu: NDArray[np.int16],
    origins_mm: NDArray[np.float64],
    normal: NDArray[np.float64],
    found: list[Reason],
) -> list[int]:
    """Return the slices to keep, one for each place.

    Raises:
        RejectedError: Two at one place differ, and none can be preferred.
    """
    positions = origins_mm @ normal
    kept = [0]
    for k in range(1, len(hu)):
        last = kept[-1]
        if positions[k] - positions[last] > SAME_PLACE_MM:
            kept.append(k)
        elif np.abs(origins_mm[k] - origins_mm[last]).max() > SAME_PLACE_MM or not np.array_equal(
            hu[k], hu[last]
        ):
            detail = "expected one picture for each place, two slices at one place differ"
            raise RejectedError("POSITION_CONFLICT", detail)
    if num := len(hu) - len(kept):
        found.append(Reason("DUPLICATE_DROPPED", f"{num} slices were there twice"))
    return kept


def _complete_uids(headers: list[FileDataset], case_id: str, found: list[Reason]) -> None:
    """Give every header the UIDs that outputs refer to.

    Raises:
        RejectedError: A slice has no UID of its own, nor has its file.
    """
    for keyword, code in _SHARED_UIDS.items():
        values = [text_of(header, keyword) for header in headers]
        num_missing = values.count("")
        if not num_missing:
            continue
        stated = Counter(value for value in values if value)
        new = generate_uid(entropy_srcs=[case_id, keyword])
        uid = stated.most_common(1)[0][0] if stated else new
        for header, value in zip(headers, values, strict=True):
            header.pop(keyword, None)  # it may be there and broken
            setattr(header, keyword, value or uid)
        origin = "took the others'" if stated else "made one"
        detail = f"{num_missing} of {len(headers)} slices without {keyword}; {origin}"
        found.append(Reason(code, detail))
    num_recovered = 0
    for header in headers:
        if text_of(header, "SOPInstanceUID"):
            continue
        uid = text_of(header.file_meta, "MediaStorageSOPInstanceUID")
        if not uid:
            detail = "expected a SOPInstanceUID for each slice, the file has none either"
            raise RejectedError("SOP_UID_MISSING", detail)
        header.pop("SOPInstanceUID", None)
        header.SOPInstanceUID = uid
        num_recovered += 1
    if num_recovered:
        detail = f"{num_recovered} slices without SOPInstanceUID; took that of the file"
        found.append(Reason("SOP_UID_RECOVERED", detail))


def _check_distinct(headers: list[FileDataset]) -> None:
    """Refuse slices at several places that share a UID.

    Raises:
        RejectedError: Two do.
    """
    files = {id(header): text_of(header, "SOPInstanceUID") for header in headers}
    if len(set(files.values())) < len(files):
        detail = "expected a SOPInstanceUID for each slice, slices at two places share one"
        raise RejectedError("SOP_UID_REPEATED", detail)
