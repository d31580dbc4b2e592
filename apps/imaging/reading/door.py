"""The door to reading: a source in, a case out, whatever the input is like.

Codes of reasons, by what becomes of the case:

repaired
    FILE_TRUNCATED, FILE_UNREADABLE, PIXELS_UNREADABLE, ...
                          some slices cannot be read; set aside
    POSITION_MISSING, ORIENTATION_MISMATCH, SLICE_SIZE_MISMATCH, ...
                          some slices lack or contradict the geometry of the others; set aside
    DUPLICATE_DROPPED     slices were there twice
    GAP_INTERPOLATED      missing slices were filled in; costs half the distance of neighbours
    MIXED_SPACING         steps differ; costs half the difference of the extremes
    SLICES_SPARSE         steps are wider than slices; costs half of what lies between
    TILT_SHEARED, ORIGIN_SHIFTED
                          slices do not rise along their normal; every one stays at its place
    RESCALE_ASSUMED, RESCALE_FROM_OTHERS, RESCALE_REPLACED
                          no or a wrong rescale, and values that show the right one
    HU_ROUNDED, HU_CLIPPED
                          values between whole HU, or beyond 16 bits
    SERIES_UID_MISSING, STUDY_UID_MISSING, FRAME_UID_MISSING, SOP_UID_RECOVERED
                          identifiers completed
quarantined
    the first two kinds, if they are too many, and
    PLACE_EMPTY, FOREIGN_FILE, NOT_CT_IMAGE, MODALITY_NOT_CT, LOCALISER
                          no CT series in this place
    ARCHIVE_..., MEMBER_..., FILE_TOO_LARGE, SLICE_TOO_LARGE, SERIES_TOO_LARGE
                          broken, locked or beyond a bound
    TOO_FEW_SLICES, GAP_TOO_WIDE, GAPS_TOO_MANY, POSITION_CONFLICT, ORIENTATION_INVALID
                          no volume that can be vouched for
    RESCALE_MISSING, RESCALE_NOT_HU, VALUES_NOT_HU
                          values that are not Hounsfield units
    SOP_UID_MISSING, SOP_UID_REPEATED, FRAMES_UNPLACED, PIXELS_UNSUPPORTED
                          DICOM that cannot be used
    NIFTI_UNREADABLE, NIFTI_NOT_3D, AFFINE_..., UNIT_NOT_MM, ORIENTATION_MISSING, VOXELS_...
                          likewise NIfTI
    BODY_MISSING          read well, and all of it is air; found by ``segmentation``
    READING_FAILED        an error of ours, or of a library
"""

import logging
import warnings
from typing import TYPE_CHECKING

from apps.imaging.case import Case
from apps.imaging.reading.bounds import Bounds
from apps.imaging.reading.dicom import read_series
from apps.imaging.reading.nifti import read_volume
from apps.imaging.reading.source import RejectedError, Source, SourceKind
from apps.imaging.reasons import Reason, Status

if TYPE_CHECKING:
    from pydicom import Dataset

LOG = logging.getLogger(__name__)


def read_case(source: Source, bounds: Bounds) -> Case:
    """Read a case; one that cannot be read is quarantined, and nothing is raised.

    Args:
        source: As found by ``discover``.
        bounds: Limits.

    Returns:
        The case; of a quarantined one the cause is the first reason.
    """
    found = list(source.reasons)
    try:
        with warnings.catch_warnings(action="ignore"):  # they quote values
            return _read(source, bounds, found)
    except RejectedError as error:
        cause = error.reason
    except Exception as error:  # noqa: BLE001 - one case never takes others with it
        LOG.error("case %s: %s", source.case_id, type(error).__name__)  # noqa: TRY400 - no content
        detail = f"expected a readable case, reading it failed by {type(error).__name__}"
        cause = Reason("READING_FAILED", detail)
    return _quarantined(source, (cause, *found))


def _read(source: Source, bounds: Bounds, found: list[Reason]) -> Case:
    if source.kind is SourceKind.NOTHING:
        return _quarantined(source, source.reasons)
    headers: tuple[Dataset | None, ...] = ()
    if source.kind is SourceKind.NIFTI:
        stack = read_volume(source, bounds, found)
    else:
        stack, headers = read_series(source, bounds, found)
    status = Status.REPAIRED if found else Status.CORRECT
    return Case(
        case_id=source.case_id,
        source=source.label,
        series_uid=source.series_uid,
        status=status,
        reasons=tuple(found),
        stack=stack,
        headers=headers,
    )


def _quarantined(source: Source, reasons: tuple[Reason, ...]) -> Case:
    return Case(
        source.case_id,
        source.label,
        source.series_uid,
        Status.QUARANTINED,
        reasons,
        stack=None,
    )
