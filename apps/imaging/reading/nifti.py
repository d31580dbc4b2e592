"""A NIfTI volume as a stack of slices in Hounsfield units.

The slices are those along the third array axis, with the array's own rows and columns; their
order is reversed where it would fall along the normal.  NIfTI's axes point right, anterior,
superior; a stack's point left, posterior, superior.

Only header and voxels are read, and only as many bytes as a header within bounds asks for.
Not covered: pairs of .hdr and .img, colour, time series.

Legend: K slices, J rows, I columns; the array on disk is [I, J, K].
"""

import gzip
import logging
from dataclasses import dataclass
from typing import IO

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from apps.imaging.reading.archives import READ_ERRORS, MemberReader
from apps.imaging.reading.bounds import Bounds
from apps.imaging.reading.geometry import SAME_PLACE_MM, tilt_reasons
from apps.imaging.reading.hounsfield import check_hounsfield, rounding_reasons, to_hounsfield
from apps.imaging.reading.source import RejectedError, Source
from apps.imaging.reasons import Reason
from apps.imaging.stack import SliceStack

Header = nib.Nifti1Header  # of which Nifti2Header is a kind
Floats = NDArray[np.float64]

logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # its messages quote values

SUFFIXES = (".nii", ".nii.gz")
HEADER_BYTES: dict[int, type[Header]] = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
SINGLE_FILE = ("n+1", "n+2")  # magic
OFFSET_BYTES = 2**24  # of the voxels, at most; extensions lie before them
UNITS = ("mm", "unknown")

TO_LPS = np.diag([-1.0, -1.0, 1.0])
RIGHT_ANGLE = 1e-4  # cosine of rows and columns; 0.05 mm over 500 mm
SAME_AFFINE_MM = 1.0  # quaternions of half turns are this coarse


@dataclass(frozen=True, slots=True, eq=False)
class _Axes:
    row: Floats
    column: Floats
    pixel_mm: tuple[float, float]
    origin: Floats
    step: Floats


def read_volume(source: Source, bounds: Bounds, found: list[Reason]) -> SliceStack:
    """Return the slices of a NIfTI file.

    Args:
        source: One file.
        bounds: Limits.
        found: Takes the reasons, in the order in which things are found.

    Raises:
        RejectedError: It cannot be read, is no volume, or its geometry is not known.
    """
    member = source.members[0]
    with MemberReader(bounds) as reader, reader.open(member) as stream:
        is_packed = member.name.lower().endswith(".gz")
        header, voxels = _read(gzip.GzipFile(fileobj=stream) if is_packed else stream, bounds)
    axes = _axes_of(header)
    hu = _hounsfield(header, voxels, found)
    origins = axes.origin + np.arange(len(hu))[:, None] * axes.step
    normal = np.cross(axes.row, axes.column)
    if axes.step @ normal < 0:
        hu, origins = hu[::-1], origins[::-1]
    found += tilt_reasons(origins, normal)
    return SliceStack(
        hu=np.ascontiguousarray(hu),
        origins_mm=origins,
        row_axis=axes.row,
        column_axis=axes.column,
        pixel_mm=axes.pixel_mm,
        is_interpolated=np.zeros(len(hu), bool),
    )


def _read(stream: IO[bytes] | gzip.GzipFile, bounds: Bounds) -> tuple[Header, NDArray[np.number]]:
    """Return the header, and voxels as stored [K, J, I]."""
    try:
        header = _header_of(stream)
        shape = _shape_of(header, bounds)
        dtype = header.get_data_dtype()
        if dtype.kind not in "iuf":
            raise RejectedError("VOXELS_UNSUPPORTED", f"expected one number a voxel, got {dtype}")
        offset = header.get_data_offset()
        if not 0 < offset <= OFFSET_BYTES:
            detail = f"expected voxels within {OFFSET_BYTES} bytes, the header says at {offset}"
            raise RejectedError("NIFTI_UNREADABLE", detail)
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        stream.seek(offset)
        raw = stream.read(num_bytes)
        if len(raw) == num_bytes:
            stream.read(1)  # lets gzip check its sum
    except HeaderDataError:
        raise RejectedError("NIFTI_UNREADABLE", "expected a NIfTI header, got none") from None
    except READ_ERRORS:
        raise RejectedError("FILE_TRUNCATED", "expected all voxels, reading them failed") from None
    if len(raw) < num_bytes:
        detail = f"expected {num_bytes} bytes of voxels, got {len(raw)}"
        raise RejectedError("FILE_TRUNCATED", detail)
    return header, np.frombuffer(raw, dtype).reshape(shape[::-1])


def _header_of(stream: IO[bytes] | gzip.GzipFile) -> Header:
    head = stream.read(max(HEADER_BYTES))
    for num_bytes, kind in HEADER_BYTES.items():
        is_whole = len(head) >= num_bytes
        if is_whole and num_bytes in (
            int.from_bytes(head[:4], "little"),
            int.from_bytes(head[:4], "big"),
        ):
            header = kind(head[:num_bytes])
            if header["magic"].item().decode("ascii", "replace")[:3] in SINGLE_FILE:
                return header
    raise RejectedError("NIFTI_UNREADABLE", "expected a NIfTI header, got none")


def _shape_of(header: Header, bounds: Bounds) -> tuple[int, int, int]:
    shape = [int(size) for size in header.get_data_shape()]
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) != 3:
        raise RejectedError("NIFTI_NOT_3D", f"expected 3 dimensions, got {len(shape)}")
    columns, rows, slices = shape
    if slices < bounds.min_slices:
        detail = f"expected at least {bounds.min_slices} slices, got {slices}"
        raise RejectedError("TOO_FEW_SLICES", detail)
    is_small = max(rows, columns) <= bounds.rows and slices <= bounds.slices
    if min(shape) < 1 or not is_small or columns * rows * slices > bounds.voxels:
        detail = f"expected at most {bounds.voxels} voxels, got {columns} x {rows} x {slices}"
        raise RejectedError("SERIES_TOO_LARGE", detail)
    return columns, rows, slices


def _axes_of(header: Header) -> _Axes:
    affine = _affine_of(header)
    row, column, step = (TO_LPS @ affine[:3, axis] for axis in range(3))
    row_mm, column_mm = float(np.linalg.norm(column)), float(np.linalg.norm(row))
    if not np.isfinite(affine).all() or min(row_mm, column_mm) <= 0:
        raise RejectedError("AFFINE_INVALID", "expected an affine with three axes, got another")
    row, column = row / column_mm, column / row_mm
    if abs(row @ column) > RIGHT_ANGLE:
        detail = "expected rows and columns at a right angle, the affine shears them"
        raise RejectedError("AFFINE_SHEARED", detail)
    if abs(step @ np.cross(row, column)) < SAME_PLACE_MM:
        raise RejectedError("AFFINE_INVALID", "expected slices at several places, got one place")
    return _Axes(row, column, (row_mm, column_mm), TO_LPS @ affine[:3, 3], step)


def _affine_of(header: Header) -> Floats:
    """Return voxel indices to millimetres, towards right, anterior, superior."""
    unit = header.get_xyzt_units()[0]
    if unit not in UNITS:
        raise RejectedError("UNIT_NOT_MM", f"expected millimetres, got {unit}")
    sform, qform = header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]
    if sform is None and qform is None:
        detail = "expected an orientation, the header has neither sform nor qform"
        raise RejectedError("ORIENTATION_MISSING", detail)
    if sform is None or qform is None:
        return np.asarray(qform if sform is None else sform, np.float64)
    ends = np.array(np.meshgrid(*([0, size - 1] for size in header.get_data_shape()[:3])))
    corners = np.vstack([ends.reshape(3, -1), np.ones(8)])
    axes = sform[:3, :3] / np.linalg.norm(sform[:3, :3], axis=0)
    is_sheared = np.abs(axes.T @ axes - np.eye(3)).max() > RIGHT_ANGLE  # a qform cannot be
    apart_mm = float(np.abs((sform - qform) @ corners).max())
    if apart_mm > SAME_AFFINE_MM and not is_sheared:
        detail = f"expected one geometry, sform and qform are {apart_mm:.1f} mm apart"
        raise RejectedError("AFFINE_CONFLICT", detail)
    return np.asarray(sform, np.float64)


def _hounsfield(
    header: Header, voxels: NDArray[np.number], found: list[Reason]
) -> NDArray[np.int16]:
    slope, intercept = header.get_slope_inter()
    hu = np.empty(voxels.shape, np.int16)
    num_rounded = num_clipped = 0
    for values, out in zip(voxels, hu, strict=True):
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise RejectedError("VOXELS_NOT_FINITE", "expected numbers, got NaN or infinity")
        is_rounded, is_clipped = to_hounsfield(values, slope or 1.0, intercept or 0.0, out)
        num_rounded += is_rounded
        num_clipped += is_clipped
    check_hounsfield(hu)
    found += rounding_reasons(num_rounded, num_clipped, len(hu))
    return hu
